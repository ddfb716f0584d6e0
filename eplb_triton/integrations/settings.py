"""What the environment asks of an adapter, read once in each process."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from eplb_triton.backends import BACKENDS
from eplb_triton.policy import DEFAULT_REPLAN_POLICY, Policy, named_policies, resolve_policy

PREFIX = "EPLB_TRITON_"
Strategy = Literal["auto", "hierarchical", "global"]


@dataclass(frozen=True)
class Settings:
    """What an adapter does; the same on every rank, as its environment is.

    Args:
        policy: plans; one with `replan` moves away from the placement in force what pays.
        backend: as in `Planner`.
        agree: whether ranks compare plans before weights move.
        strategy: `auto`: as the framework asks; `global`: groups and nodes are ignored; `hierarchical`: as the
            framework's counts of groups and nodes say, where they allow it.
        price: what a written slot must save, a share of the mean GPU load; None: the default.
        moves: most slots that a layer may write; None: no limit.
        shadow: plan and log, move nothing.
        stop_file: its presence on any rank gives planning back to the framework, on all ranks.
        split: whether dispatch is weighed by the last loads (vLLM).
    """

    policy: Policy
    backend: str = "auto"
    agree: bool = True
    strategy: Strategy = "auto"
    price: float | None = None
    moves: int | None = None
    shadow: bool = False
    stop_file: Path | None = None
    split: bool = False

    def stop_asked(self) -> bool:
        """Whether the stop file is there."""
        return self.stop_file is not None and self.stop_file.exists()


def enabled(framework: str, environment: Mapping[str, str] = os.environ) -> bool:
    """Whether the environment asks for the adapter of `framework`, `vllm` or `sglang`.

    Raises:
        ValueError: the variable is neither 0 nor 1.
    """
    return _flag(environment, framework.upper(), default=False)


def read_settings(environment: Mapping[str, str] = os.environ) -> Settings:
    """The settings that an environment holds.

    Raises:
        ValueError: names the first variable that cannot be used, its value, and what would do.
    """
    name = environment.get(f"{PREFIX}POLICY") or DEFAULT_REPLAN_POLICY
    if name not in named_policies():
        raise ValueError(f"{PREFIX}POLICY={name!r} is unknown, must be one of {', '.join(named_policies())}")
    policy, stop = resolve_policy(name), environment.get(f"{PREFIX}STOP_FILE")
    found = Settings(
        policy=policy,
        backend=_choice(environment, "BACKEND", BACKENDS),
        agree=_flag(environment, "AGREE", default=True),
        strategy=_choice(environment, "STRATEGY", get_args(Strategy)),  # type: ignore[arg-type]
        price=_price(environment),
        moves=_moves(environment),
        shadow=_flag(environment, "SHADOW", default=False),
        stop_file=Path(stop) if stop else None,
        split=_flag(environment, "SPLIT", default=False),
    )
    for variable, value in (("PRICE", found.price), ("MOVES", found.moves)):
        if value is not None and policy.replan is None:
            raise ValueError(f"{PREFIX}{variable}={value} is for {PREFIX}POLICY=steady; {name!r} does not replan")
    if found.stop_file is not None and not found.agree:
        raise ValueError(f"{PREFIX}STOP_FILE={stop!r} needs {PREFIX}AGREE=1: ranks must stop together")
    return found


def _choice(environment: Mapping[str, str], name: str, choices: tuple[str, ...]) -> str:
    value = environment.get(PREFIX + name) or choices[0]
    if value not in choices:
        raise ValueError(f"{PREFIX}{name}={value!r} is unknown, must be one of {', '.join(choices)}")
    return value


def _flag(environment: Mapping[str, str], name: str, *, default: bool) -> bool:
    value = environment.get(PREFIX + name) or ("1" if default else "0")
    if value not in ("0", "1"):
        raise ValueError(f"{PREFIX}{name}={value!r} must be 0 or 1")
    return value == "1"


def _price(environment: Mapping[str, str]) -> float | None:
    value = environment.get(f"{PREFIX}PRICE")
    if not value:
        return None
    try:
        price = float(value)
    except ValueError:
        price = math.nan
    if not 0 <= price < math.inf:
        raise ValueError(f"{PREFIX}PRICE={value!r} must be a number of at least 0, a share of the mean GPU load")
    return price


def _moves(environment: Mapping[str, str]) -> int | None:
    value = environment.get(f"{PREFIX}MOVES")
    if not value:
        return None
    if not (value.isascii() and value.isdigit()):
        raise ValueError(f"{PREFIX}MOVES={value!r} must be an integer of at least 0, slots a layer")
    return int(value)
