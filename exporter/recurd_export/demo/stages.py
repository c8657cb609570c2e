"""Progress on standard error: bars on a terminal, a plain line a stage elsewhere."""

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn


class Stages:
    """Begins stages one after another and shows how far the present one is. Owns the bars. A context manager."""

    def __init__(self, console: Console) -> None:
        self._console = console
        columns = (SpinnerColumn(finished_text="✓"), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
        self._bars = Progress(*columns, console=console) if console.is_terminal else None
        self._task: TaskID | None = None

    def __enter__(self) -> Self:
        if self._bars is not None:
            self._bars.start()
        return self

    def __exit__(
        self, type: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bars is not None:
            if error is None:
                self._finish(self._bars)
            self._bars.stop()

    def begin(self, what: str, total: int | None = None) -> None:
        """The next stage, of ``total`` parts (``None``: nobody knows)."""
        if self._bars is None:
            self._console.print(f"recurd demo: {what}", highlight=False, soft_wrap=True, markup=False)
            return
        self._finish(self._bars)
        self._task = self._bars.add_task(what, total=total)

    def advance(self, parts: int = 1) -> None:
        """So much more of the stage is done. May be called by any thread."""
        if self._bars is not None and self._task is not None:
            self._bars.advance(self._task, parts)

    def _finish(self, bars: Progress) -> None:
        if self._task is not None:
            bars.update(self._task, total=1, completed=1)
