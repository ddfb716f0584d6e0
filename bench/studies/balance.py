"""`make bench-balance`: same-window gap to the lower bound of every policy, and tiny instances beside their optimum.

A plan is made from a window's loads and judged on the same loads: what the planner leaves, not what drift does. Needs
SciPy, for the bound with two slots a GPU and for the optimum of the tiny instances.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import click
import torch
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from torch import Tensor

from bench import results, style, tables
from bench.machine import environment
from bench.planners.ours import PUBLISHED, Skip
from bench.progress import Steps
from bench.studies.exact import optimum
from eplb_triton import EFFORTS, Topology, lower_bound, plan
from eplb_triton.formats import FormatError, read_loads
from eplb_triton.policy import Policy, named_policies
from eplb_triton.synthetic import lognormal_loads

ROUNDING = 1e-7
"""A layer is worse than another from here on: a unit in the last place of a float32 share."""
SMALLEST_GAP = 1e-6
"""A smaller one is drawn here: a logarithmic axis has no zero."""
TINY = [
    (6, Topology(num_replicas=8, num_gpus=4)),
    (8, Topology(num_replicas=12, num_gpus=4)),
    (8, Topology(num_replicas=12, num_gpus=4, num_groups=4, num_nodes=2)),
    (12, Topology(num_replicas=16, num_gpus=8, num_groups=4, num_nodes=2)),
]


class Case(NamedTuple):
    name: str
    weight: Tensor  # [L, E]
    topology: Topology
    promised: float  # mean gap of `balanced`, at most


def drawn(layers: int, seed: int) -> Iterator[Case]:
    """Log-normal loads from a seed."""
    for name, experts, topology, sigma, promised in (
        ("V3, 8 groups on 4 nodes", 256, Topology(num_replicas=288, num_gpus=32, num_groups=8, num_nodes=4), 0.8, 5e-4),
        ("V3, global", 256, Topology(num_replicas=288, num_gpus=32), 0.8, 5e-4),
        ("V3, 144 GPUs of 2 slots", 256, Topology(num_replicas=288, num_gpus=144), 0.8, 25e-4),
        ("384 experts, 64 GPUs", 384, Topology(num_replicas=448, num_gpus=64), 0.8, 5e-4),
        ("512 -> 1024, 128 GPUs", 512, Topology(num_replicas=1024, num_gpus=128), 1.2, 2e-4),
    ):
        yield Case(name, lognormal_loads(layers, experts, sigma=sigma, seed=seed), topology, promised)


def recorded(folder: Path) -> Iterator[Case]:
    """Expert counts of whole routing traces of 64 experts: .npz of `topk_ids` [tokens, L, k]."""
    for path in sorted(folder.glob("*.npz")):
        recording = read_loads(path, kind="topk_ids", num_experts=64)
        weight = recording.loads(0, recording.length).to(torch.float32)
        yield Case(f"{path.stem}, global", weight, Topology(num_replicas=80, num_gpus=16), 15e-4)
        yield Case(
            f"{path.stem}, 8 groups on 2 nodes",
            weight,
            Topology(num_replicas=80, num_gpus=16, num_groups=8, num_nodes=2),
            15e-4,
        )


def gaps(case: Case, bound: Tensor, policy: Policy) -> tuple[Tensor, float]:
    """Gap to the bound [L], and the seconds that the faster of two plans takes."""
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        placement = plan(case.weight, case.topology, policy=policy)
        seconds.append(time.perf_counter() - start)
    return placement.gpu_loads(case.weight).amax(1) / bound - 1, min(seconds)


def judge(case: Case, policies: Mapping[str, Policy], begin: Callable[[str], None]) -> dict[str, Any]:
    """Mean and worst gap, layers worse than the published algorithm's, and time of every policy on one case."""
    begin(f"{case.name}: bound")
    bound = lower_bound(case.weight, case.topology)
    found = {}
    for name, policy in policies.items():
        begin(f"{case.name}: {name}")
        found[name] = gaps(case, bound, policy)
    layers, experts = case.weight.shape
    published = found[PUBLISHED][0]
    return {
        "case": {"name": case.name, "layers": layers, "experts": experts, "topology": asdict(case.topology)},
        "promised": case.promised,
        "policies": {
            name: {
                "mean_gap": float(gap.mean()),
                "worst_gap": float(gap.amax()),
                f"layers_worse_than_{PUBLISHED}": int((gap > published + ROUNDING).sum()),
                "ms": 1e3 * seconds,
            }
            for name, (gap, seconds) in found.items()
        },
    }


def broken(row: Mapping[str, Any]) -> list[str]:
    """What `balanced` promised on a case and did not keep."""
    found, promised = row["policies"]["balanced"], row["promised"]
    worse = found[f"layers_worse_than_{PUBLISHED}"]
    lines = []
    if not found["mean_gap"] <= promised:
        lines.append(f"{row['case']['name']}: mean gap {found['mean_gap']:.4%}, promised {promised:.2%}")
    if worse:
        lines.append(f"{row['case']['name']}: {worse} layers worse than {PUBLISHED}'s, promised none")
    return lines


