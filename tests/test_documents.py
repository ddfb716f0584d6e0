"""docs/spec.md names what the code names: its version, every stage, every policy's fields; and links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from eplb_triton.constants import SPEC_VERSION
from eplb_triton.policy import Corner, Exchange, Fixup, Nearest, Paired, Peak, named_policies
from tests.stages.test_siblings import STAGES

DOCS = Path(__file__).parents[1] / "docs"
TEXT = (DOCS / "spec.md").read_text()


def headings(document: Path) -> list[str]:
    return re.findall(r"^#+ (.*)$", document.read_text(), flags=re.MULTILINE)


def test_the_title_has_the_version() -> None:
    assert headings(DOCS / "spec.md")[0] == f"Specification of plans, version {SPEC_VERSION}"


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_has_a_section(stage: str) -> None:
    assert stage in headings(DOCS / "spec.md")


def in_words(choice: object) -> str:
    """A field of a policy as the table writes it."""
    match choice:
        case None:
            return "–"
        case str():
            return choice
        case Fixup(moves, donors, peak, tie):
            return f"({moves}, {donors}, {peak}, {tie})"
        case Peak():
            return "peak"
        case Nearest() | Corner() | Paired() | Exchange():
            return f"{type(choice).__name__.lower()}({', '.join(str(value) for value in vars(choice).values())})"
    raise TypeError(f"choice={choice!r} is written by no rule of the table")


@pytest.mark.parametrize("name", named_policies())
def test_the_table_of_policies_is_what_they_are(name: str) -> None:
    policy = named_policies()[name]
    fields = ("group_pack", "group_refine", "counts", "fixup", "gpu_pack", "gpu_refine")
    row = " | ".join([f"| `{name}`", *(in_words(getattr(policy, field)) for field in fields)])
    assert f"{row} |" in TEXT


@pytest.mark.parametrize(
    "document",
    ["spec.md", "bound.md", "policies.md", "serving.md", "splitting.md", "frameworks.md", "files.md", "replay.md"],
)
def test_links_lead_somewhere(document: str) -> None:
    for path, anchor in re.findall(r"\]\(([^)#\s]*)#?([^)\s]*)\)", (DOCS / document).read_text()):
        if path.startswith("http"):
            continue
        target = (DOCS / path).resolve() if path else DOCS / document
        assert target.exists(), path
        if anchor:
            anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings(target)}
            assert anchor in anchors, f"{path}#{anchor}"
