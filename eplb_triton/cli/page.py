"""A report of a replay for people: one page that needs nothing else, neither a script nor a network."""

from __future__ import annotations

import math
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from eplb_triton import __version__
from eplb_triton.cli import page_pictures, words
from eplb_triton.cli.refusals import refusing
from eplb_triton.cli.replay_study import FORESIGHT, UNPLANNED, Outcome
from eplb_triton.cli.replay_tables import amount, gigabytes, label, percent, steps
from eplb_triton.cli.verdict import NOTHING, best_of
from eplb_triton.formats import write_whole
from eplb_triton.printing import printable
from eplb_triton.replay import EVEN

if TYPE_CHECKING:
    from eplb_triton.cli.replaying import Findings

# Okabe and Ito's colours, lighter on a dark page. s1 no plan, s2 steady, s3 deepseek, s4 balanced, s5 one plan, s6 what
# comes is known, s7 split in the step, s8 any other policy.
_LIGHT = """--paper: #fff; --ink: #1b1b1b; --soft: #5a5a5a; --grid: #d5d5d5; --panel: #f4f4f2; --s1: #767676;
  --s2: #0072b2; --s3: #d55e00; --s4: #b87700; --s5: #56a4d9; --s6: #00825f; --s7: #b0558a; --s8: #8c564b"""
_DARK = """--paper: #16181b; --ink: #e8e6e3; --soft: #a8a8a8; --grid: #3d4045; --panel: #202327; --s1: #a0a0a0;
  --s2: #4fb3f2; --s3: #ff8a3d; --s4: #f0b429; --s5: #9bd3f7; --s6: #35c79b; --s7: #e58fc0; --s8: #c99a8f"""
_STYLE = f"""
:root {{ color-scheme: light dark; {_LIGHT} }}
@media (prefers-color-scheme: dark) {{ :root {{ {_DARK} }} }}
* {{ box-sizing: border-box }}
body {{ margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif }}
main {{ max-width: 54rem; margin: 0 auto; padding: 1.5rem 1rem 3rem }}
h1 {{ font-size: 1.5rem; line-height: 1.25; margin: 0 0 .25rem }} h2 {{ font-size: 1.15rem; margin: 2.2rem 0 .4rem }}
.of {{ color: var(--soft); margin: 0 0 1.2rem; overflow-wrap: anywhere }}
.verdict {{ background: var(--panel); border-left: 4px solid var(--s2); padding: .8rem 1rem; margin: 0 }}
.verdict b {{ display: block; font-size: 1.12rem; margin-bottom: .5rem }}
.wide {{ overflow-x: auto; margin: 0 }} svg {{ display: block; width: 100%; min-width: 26rem; height: auto }}
table {{ border-collapse: collapse; font-size: .82rem; width: 100%; font-variant-numeric: tabular-nums }}
th, td {{ padding: .25rem .4rem; text-align: right; white-space: nowrap }} th {{ vertical-align: bottom }}
th:nth-child(-n+2), td:nth-child(-n+2) {{ text-align: left }} td:first-child {{ white-space: normal; min-width: 8rem }}
thead th, tr.first td {{ border-top: 1px solid var(--grid) }} .note {{ color: var(--soft); font-size: .88rem }}
dt {{ font-weight: 600 }} dd {{ margin: 0 0 .5rem 1rem }} code {{ font-size: .85rem; overflow-wrap: anywhere }}
@media print {{ :root {{ color-scheme: light; {_LIGHT} }} @page {{ margin: 14mm }}
  body {{ font-size: 10.5pt }} main {{ padding: 0; max-width: none }} section, figure, tr, dd {{ break-inside: avoid }}
  h2 {{ break-after: avoid }} .wide {{ overflow: visible }} svg {{ min-width: 0 }} table {{ font-size: 8pt }} }}
"""


def write_page(path: Path, found: Findings) -> None:
    """Write the report to a file that is complete or not there.

    Raises:
        Refused: the file cannot be written.
    """
    with refusing():
        write_whole(path, page_of(found).encode())


