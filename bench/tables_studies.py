"""Markdown tables of the studies: scale, next window, conformance, balance, from their JSON alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from bench.planners.ours import PUBLISHED
from bench.tables import Result, causes_note, layers, milliseconds, skipped, table


def _with_skips(result: Result, text: str) -> str:
    lines = skipped(result)
    return f"{text}\n\nTook no part:\n\n{lines}" if lines else text


STRAIGHT = ("L", "P/E")
"""Axes along which the same work is done more often."""


def _straight(values: Sequence[float], medians: Sequence[float]) -> str:
    times = np.asarray(medians)
    slope, constant = np.polyfit(values, times, 1, w=1 / times)
    error = np.abs((constant + slope * np.asarray(values)) / times - 1).max()
    return f"{milliseconds(constant)} + {milliseconds(slope)} ms, within {error:.0%}"


def scale(result: Result) -> str:
    """Fitted exponents, and where each planner leaves its straight line."""
    rows = []
    for axis, sweep in result["axes"].items():
        for name, curve in sweep["curves"].items():
            values = curve["values"]
            ends = [f"{milliseconds(curve['median_ms'][at])} ms" for at in (0, -1)]
            off = ", ".join(f"{value:g} ({ratio:.2g}×)" for value, ratio in curve["off_line"]) or "nowhere"
            span = f"{values[0]:g} to {values[-1]:g}"
            straight = _straight(values, curve["median_ms"]) if axis in STRAIGHT else "–"
            rows.append([axis, f"`{name}`", span, " to ".join(ends), f"{curve['exponent']:.2f}", off, straight])
    header = ["axis", "planner", "range", "time", "exponent", "off it at (measured / fitted)", "constant + slope"]
    note = (
        "Exponent: of time ∝ axis^exponent, least squares on log axes over the upper half of the points. "
        f"Off it: by more than {result['bend']:g} times either way. "
        "Constant + slope: time = constant + slope · axis, least squares of the relative error over all points, "
        "and the largest error."
    )
    return _with_skips(result, f"{table(header, rows)}\n\n{note}")


def next_window(result: Result) -> str:
    """Balancedness on the window that was planned, on the one after it, and what replanning moves."""
    rows = []
    for row in result["rows"]:
        for kind in ("within", "across"):
            if kind not in row:
                continue
            found = row[kind]
            means = [f"{found[key]['mean']:.4f}" for key in ("planned", "following", "replanned")]
            fetched = f"{100 * found['fetched']['mean']:.1f}"
            kinds = {"within": "same domain", "across": "change of domain"}
            rows.append([f"`{row['planner']}`", str(row["tokens"]), kinds[kind], str(found["pairs"]), *means, fetched])
    header = [
        "planner",
        "tokens",
        "next window",
        "pairs",
        "on its window",
        "on the next",
        "next, replanned",
        "fetched %",
    ]
    topology, model = result["topology"], result["model"]
    note = (
        f"{result['balancedness'][0].upper()}{result['balancedness'][1:]}; means over the pairs of windows. "
        f"Traces {', '.join(result['domains'])}: {model['layers']} layers, {model['experts']} experts on "
        f"{topology['num_replicas']} replicas, {topology['num_gpus']} GPUs. Fetched: experts that a GPU must fetch to "
        "come from the plan of the one window to the plan of the next, share of all slots."
    )
    return _with_skips(result, f"{table(header, rows)}\n\n{note}")


def golden(result: Result) -> str:
    """Layers in which our backends give the golden plans, and the reference's on random cases."""
    rows = []
    for file, found in result["golden"].items():
        for name, row in found.items():
            rows.append([f"golden, {file}", f"`{name}`", f"{row['equal']} / {row['layers']}"])
    for name, row in result["backends"].items():
        rows.append([f"{result['random']} random, as the reference", f"`{name}`", f"{row['equal']} / {row['layers']}"])
    note = (
        "`placements`: counts and, on every node, the experts of its GPUs; `exact` and random: slot by slot. "
        "Layers without a plan in a golden file are not counted."
    )
    return f"{table(['plans', 'planner', 'equal layers'], rows)}\n\n{note}"


