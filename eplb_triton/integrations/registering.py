"""Registering with a framework: what both adapters do before they change anything. Nothing here raises."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from eplb_triton.integrations.settings import PREFIX, Settings, enabled, read_settings

logger = logging.getLogger(__name__)

WRITTEN_FOR = {"vllm": "0.33.0", "sglang": "0.5.23"}
"""Versions whose interfaces the adapters know."""


def asked_settings(framework: str) -> Settings | None:
    """The settings, or None where the adapter is off or a variable cannot be used: decided from its value alone."""
    try:
        if not enabled(framework):
            logger.debug("%s: off; %s%s=1 enables it", framework, PREFIX, framework.upper())
            return None
        return read_settings()
    except ValueError as error:
        logger.error("%s: %s; the framework's own planner plans", framework, error)
        return None


def log_as(framework: str) -> None:
    """Let our lines go where the framework's go, now and after it configures its logger: unless ours has a handler."""
    ours = logging.getLogger("eplb_triton")
    if not ours.handlers:
        ours.parent = logging.getLogger(framework)  # its handlers and its level are asked for at each line


def tell_version(framework: str) -> None:
    """Say so where the framework is not of the version that was tested."""
    found = installed(framework)
    if found != WRITTEN_FOR[framework]:
        logger.info("%s: version %s; written for %s", framework, found or "unknown", WRITTEN_FOR[framework])


def installed(package: str) -> str | None:
    """The version of an installed package, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def takes(function: Any, names: tuple[str, ...]) -> bool:
    """Whether a function takes arguments of exactly these names, in this order."""
    try:
        return tuple(inspect.signature(function).parameters) == names
    except (TypeError, ValueError):
        return False


def refuse_unknown(framework: str, what: str) -> None:
    """The one warning of an interface that is not the one known."""
    logger.warning(
        "%s: %s is not as in version %s; its own planner plans. A newer eplb_triton may know it",
        framework,
        what,
        WRITTEN_FOR[framework],
    )


def guarded(framework: str, register: Callable[[Settings], bool]) -> bool:
    """Whether a registration took place; one that fails is a log line, for one that raises ends the engine."""
    try:
        settings = asked_settings(framework)
        if settings is not None:
            log_as(framework)
            return register(settings)
    except Exception:
        logger.exception("%s: not registered; its own planner plans", framework)
    return False
