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
    assert set(eplb_triton.__all__) <= set(dir(eplb_triton))
    with pytest.raises(AttributeError, match="module 'eplb_triton' has no attribute 'plam'"):
        getattr(eplb_triton, "plam")  # noqa: B009 - the expression alone would be one without effect
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
    """But the package's own fronts, and the command line and what tests are made of, which are users of the library."""
    for package in (Path(eplb_triton.__file__).parent, Path(eplb_reference.__file__).parent):
        for path in package.rglob("*.py"):
            front = path.parent.name in ("cli", "testing", "integrations") or path.name in ("__init__.py", "ops.py")
            assert front or "eplb_triton.planner" not in path.read_text(), path


@pytest.mark.parametrize("document", ["README.md", "docs/serving.md"])
def test_every_block_of_a_document_runs_as_it_is_pasted(document: str) -> None:
    """And prints what stands under it, where something does; a block that needs a GPU is compiled alone."""
    text = (ROOT / document).read_text()
    blocks = re.findall(r"```python\n(.*?)```\n+(?:```text\n(.*?)```)?", text, re.DOTALL)
    assert blocks
    for program, output in blocks:
        if "torch.cuda" in program:
            compile(program, document, "exec")
            continue
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=ROOT)
        assert done.returncode == 0, done.stderr
        assert not output or done.stdout == output


def test_readme_has_no_link_that_dies_on_a_package_index() -> None:
    for target in re.findall(r"\]\(([^)]+)\)", (ROOT / "README.md").read_text()):
        assert target.startswith(("https://", "#")), target


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


def test_requirements_can_be_met_and_the_command_line_brings_what_it_needs() -> None:
    """Each torch pins the Triton that it brings: 2.8 pins 3.4."""
    project = (ROOT / "pyproject.toml").read_text()
    assert '"torch>=2.8"' in project
    assert "\"triton>=3.4; platform_system == 'Linux'\"" in project
    (cli,) = (line for line in project.splitlines() if line.startswith("cli = "))
    assert all(package in cli for package in ("click", "rich", "matplotlib", "numba"))
    assert all(f'"Programming Language :: Python :: 3.{minor}"' in project for minor in range(10, 14))
