"""Progress of long work: bars where a person looks on, a line now and then where a log is written."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from router_service.cli.console import errors

OnStep = Callable[[str, int, int], None]
"""Hears of a step's name, how much of it is done, and how much there is."""

_LINE_EVERY_S = 5.0


@contextmanager
def steps() -> Iterator[OnStep]:
    """Shows steps on stderr, each with its own bar or lines, so that stdout stays the result's."""
    if not errors.is_terminal:
        yield _Lines()
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=errors) as progress:
        yield _Bars(progress)


class _Bars:
    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._tasks: dict[str, TaskID] = {}

    def __call__(self, step: str, done: int, total: int) -> None:
        name = step.partition(":")[0]
        if name not in self._tasks:
            self._tasks[name] = self._progress.add_task(step)
        self._progress.update(self._tasks[name], description=step, completed=done, total=total)


class _Lines:
    def __init__(self) -> None:
        self._said: dict[str, float] = {}

    def __call__(self, step: str, done: int, total: int) -> None:
        name, now = step.partition(":")[0], time.monotonic()
        if done == total or now - self._said.get(name, float("-inf")) >= _LINE_EVERY_S:
            self._said[name] = now
            sys.stderr.write(f"{step} {done}/{total}\n")
            sys.stderr.flush()
