"""Markdown tables of a run over the cases, from its JSON alone."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from bench.planners.ours import PUBLISHED, SOURCE
from bench.planners.peers import VLLM
from bench.quality import CAUSES
from bench.style import UNPLANNED

Result = dict[str, Any]


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; every column but the first is right-aligned."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def milliseconds(value: float) -> str:
    """Three significant digits, never in scientific notation."""
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


def percent(values: Sequence[float]) -> str:
    """The mean, in percent."""
    return f"{100 * statistics.fmean(values):.2f}" if values else "–"


def machine(result: Result) -> str:
    """The machine, the versions and the commit, in one paragraph."""
    at = result["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in at["versions"].items() if version)
    peers = ", ".join(f"{name} {peer['version']}" for name, peer in at["peers"].items()) or "none fetched"
    gpu = f", {at['gpu']}" if at["gpu"] else ", no GPU"
    return (
        f"{at['cpu']}, {at['cores']} cores{gpu}, {at['memory_gib']:.0f} GiB, {at['system']}. "
        f"Python {at['python']}, {versions}; PyTorch on {at['torch_threads']} threads. Peers: {peers}. "
        f"Load average before the run {at['load_average']:.2f}."
    )


def source(result: Result) -> str:
    """Where a table comes from: file, commit, command."""
    at = result["environment"]
    commit = f"{at['commit'][:12]}{' with changes' if at['dirty'] else ''}" if at["commit"] else "no commit"
    return f"*{at['date'][:10]}, `{result['path']}`, commit {commit}, `{at['command']}`.*"


def _shape(case: Result) -> str:
    topology = case["topology"]
    counts = f"{case['layers']} × {case['experts']} → {topology['num_replicas']}, {topology['num_gpus']} GPUs"
    nodes = topology["num_nodes"]
    return f"{counts}, {nodes} nodes" if nodes > 1 and topology["num_groups"] % nodes == 0 else counts


def _published(result: Result) -> list[str]:
    """Planners of the published algorithm, ours first, in the order of the run."""
    about = result["planners"]
    names = [name for name in about if about[name]["algorithm"] == PUBLISHED]
    return sorted(names, key=lambda name: about[name]["source"] != SOURCE)


def headline(result: Result) -> str:
    """Median times of the published algorithm, and how the fastest of ours compares with every peer."""
    names = _published(result)
    about = result["planners"]
    if not result["cases"] or not names:
        return ""
    rows = []
    for row in result["cases"]:
        found = row["results"]
        mine = [name for name in names if name in found and about[name]["source"] == SOURCE]
        rivals = [name for name in found if about[name]["source"] != SOURCE]
        fastest = min(mine, key=lambda name: found[name]["median_ms"], default=None)
        versus = {VLLM: "–", "fastest peer": "–"}
        if fastest:
            if "times_as_fast" in found[fastest]:
                versus[VLLM] = f"**{found[fastest]['times_as_fast']:.1f}×**"
            if rivals:
                best = min(found[name]["median_ms"] for name in rivals)
                versus["fastest peer"] = f"{best / found[fastest]['median_ms']:.1f}×"
        medians = [milliseconds(found[name]["median_ms"]) if name in found else "–" for name in names]
        rows.append([f"{row['case']['name']} ({_shape(row['case'])})", *medians, *versus.values()])
    header = ["case (L × E → P)", *(f"`{name}` ms" for name in names), "fastest of ours: vs vLLM", "vs fastest peer"]
    note = (
        "Median of one call. Versus vLLM: median over rounds of vLLM's time / ours in the same round; "
        "versus the fastest peer: of the medians, whatever that peer's algorithm."
    )
    return f"{table(header, rows)}\n\n{note}"


def times(result: Result) -> str:
    """Every planner on every case: median, percentiles, rounds, ratio to vLLM."""
    rows = []
    for row in result["cases"]:
        for name, found in row["results"].items():
            ratio = f"{found['times_as_fast']:.2f}×" if "times_as_fast" in found else "–"
            figures = [milliseconds(found[key]) for key in ("median_ms", "p10_ms", "p90_ms")]
            rows.append([row["case"]["name"], f"`{name}`", *figures, str(found["rounds"]), ratio])
    header = ["case", "planner", "median ms", "p10", "p90", "rounds", "times as fast as vLLM"]
    return table(header, rows) if rows else ""


_SAME_MAPS = ["case", "ties", "planner", "layers with equal counts", "with equal maps", "the others, by cause"]


def same_maps(result: Result) -> str:
    """Layers in which planners of the published algorithm have vLLM's counts and maps, case by case."""
    rows = [
        [row["case"]["name"], "no" if row["case"]["tie_free"] else "yes", f"`{name}`", *layers(found)]
        for row in result["cases"]
        for name, found in row["same_maps"].items()
    ]
    return f"{table(_SAME_MAPS, rows)}\n\n{_same_maps_note()}" if rows else ""