def page_of(found: Findings) -> str:
    """The report as HTML; the same bytes from the same findings."""
    first, *others = found.verdict
    stream, setting = found.stream, found.outcomes[0].setting
    title = f"Is it worth it on {', '.join(path.name for path in stream.paths)}?"
    sections = [
        f"<h1>{_text(title)}</h1>",
        f'<p class="of">{_text(words.stream_words(stream))}<br>'
        f"{_text(words.topology_words(setting.topology, stream.num_experts))}"
        f"; plans every {setting.interval:,} steps</p>",
        f'<p class="verdict"><b>{_text(first)}</b>{_text(" ".join(others))}</p>',
        *_pictures(found),
        _section("All figures", _table(found.outcomes)),
        _section("What was assumed", _assumed(found)),
        _section("To get the same again", f"<p><code>{_text(found.command)}</code></p>"),
        f'<p class="note">eplb_triton {__version__}</p>',
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_text(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(sections)
        + "\n</main>\n</body>\n</html>\n"
    )


def _pictures(found: Findings) -> list[str]:
    """The sections with pictures."""
    outcomes, length = found.outcomes, found.stream.length
    base, best = next(o for o in outcomes if o.name == UNPLANNED), best_of(outcomes)
    before, after = base.tallies[EVEN].layers, best.tallies[EVEN].layers
    worst = int(before.argmax())
    gains = before - after
    order = (-gains).argsort(kind="stable")
    half = int((gains[order].cumsum() < gains.sum() / 2).sum()) + 1 if gains.sum() > 0 else len(gains)
    made = [
        (
            "The busiest GPU over time",
            page_pictures.par_over_time(outcomes, best, length),
            "An expert layer takes as long as its busiest GPU. Load of that GPU / mean GPU load, averaged over layers "
            f"and {math.ceil(length / base.tallies[EVEN].buckets):,} steps a point; 1 is perfect balance.",
        ),
        (
            "Slots written over time",
            page_pictures.slots_over_time(outcomes, length),
            "Every slot written is the weights of an expert on the move, over all layers.",
        ),
        (
            f"Loads of GPUs in layer {worst}, the worst without a plan",
            page_pictures.heat_of_layer(base, best, worst, length),
            f"Each GPU's load / the mean, over time. The busiest GPU has {before[worst]:.2f} times the mean before and "
            f"{after[worst]:.2f} after, mean over steps.",
        ),
        (
            "Which layers matter",
            page_pictures.layers(base, best),
            f"Half of the gain comes from {words.counted(half, 'layer')} of {len(gains)}; the first are "
            f"{', '.join(str(layer) for layer in order[:5].tolist())}.",
        ),
    ]
    if found.chosen is not None and len({o.setting.topology for o in found.sweep}) > 1:
        made.append(
            (
                "Redundancy against gain",
                page_pictures.redundancy(found.sweep, found.chosen, found.stream.num_experts),
                _where_it_flattens(found.sweep, found.chosen),
            )
        )
    sections = [_section(title, f'<figure class="wide">{svg}</figure>', caption) for title, svg, caption in made]
    if len(made) == 4:
        text = "One number of replicas was replayed. Repeat --replicas to see where more of them stop to gain."
        sections.append(_section("Redundancy against gain", f"<p>{text}</p>"))
    return sections


def _where_it_flattens(sweep: list[Outcome], chosen: Outcome) -> str:
    """The caption of the curve of redundancy."""
    text = f"Chosen: the fewest replicas whose modelled time, moves included, is within {percent(NOTHING)} of the least"
    most = max(outcome.setting.topology.num_replicas for outcome in sweep)
    if chosen.setting.topology.num_replicas == most:
        return f"{text}: the most that were tried. More may save more."
    return f"{text}. Beyond it the time no longer falls."


def _section(title: str, body: str, caption: str = "") -> str:
    note = f'\n<p class="note">{_text(caption)}</p>' if caption else ""
    return f"<section>\n<h2>{_text(title)}</h2>\n{body}{note}\n</section>"


def _table(outcomes: list[Outcome]) -> str:
    """A row for each deployment and split."""
    base = next(outcome for outcome in outcomes if outcome.name == UNPLANNED)
    headings = "planner|tokens split|PAR|p99|saved|seconds|slots a layer<br>and plan|GB<br>moved|pays back<br>after"
    rows = ["<tr>" + "".join(f"<th>{heading}</th>" for heading in headings.split("|")) + "</tr>"]
    body = []
    for outcome in outcomes:
        for split, tally in outcome.tallies.items():
            first = split == EVEN
            back = "" if outcome.name == FORESIGHT else steps(outcome.paid_back(base))
            moves = [f"{outcome.slots_a_plan:.1f}", gigabytes(outcome), back] if first and outcome.written else [""] * 3
            cells = [
                _text(label(outcome)) if first else "",
                split,
                f"{tally.mean:.3f}",
                f"{tally.percentile(0.99):.3f}",
                "" if outcome is base and first else percent(outcome.saved(base, split)),
                amount(outcome.seconds(split)),
                *moves,
            ]
            body.append(f"<tr{' class=first' * first}>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    note = (
        "PAR: load of the busiest GPU / mean GPU load of a step and layer; 99 of 100 have no more than p99. Seconds: "
        "layer time x PAR, summed over steps and layers, + slots written x slot / bandwidth. Saved: of the seconds "
        "without a plan. Pays back: after so many steps the moves of one plan have paid."
    )
    table = (
        f'<div class="wide"><table><thead>{"".join(rows)}</thead><tbody>\n'
        + "\n".join(body)
        + "\n</tbody></table></div>"
    )
    return f'{table}\n<p class="note">{note}</p>'


def _assumed(found: Findings) -> str:
    parts = [
        f"<dt>{_text(a.name)}: {_text(a.shown)}{' (given)' if a.given else ''}</dt><dd>{_text(a.source)}</dd>"
        for a in found.assumptions
    ]
    notes = "".join(f"<dt>of the recording</dt><dd>{_text(note)}</dd>" for note in found.stream.notes)
    return f"<dl>{''.join(parts)}{notes}</dl>"


def _text(text: str) -> str:
    """As text of a page: nothing in a file's name is markup."""
    return escape(printable(text))
