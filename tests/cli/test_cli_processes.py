"""The commands as processes of their own: exit status, terminals, pipes, full disks."""

from __future__ import annotations

import os
import pty
import re
import resource
import shlex
import subprocess
from pathlib import Path

import pytest

from eplb_triton import POLICIES
from tests.commands import SIZE, launch, options, process, refused, save_plan


def test_good_files(tmp_path: Path, loads: Path) -> None:
    saved = tmp_path / "plan.npz"
    for arguments in (
        ("plan", loads, *SIZE, "-o", saved),
        ("compare", loads, *SIZE),
        ("score", saved, loads),
        ("check", saved),
    ):
        result = launch(*arguments)
        assert (result.status, result.err) == (0, "")
        assert len(result.out.splitlines()) >= 3


def test_bad_files(tmp_path: Path) -> None:
    saved = save_plan(tmp_path)
    bad = tmp_path / "bad.npz"
    bad.write_bytes(b"PK\x03\x04 cut short")
    before = sorted(tmp_path.iterdir())
    refused(launch("plan", bad, *SIZE, "-o", tmp_path / "out.npz"), f"{bad}: expected loads")
    refused(launch("compare", bad, *SIZE, "--plot", tmp_path / "out.png"), f"{bad}: expected loads")
    refused(launch("score", saved, bad), f"{bad}: expected loads")
    refused(launch("check", bad), f"{bad}: expected a plan")
    saved.write_text(saved.read_text().replace('"num_experts": 16', '"num_experts": 8'))
    refused(launch("check", saved), f"{saved}: ", "num_experts=8", status=1)
    assert sorted(tmp_path.iterdir()) == before


def test_the_demo_where_only_ascii_prints() -> None:
    result = launch("demo", PYTHONIOENCODING="ascii")
    assert (result.status, result.err) == (0, "")
    assert result.out.isascii()
    assert all(policy in result.out for policy in POLICIES)
    assert max(len(line.rstrip()) for line in result.out.splitlines()) < 160
    assert "python -m eplb_triton plan demo.npz --replicas 288" in result.out


def test_a_seventh_policy_can_be_chosen(loads: Path) -> None:
    code = (
        "import sys; from eplb_triton import POLICIES, Policy; POLICIES['seventh'] = Policy('seventh')\n"
        "from eplb_triton.cli import main; sys.exit(main())"
    )
    result = launch("plan", loads, *SIZE, "--policy", "seventh", code=code)
    assert (result.status, result.err) == (0, "")
    assert "seventh" in result.out


def read_all(terminal: int) -> str:
    """What was written to a terminal whose other end is closed."""
    content = b""
    try:
        while part := os.read(terminal, 65536):
            content += part
    except OSError:  # Linux says end of file so
        pass
    return content.decode()


def test_progress_and_colours_are_for_terminals(loads: Path) -> None:
    ours, theirs = pty.openpty()
    settings = options({"NO_COLOR": "1", "TERM": "xterm", "COLUMNS": "100"})
    del settings["timeout"]
    piped = subprocess.Popen(process("compare", loads, *SIZE), stdout=subprocess.PIPE, stderr=theirs, **settings)
    os.close(theirs)
    progress = read_all(ours)
    out, _ = piped.communicate(timeout=60)
    assert piped.returncode == 0
    assert "planning" in progress
    assert f"{4 * len(POLICIES)}/{4 * len(POLICIES)}" in progress
    assert not re.search(r"\x1b\[[\d;]*3\dm", progress)  # no colour, by NO_COLOR
    assert "\x1b" not in out


def test_a_full_disk_leaves_the_old_plan(tmp_path: Path) -> None:
    saved = save_plan(tmp_path)
    old = saved.read_bytes()
    command = process("plan", tmp_path / "loads.npz", *SIZE, "-o", saved)
    done = subprocess.run(
        command,
        capture_output=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100)),
        **options({"PYTHONDONTWRITEBYTECODE": "1"}),
    )
    assert done.returncode == 2
    assert done.stderr == f"eplb-triton: {saved}: expected a file that can be written; found File too large\n"
    assert saved.read_bytes() == old
    assert {path.name for path in tmp_path.iterdir()} == {"loads.npz", "plan.json"}


