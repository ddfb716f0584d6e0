"""The progress bar of a long run, on standard error."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


class Steps:
    """A bar over `total` steps, to be used in a `with` statement."""

    def __init__(self, total: int) -> None:
        columns = (TextColumn("{task.description:<60}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._progress = Progress(*columns, console=Console(stderr=True), transient=True)
        self._task = self._progress.add_task("", total=total)
        self._begun = 0
        self._name = ""

    def __enter__(self) -> Steps:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._progress.stop()

    def begin(self, name: str) -> None:
        """The step before is over; the next one is `name`."""
        self._progress.update(self._task, completed=self._begun, description=name)
        self._begun += 1
        self._name = name

    def detail(self, what: str) -> None:
        """What the step is at."""
        self._progress.update(self._task, description=f"{self._name}: {what}")
