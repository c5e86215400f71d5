"""The one thread that runs a model, for all its requests at once."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable

import torch

from experts.errors import ExpertUnavailableError
from experts.local.batch import PREFILL_CHUNK, Batch, Prefill
from experts.local.model import LocalModel
from experts.local.row import Job, Row

logger = logging.getLogger(__name__)

_RETRY_AFTER_S = 1.0
_JOIN_TIMEOUT_S = 30.0


class Engine:
    """Reads prompts piece by piece and steps all answers together, so that none waits for another's end.

    In each turn up to `PREFILL_CHUNK` tokens of prompts are read and each answer grows by one. At most `max_batch`
    answers are made at once; `max_queue` more requests wait. `threads` is how many CPU threads an operation may use.
    """

    def __init__(self, name: str, model: LocalModel, *, max_batch: int, max_queue: int, threads: int) -> None:
        self.max_batch = max_batch
        self._name = name
        self._model = model
        self._max_queue = max_queue
        self._threads = threads
        self._changed = threading.Condition()
        self._waiting: deque[Job] = deque()
        self._prefills: deque[Prefill] = deque()
        self._batches: list[Batch] = []
        self._free = max_batch  # as the last turn left it, for other threads to see
        self._closing = False
        self._thread = threading.Thread(target=self._run, name=f"expert-{name}", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether it still takes jobs."""
        return self._thread.is_alive() and not self._closing

    def check_room(self) -> None:
        """Raise `ExpertUnavailableError` if another job would have to be refused."""
        if not self.alive:
            raise ExpertUnavailableError(f"the engine of {self._name!r} has stopped")
        if len(self._waiting) >= self._max_queue + self._free:
            message = f"{self._name!r} has {len(self._waiting)} requests waiting"
            raise ExpertUnavailableError(message, retry_after_s=_RETRY_AFTER_S)

    def submit(self, job: Job) -> None:
        """Begin `job`, as soon as there is room. Raises `ExpertUnavailableError`."""
        with self._changed:
            self.check_room()
            self._waiting.append(job)
            self._changed.notify()

    def close(self) -> None:
        """Stop after the current step; jobs under way fail. Blocks until the thread has ended."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(_JOIN_TIMEOUT_S)

    @torch.inference_mode()
    def _run(self) -> None:
        torch.set_num_threads(self._threads)
        try:
            while self._wait_for_work():
                self._drop_ended()
                self._admit()
                self._read_prompts()
                self._step_batches()
        finally:
            self._closing = True
            self._fail_all()

    def _wait_for_work(self) -> bool:
        """Whether there is something to do; False when closing."""
        with self._changed:
            self._changed.wait_for(lambda: self._closing or self._waiting or self._prefills or self._batches)
        return not self._closing

    def _free_rows(self) -> int:
        return self.max_batch - len(self._rows())

    def _rows(self) -> list[Row]:
        return [row for batch in self._batches for row in batch.rows] + [
            row for one in self._prefills for row in one.rows
        ]

    def _drop_ended(self) -> None:
        for batch in self._batches:
            batch.drop_ended()
        self._batches = [batch for batch in self._batches if batch.rows]
        self._prefills = deque(prefill for prefill in self._prefills if not prefill.rows[0].job.cancelled)

    def _admit(self) -> None:
        """Begin to read the prompts of waiting jobs, in their order, while there is room for all rows of one."""
        with self._changed:
            while self._waiting and (self._waiting[0].cancelled or self._waiting[0].rows <= self._free_rows()):
                job = self._waiting.popleft()
                if not job.cancelled:
                    self._prefills.extend(self._prefills_of(job))
            self._free = self._free_rows()

    def _prefills_of(self, job: Job) -> list[Prefill]:
        n = job.generation.n
        prefills = []
        for i, prompt in enumerate(job.prompts):
            rows = [Row(job, i, j, self._model.tokenizer, self._model.end_tokens) for j in range(n)]
            for shared in [rows] if self._model.mergeable else [[row] for row in rows]:
                prefills.append(Prefill(self._model, prompt, shared))
        return prefills

    def _read_prompts(self) -> None:
        """One piece of one long prompt, or several short ones together of that size; who waits longest comes first."""
        budget = PREFILL_CHUNK
        while self._prefills and budget > 0:
            prefill = self._prefills.popleft()
            budget -= prefill.next_tokens
            batch = self._guarded(prefill.step, prefill.rows)
            if batch is not None:
                batch.drop_ended()
                self._add(batch)
            elif not prefill.rows[0].job.cancelled:
                self._prefills.append(prefill)

    def _add(self, batch: Batch) -> None:
        if not batch.rows:
            return
        if self._batches and self._model.mergeable:
            self._batches[0].merge(batch)
        else:
            self._batches.append(batch)

    def _step_batches(self) -> None:
        for batch in self._batches:
            self._guarded(batch.step, batch.rows)

    def _guarded(self, step: Callable[[], Batch | None], rows: list[Row]) -> Batch | None:
        """Run `step`; if it fails, so do the jobs of `rows`, and no others."""
        try:
            return step()
        except RuntimeError:  # what torch raises, out of memory included
            logger.exception("a step of %r failed", self._name)
            self._fail([row.job for row in rows], f"{self._name!r} failed while it generated")
            return None

    def _fail_all(self) -> None:
        self._fail([*(row.job for row in self._rows()), *self._waiting], f"the engine of {self._name!r} has stopped")

    @staticmethod
    def _fail(jobs: list[Job], message: str) -> None:
        for job in dict.fromkeys(jobs):
            job.cancelled = True
            job.reply(ExpertUnavailableError(message))
