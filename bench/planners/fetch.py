"""`make peers`: download the published wheels, keep their planner modules only."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import click

FOLDER = Path(__file__).parents[1] / ".peers"
MANIFEST = "peers.json"

# The planners are plain Python, the same in the wheels of every platform: one fixed platform serves all machines.
_WHEEL_TAGS = (
    *("--only-binary=:all:", "--python-version=3.11", "--implementation=cp", "--abi=cp311", "--abi=abi3"),
    *("--platform=manylinux_2_34_x86_64", "--platform=manylinux_2_28_x86_64"),
)


@dataclass(frozen=True)
class Package:
    """A published package and where in its wheel the planner is.

    Args:
        name: on the index.
        version: exactly.
        folder: of the planner modules in the wheel; they are unpacked into `FOLDER`/name.
        modules: file names.
    """

    name: str
    version: str
    folder: str
    modules: tuple[str, ...]


PACKAGES = (
    Package("vllm", "0.33.0", "vllm/distributed/eplb/policy", ("abstract.py", "default.py")),
    Package("sglang", "0.5.23", "sglang/srt/eplb/eplb_algorithms", ("deepseek.py", "deepseek_vec.py")),
    Package(
        "vllm-ascend",
        "0.23.0",
        "vllm_ascend/eplb/core/policy",
        ("policy_abstract.py", "policy_default_eplb.py"),
    ),
)


def fetch(package: Package, folder: Path) -> dict[str, str]:
    """Download one wheel, unpack its planner modules under `folder`; SHA-256 of each module.

    Raises:
        subprocess.CalledProcessError: pip could not download it.
        KeyError: the wheel has no such module.
    """
    digests = {}
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", *_WHEEL_TAGS, "--dest", scratch]
        subprocess.run([*command, f"{package.name}=={package.version}"], check=True)
        (wheel,) = Path(scratch).glob("*.whl")
        target = folder / package.name
        target.mkdir(exist_ok=True)
        with zipfile.ZipFile(wheel) as archive:
            for module in package.modules:
                source = archive.read(f"{package.folder}/{module}")
                (target / module).write_bytes(source)
                digests[module] = hashlib.sha256(source).hexdigest()
    return digests


@click.command()
@click.option("--folder", type=click.Path(path_type=Path), default=FOLDER, help="where the modules go")
def main(folder: Path) -> None:
    """Fetch the planners that the benchmark compares with (about 400 MB of downloads, 100 kB kept)."""
    folder.mkdir(parents=True, exist_ok=True)
    manifest = folder / MANIFEST
    fetched = json.loads(manifest.read_text()) if manifest.is_file() else {}
    failed = False
    for package in PACKAGES:
        if fetched.get(package.name, {}).get("version") == package.version:
            click.echo(f"{package.name} {package.version}: already there")
            continue
        click.echo(f"{package.name} {package.version}: downloading")
        try:
            modules = fetch(package, folder)
        except (subprocess.CalledProcessError, KeyError) as error:
            click.echo(f"{package.name} {package.version}: not fetched ({error}); the benchmark runs without it")
            failed = True
            continue
        fetched[package.name] = {"version": package.version, "sha256": modules}
        manifest.write_text(json.dumps(fetched, indent=1))
    sys.exit(failed)


if __name__ == "__main__":
    main()