def same_maps_in_all(result: Result) -> str:
    """The same over all cases without ties, and over all with."""
    sums: dict[tuple[str, bool], Result] = {}
    for row in result["cases"]:
        for name, found in row["same_maps"].items():
            empty = {"layers": 0, "equal_counts": 0, "equal_maps": 0, "causes": {}}
            total = sums.setdefault((name, row["case"]["tie_free"]), empty)
            for key in ("layers", "equal_counts", "equal_maps"):
                total[key] += found[key]
            for cause, count in found["causes"].items():
                total["causes"][cause] = total["causes"].get(cause, 0) + count
    rows = [
        [f"all {'without' if tie_free else 'with'} ties", "no" if tie_free else "yes", f"`{name}`", *layers(total)]
        for (name, tie_free), total in sums.items()
    ]
    return f"{table(_SAME_MAPS, rows)}\n\n{_same_maps_note()}" if rows else ""


def _same_maps_note() -> str:
    return (
        "Equal maps: equal counts, and on every node the sorted list over its GPUs of the sorted experts on them is "
        "the same. vLLM divides and adds in float64, DeepSeek's published code and ours in float32; `vllm in "
        "float32` is vLLM's planner held in float32 by three edits (`bench/planners/peers.py`), on the first window. "
        f"{causes_note()}"
    )


def layers(found: Result) -> list[str]:
    """Cells: layers with equal counts, with equal maps, and the causes of the others."""
    why = ", ".join(f"{cause} {count}" for cause, count in found["causes"].items())
    return [f"{found['equal_counts']} / {found['layers']}", f"{found['equal_maps']} / {found['layers']}", why or "–"]


def causes_note() -> str:
    """What the causes of a difference mean."""
    listed = "\n".join(f"* {name}: {meaning}." for name, meaning in CAUSES.items())
    return f"A layer that differs is counted under the first cause that holds for it:\n\n{listed}"


def quality(result: Result) -> str:
    """Balancedness, movement and duplicates, one line a distinct plan: a policy, or a peer of another algorithm."""
    rows = []
    for row in result["cases"]:
        seen = set()
        for name, found in {UNPLANNED: row["unplanned"], **row["results"]}.items():
            algorithm = result["planners"].get(name, {}).get("algorithm", name)
            figures = [f"{statistics.fmean(found[key]):.4f}" for key in ("balancedness", "next_balancedness")]
            shares = [percent(found[key]) for key in ("gap", "moved_slots", "fetched", "duplicates")]
            line = (algorithm, *figures, *shares)
            if line not in seen:  # backends of one policy have one line
                seen.add(line)
                label = algorithm if result["planners"].get(name, {}).get("source") == SOURCE else name
                rows.append([row["case"]["name"], f"`{label}`", *figures, *shares])
    header = ["case", "planner", "same window", "next window", "gap %", "slots moved %", "fetched %", "duplicates %"]
    note = (
        f"{result['balancedness'][0].upper()}{result['balancedness'][1:]}; mean over the windows. "
        "Gap: how far the heaviest GPUs are above the mean (1 / balancedness - 1). Slots moved, and experts that a GPU "
        "must fetch: from one window's plan to the next one's, share of all slots. Duplicates: replicas on a GPU with "
        "another of their expert."
    )
    return f"{table(header, rows)}\n\n{note}" if rows else ""


def gpu(result: Result) -> str:
    """Graph replays beside an empty kernel, warm and cold, and host time."""
    names = ("warm", "warm_floor", "cold", "cold_floor", "host")
    rows = [
        [row["case"]["name"], f"`{found['planner']}`", *(f"{found[name]:.1f}" for name in names)]
        for row in result["cases"]
        for found in row.get("gpu", [])
    ]
    header = ["case", "policy", "warm us", "an empty kernel", "cold us", "an empty kernel", "host us"]
    note = "Replays of a CUDA graph, per plan; cold: the L2 cache was overwritten. Host: until an eager call returns."
    return f"{table(header, rows)}\n\n{note}" if rows else ""


def skipped(result: Result) -> str:
    """Who took no part where, and why; planners of one reason share a line."""
    lines: dict[tuple[str, str], list[str]] = {}
    for skip in result["skipped"]:
        lines.setdefault((skip["case"] or "everywhere", skip["reason"]), []).append(f"`{skip['planner']}`")
    return "\n".join(f"* {', '.join(names)}; {case}: {reason}" for (case, reason), names in lines.items())


def with_skips(result: Result, text: str) -> str:
    """`text`, and below it who took no part."""
    lines = skipped(result)
    return f"{text}\n\nTook no part:\n\n{lines}" if lines else text