def peers(result: Result) -> str:
    """How peers, and our reference, compare with DeepSeek's published code, and on what they differ."""
    if "peers" not in result:
        return ""
    rows = []
    for kind, found in result["peers"].items():
        for name, row in found.items():
            rows.append([kind, f"`{name}`", *layers(row), str(row["refused"])])
    header = ["loads", "planner", "layers with its counts", "with its maps", "layers that differ, by cause", "refused"]
    note = (
        "Compared with SGLang's copy of DeepSeek's code. `sglang-vec` is a variant of the algorithm: it differs "
        f"whatever the loads. {causes_note()}"
    )
    return _with_skips(result, f"{table(header, rows)}\n\n{note}")


def vector_units(result: Result) -> str:
    """Layers whose map changes with the vector units NumPy may use."""
    if "vector_units" not in result:
        return ""
    found = result["vector_units"]
    names: Sequence[str] = list(found["layers"])
    rows = []
    for setting, differing in found["differing_layers"].items():
        disabled = found["disabled"][setting]
        label = f'{setting} (`NPY_DISABLE_CPU_FEATURES="{disabled}"`)' if disabled else setting
        rows.append([label, *(f"{differing[name]} / {found['layers'][name]}" for name in names)])
    note = (
        f"Layers whose map is another one than on this CPU as it is; NumPy {found['numpy']}, the same loads, "
        "one process a setting."
    )
    return f"{table(['NumPy may use', *names], rows)}\n\n{note}"


def balance(result: Result) -> str:
    """Mean gap to the lower bound: the published algorithm, the best of its other improvements, and our efforts."""
    efforts = result["efforts"]
    rows = []
    for row in result["cases"]:
        gaps = {name: found["mean_gap"] for name, found in row["policies"].items()}
        others = [gap for name, gap in gaps.items() if name != PUBLISHED and name not in efforts.values()]
        published, low, medium, high = (gaps[name] for name in (PUBLISHED, *efforts.values()))
        figures = [f"{gap:.3%}" for gap in (published, min(others), low)]
        worse = row["policies"][efforts["medium"]][f"layers_worse_than_{PUBLISHED}"]
        kept = [f"{row['promised']:.2%}", f"{worse} / {row['case']['layers']}"]
        rows.append([row["case"]["name"], *figures, f"**{medium:.3%}**", f"{high:.3%}", *kept])
    header = [
        "case",
        f"`{PUBLISHED}`",
        "best other published",
        "effort low",
        f"**`{efforts['medium']}`**",
        "effort high",
        "promised",
        f"layers worse than `{PUBLISHED}`",
    ]
    note = (
        "How far the heaviest GPU is above the load that no placement can beat, plan and judgement on the same loads: "
        f"mean over the layers. Promised, and layers worse: of `{efforts['medium']}`."
    )
    return _with_skips(result, f"{table(header, rows)}\n\n{note}")


def tiny(result: Result) -> str:
    """Mean distance from the exact optimum, where a solver finds that."""
    found = result["tiny"]
    if not found["solved"]:
        return ""
    rows = [
        ["lower bound" if name == "bound" else f"`{name}`", f"{distance:+.2%}"]
        for name, distance in found["over_optimum"].items()
    ]
    sizes = {
        "experts": [shape["experts"] for shape in found["shapes"]],
        "GPUs": [shape["topology"]["num_gpus"] for shape in found["shapes"]],
    }
    span = ", ".join(f"{min(counts)} to {max(counts)} {name}" for name, counts in sizes.items())
    note = f"Mean over the {found['solved']} of {found['instances']} instances that the solver finished: {span}."
    return f"{table(['', 'from the optimum'], rows)}\n\n{note}"