def tiny(instances: int, seed: int, begin: Callable[[str], None]) -> dict[str, Any]:
    """Mean distance from the exact optimum over `instances` of each of `TINY`."""
    over: dict[str, list[float]] = {"bound": [], "balanced": [], PUBLISHED: []}
    for experts, topology in TINY:
        for at in range(instances):
            begin(f"optimum of {experts} experts on {topology.num_gpus} GPUs, {at + 1} of {instances}")
            weight = lognormal_loads(1, experts, seed=seed + at).double()
            best = optimum(weight[0].numpy(), topology)
            if best is None:
                continue
            over["bound"].append(float(lower_bound(weight, topology)) / best - 1)
            for policy in ("balanced", PUBLISHED):
                peak = plan(weight, topology, policy=policy).gpu_loads(weight).amax()
                over[policy].append(float(peak) / best - 1)
    return {
        "shapes": [{"experts": experts, "topology": asdict(topology)} for experts, topology in TINY],
        "instances": instances * len(TINY),
        "solved": len(over["bound"]),
        "over_optimum": {name: statistics.fmean(values) for name, values in over.items() if values},
    }


def table(result: dict[str, Any]) -> str:
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
    return tables.with_skips(result, f"{tables.table(header, rows)}\n\n{note}")


def tiny_table(result: dict[str, Any]) -> str:
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
    return f"{tables.table(['', 'from the optimum'], rows)}\n\n{note}"


def picture(result: dict[str, Any], path: Path) -> None:
    """Mean gap to the lower bound of every policy, a line a case, and what the default policy promises."""
    at, cases, efforts = result["environment"], result["cases"], result["efforts"]
    others = ("other published policies", "#E69F00", "o", 5)
    looks = {  # from the bottom to the top: where points meet, each leaves something of the one below in sight
        PUBLISHED: (PUBLISHED, "#D55E00", "s", 9),
        "": others,
        efforts["low"]: ("effort low", "#56B4E9", "^", 12),
        efforts["high"]: ("effort high", "#009E73", "D", 10),
        efforts["medium"]: (efforts["medium"], "#0072B2", "o", 9),
    }
    title = "How far the heaviest GPU is above what no placement can beat"
    made = style.figure(11, 2.0 + 0.42 * len(cases), title, f"{at['cpu']}, {at['cores']} cores, {at['date'][:10]}")
    axes = made.add_subplot()
    points: dict[tuple[str, str, str, int], list[tuple[float, int]]] = {kind: [] for kind in looks.values()}
    for height, row in enumerate(cases):
        gaps = {name: max(found["mean_gap"], SMALLEST_GAP) for name, found in row["policies"].items()}
        axes.plot([min(gaps.values()), max(gaps.values())], [height, height], color=style.PLAIN, alpha=0.3, linewidth=1)
        for name, mean in gaps.items():
            points[looks.get(name, others)].append((mean, height))
    for (label, colour, marker, size), found in points.items():
        x, y = zip(*found, strict=True)
        axes.plot(x, y, marker, color=colour, markersize=size, markeredgecolor="white", label=label)
    promised = [row["promised"] for row in cases]
    label = f"promised for {efforts['medium']}"
    axes.plot(promised, range(len(cases)), "|", color=style.PLAIN, markersize=16, markeredgewidth=1.6, label=label)
    axes.set_yticks(range(len(cases)), [row["case"]["name"] for row in cases])
    axes.set_ylim(len(cases) - 0.5, -0.5)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(10))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("gap to the lower bound, mean over the layers (less is better)")
    style.tidy(axes)
    made.legend(loc="outside lower center", ncols=3, frameon=False)
    style.save(made, path)


@click.command()
@click.option(
    "--traces", type=click.Path(path_type=Path, exists=True, file_okay=False), envvar="EPLB_TRACES", help="recordings"
)
@click.option("--layers", type=click.IntRange(1), default=58, show_default=True, help="of the drawn loads")
@click.option("--seed", default=0, show_default=True)
@click.option(
    "--tiny",
    "instances",
    type=click.IntRange(0),
    default=3,
    show_default=True,
    help="instances of each tiny shape solved exactly",
)
@click.option("--out", type=click.Path(path_type=Path), help="folder of the results")
def main(traces: Path | None, layers: int, seed: int, instances: int, out: Path | None) -> None:
    """Judge every policy for one window by the lower bound; exit 1 if `balanced` breaks a promise."""
    found = environment("bench.studies.balance")
    try:
        traced = list(recorded(traces)) if traces else []
    except FormatError as error:
        raise click.UsageError(str(error)) from error
    skips = []
    if not traced:
        why = "no .npz in the" if traces else "no"
        reason = f"{why} folder of routing traces: give --traces or set EPLB_TRACES"
        skips.append(Skip("every policy", reason, "recorded"))
    cases = [*drawn(layers, seed), *traced]
    policies = {name: policy for name, policy in named_policies().items() if not policy.replan}  # those for one window
    with Steps(len(cases) * (1 + len(policies)) + len(TINY) * instances) as steps:
        rows = [judge(case, policies, steps.begin) for case in cases]
        exact = tiny(instances, seed, steps.begin)
    lines = [line for row in rows for line in broken(row)]
    body = {
        "seed": seed,
        "efforts": {effort: policy.name for effort, policy in EFFORTS.items()},
        "skipped": [asdict(skip) for skip in skips],
        "cases": rows,
        "tiny": exact,
        "broken": lines,
    }
    results.publish("balance", found, body, out)
    click.echo("\n".join(["A promise is broken.", *lines]) if lines else "All promises kept.")
    raise SystemExit(bool(lines))


if __name__ == "__main__":
    main()
