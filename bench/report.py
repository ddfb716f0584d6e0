"""Report of a folder of results: REPORT.md and pictures; and the tables of the docs, filled in between markers."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click

from bench import plots, results, tables
from bench.machine import ROOT
from bench.studies import balance, cold, conformance, next_window, scale, vector_units

Found = Mapping[str, dict[str, Any]]

SECTIONS: dict[str, tuple[str, str, Callable[[dict[str, Any]], str]]] = {
    "headline": ("cases", "Planning time, published algorithm", tables.headline),
    "times": ("cases", "Planning time, all planners", tables.times),
    "same-maps-in-all": ("cases", "Same maps as vLLM", tables.same_maps_in_all),
    "same-maps": ("cases", "Same maps as vLLM, case by case", tables.same_maps),
    "quality": ("cases", "Balance and movement", tables.quality),
    "cold": ("cases", "First call and memory", cold.table),
    "gpu": ("cases", "On the GPU", tables.gpu),
    "scale": ("scale", "Scale", scale.table),
    "next-window": ("next-window", "The next window of a routing trace", next_window.table),
    "golden": ("conformance", "Golden and random plans, our backends", conformance.golden_table),
    "peers": ("conformance", "Peers beside DeepSeek's published code", conformance.peers_table),
    "vector-units": ("conformance", "vLLM's maps and the CPU's vector units", vector_units.table),
    "balance": ("balance", "Gap to the lower bound, on the loads planned", balance.table),
    "tiny": ("balance", "Tiny instances beside the exact optimum", balance.tiny_table),
    "skipped": ("cases", "What took no part", tables.skipped),
}
"""Of each table: the kind of result it is made from, its title, and what makes it."""

PICTURES: dict[str, tuple[str, Callable[[dict[str, Any], Path], None]]] = {
    "time.png": ("cases", plots.time_by_case),
    "balance-and-time.png": ("cases", plots.balance_and_time),
    "gpu-loads.png": ("cases", plots.gpu_loads),
    "scale.png": ("scale", scale.picture),
    "next-window.png": ("next-window", next_window.picture),
    "gap.png": ("balance", balance.picture),
}


def section(name: str, found: Found) -> str:
    """One table with its source, or "" where the folder has no such result or it has nothing of the kind."""
    kind, _, make = SECTIONS[name]
    if kind not in found:
        return ""
    text = make(found[kind])
    return f"{text}\n\n{tables.source(found[kind])}" if text else ""


def picture(name: str, found: Found, document: Path) -> str:
    """The Markdown of a picture as `document` links to it, or "" where it was not drawn."""
    kind = PICTURES[name][0]
    if kind not in found:
        return ""
    drawn = (ROOT / found[kind]["path"]).parent / name
    return f"![{name.removesuffix('.png')}]({os.path.relpath(drawn, document.parent)})" if drawn.is_file() else ""


def write_report(folder: Path) -> Path:
    """Draw the pictures of a folder of results and write its REPORT.md; return the path of that."""
    found = results.load(folder)
    parts = ["# Benchmark report", *(tables.machine(result) for result in [*found.values()][:1])]
    for name, (kind, draw) in PICTURES.items():
        (folder / name).unlink(missing_ok=True)  # a run of other cases may have nothing to draw
        if kind in found:
            draw(found[kind], folder / name)
    begun = set()
    for name, (kind, title, _) in SECTIONS.items():
        if text := section(name, found):
            parts.append(f"## {title}")
            if kind not in begun:  # the pictures of a kind stand above its first table
                begun.add(kind)
                parts += [
                    f"![{of}]({of})"
                    for of, (made_of, _) in PICTURES.items()
                    if made_of == kind and (folder / of).is_file()
                ]
            parts.append(text)
    path = folder / "REPORT.md"
    path.write_text("\n\n".join(parts) + "\n")
    return path


def fill(text: str, found: Found, document: Path) -> str:
    """`text` with every block `<!-- bench:NAME -->` ... `<!-- /bench:NAME -->` that `found` has data for made anew.

    Args:
        text: Markdown; NAME is a key of `SECTIONS` or `PICTURES`.
        found: results by kind.
        document: where the text stands; links to pictures start there.

    Raises:
        ValueError: a block names no table and no picture.
    """

    def block(match: re.Match[str]) -> str:
        name = match["name"]
        if name not in SECTIONS and name not in PICTURES:
            known = ", ".join([*SECTIONS, *PICTURES])
            raise ValueError(f"<!-- bench:{name} --> names no table or picture, must be one of {known}")
        made = section(name, found) if name in SECTIONS else picture(name, found, document)
        return f"<!-- bench:{name} -->\n{made}\n<!-- /bench:{name} -->" if made else match[0]

    return re.sub(r"<!-- bench:(?P<name>[\w.-]+) -->.*?<!-- /bench:(?P=name) -->", block, text, flags=re.DOTALL)


@click.command()
@click.argument("folder", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option(
    "--fill",
    "documents",
    multiple=True,
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="a Markdown file whose bench blocks are made anew; repeat for several",
)
def main(folder: Path, documents: tuple[Path, ...]) -> None:
    """Write REPORT.md and the pictures of FOLDER, and the tables of documents."""
    click.echo(results.relative(write_report(folder)))
    found = results.load(folder)
    for document in documents:
        document.write_text(fill(document.read_text(), found, document.resolve()))
        click.echo(results.relative(document))


if __name__ == "__main__":
    main()
