"""The house: what may be imported where, and what the README promises."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import eplb_reference
import eplb_triton

ROOT = Path(__file__).parent.parent


def test_imports_without_triton_or_a_gpu() -> None:
    """Triton is a base dependency on Linux only; nothing may need it before a kernel is asked for."""
    program = (
        "import sys\n"
        "sys.modules['triton'] = None\n"
        "import torch, eplb_triton as e\n"
        "print(sorted(m for m in sys.modules if m in ('numba', 'matplotlib', 'click', 'rich', 'scipy')))\n"
        "p = e.plan(torch.rand(2, 12), e.Topology(num_replicas=16, num_gpus=8, num_groups=4, num_nodes=2))\n"
        "p.validate()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_public_names() -> None:
    assert set(eplb_triton.__all__) <= set(vars(eplb_triton))
    for name in eplb_triton.__all__:
        value = getattr(eplb_triton, name)
        assert isinstance(value, (str, dict)) or value.__doc__, name


def test_no_function_bears_the_name_of_a_module_beside_it() -> None:
    """`import eplb_triton.x` would give the one or the other."""
    for root in (Path(eplb_triton.__file__).parent, Path(eplb_reference.__file__).parent):
        for package in {path.parent for path in root.rglob("*.py")}:
            modules = {path.stem for path in package.glob("*.py")} | {
                path.parent.name for path in package.glob("*/*.py")
            }
            for path in package.glob("*.py"):
                tree = ast.parse(path.read_text())
                functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
                assert not functions & modules, path


def test_nobody_imports_the_planner() -> None:
    """But the package's own fronts, and the command line, which is a user of the library."""
    for package in (Path(eplb_triton.__file__).parent, Path(eplb_reference.__file__).parent):
        for path in package.rglob("*.py"):
            front = path.parent.name == "cli" or path.name in ("__init__.py", "ops.py")
            assert front or "eplb_triton.planner" not in path.read_text(), path


def test_readme_example_prints_what_it_says() -> None:
    readme = (ROOT / "README.md").read_text()
    program, output = re.search(r"```python\n(.*?)```\n+```text\n(.*?)```", readme, re.DOTALL).groups()  # type: ignore[union-attr]
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout == output


def test_readme_names_every_policy() -> None:
    readme = (ROOT / "README.md").read_text()
    table = readme.partition("## Policies")[2].partition("\n## ")[0]
    assert re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE) == list(eplb_triton.POLICIES)


def test_wheel_holds_the_two_packages_and_nothing_else(tmp_path: Path) -> None:
    pytest.importorskip("hatchling", reason="builds a wheel: pip install -e .[dev]")
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.iterdir()
    assert wheel.name.endswith("-py3-none-any.whl")
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"eplb_triton", "eplb_reference"}
    assert {"eplb_triton/py.typed", "eplb_reference/py.typed", "eplb_reference/pipeline.py"} <= set(names)


def test_versions_agree() -> None:
    stated = re.search(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert stated is not None
    assert stated.group(1) == eplb_triton.__version__