def test_a_full_stdout_is_one_line(tmp_path: Path, loads: Path) -> None:
    with open("/dev/full", "w") as full:
        command = process("plan", loads, *SIZE)
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, check=False, **options({}))
    assert done.returncode == 2
    assert done.stderr == "eplb-triton: cannot write to stdout: No space left on device\n"


def test_help_does_without_pytorch() -> None:
    """It took 1.8 s, all of it to import what help has no use for."""
    code = (
        "import sys; from eplb_triton.cli import main; main(sys.argv[1:])\n"
        "print(*({'torch', 'numpy', 'rich', 'numba'} & set(sys.modules)))"
    )
    for arguments in (["--help"], ["plan", "--help"], ["demo", "--help"], ["--version"]):
        result = launch(*arguments, code=code)
        assert (result.status, result.err, result.out.splitlines()[-1]) == (0, "", ""), arguments


def test_a_reader_that_goes_is_no_invalid_plan(loads: Path) -> None:
    ours, theirs = os.pipe()
    os.close(ours)
    done = subprocess.run(
        process("plan", loads, *SIZE), stdout=theirs, stderr=subprocess.PIPE, check=False, **options({})
    )
    os.close(theirs)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize("closed", ["1>&-", "1>&- 2>&-"])
def test_closed_streams_are_no_traceback(loads: Path, closed: str) -> None:
    command = f"exec {shlex.join(process('plan', loads, *SIZE))} {closed}"
    done = subprocess.run(["sh", "-c", command], capture_output=True, check=False, **options({}))
    told = "" if "2" in closed else "eplb-triton: cannot write to stdout: it is closed\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", told)


@pytest.mark.parametrize("module", ["program", "planning"])
def test_an_interrupt_while_modules_are_imported_is_one_line(loads: Path, module: str) -> None:
    code = f"""
import sys
from eplb_triton.cli import main
class Interrupt:
    def find_spec(self, name, *_):
        if name == "eplb_triton.cli.{module}":
            raise KeyboardInterrupt
sys.meta_path.insert(0, Interrupt())
sys.exit(main())
"""
    result = launch("plan", loads, *SIZE, code=code)
    assert (result.status, result.out, result.err.strip()) == (130, "", "eplb-triton: interrupted")


def test_a_backend_that_is_not_installed_is_one_line(loads: Path) -> None:
    code = "import sys; sys.modules[sys.argv.pop()] = None; from eplb_triton.cli import main; sys.exit(main())"
    for backend, package, install in (("cpu", "numba", "'eplb-triton[cpu]'"), ("triton", "triton", "triton")):
        result = launch("plan", loads, *SIZE, "--backend", backend, package, code=code)
        refused(result, f"--backend {backend} needs {package}: pip install {install}")
    result = launch("plan", loads, *SIZE, "numba", code=code)
    assert result.status == 0
    assert result.err == (
        "eplb-triton: planning without numba takes 5 to 100 times as long: pip install 'eplb-triton[cpu]'\n"
    )


def test_without_the_extra_each_command_names_it(tmp_path: Path, loads: Path) -> None:
    code = (
        "import sys; from eplb_triton.cli import main\n"
        "def without(package, *arguments):\n"
        "    sys.modules[package] = None; print(main(arguments)); del sys.modules[package]\n"
        "without('click', 'demo'); without('rich', 'demo'); without('matplotlib', *sys.argv[1:])"
    )
    picture = tmp_path / "x.png"
    result = launch("compare", loads, *SIZE, "--plot", picture, code=code)
    assert result.out.split() == ["2", "2", "2"]
    assert result.err.splitlines() == [
        "eplb-triton: the command line needs click: pip install 'eplb-triton[cli]'",
        "eplb-triton: the command line needs rich: pip install 'eplb-triton[cli]'",
        "eplb-triton: --plot needs matplotlib: pip install 'eplb-triton[cli]'",
    ]
    assert not picture.exists()
