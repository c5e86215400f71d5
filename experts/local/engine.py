"""The one thread that runs a model, for all its requests at once."""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

import torch

from experts.errors import ExpertError, ExpertUnavailableError
from experts.local import batch
from experts.local.batch import Alone, Batch, Prompt, Ready, Steps, length_class, read_piece, read_together
from experts.local.model import LocalModel
from experts.local.pool import Adapter
from experts.local.queue import FairQueue
from experts.local.row import Job, Piece, Row

logger = logging.getLogger(__name__)

_RETRY_AFTER_S = 1.0
_JOIN_TIMEOUT_S = 30.0
_UNHURRIED = 4
_COPIES = 4

T = TypeVar("T")


class Engine:
    """Reads prompts piece by piece and steps all answers together, so that none waits for another's end.

    In each turn up to `PREFILL_CHUNK` tokens of prompts are read and each answer grows by one. At most `max_batch`
    answers are made at once; `max_queue` more requests wait, shared evenly by tenants and adapters. An adapter that is
    not on the device is copied there between two turns. `threads` is how many CPU threads an operation may use.
    """

    def __init__(self, name: str, model: LocalModel, *, max_batch: int, max_queue: int, threads: int) -> None:
        self.max_batch = max_batch
        self._name = name
        self._model = model
        self._max_queue = max_queue
        self._threads = threads
        self._changed = threading.Condition()
        self._queue = FairQueue()
        self._retired: deque[Adapter] = deque()
        self._prompts: deque[Prompt] = deque()
        self._batches: dict[int, Batch] = {}
        self._alone: list[Alone] = []
        self._outbox: list[tuple[Job, Piece | ExpertError]] = []
        self._steps = self._stepped_rows = 0
        self._step_s = 0.0  # how long the last step of all took
        self._free = max_batch  # as the last turn left it, for other threads to see
        self._closing = False
        self._thread = threading.Thread(target=self._run, name=f"expert-{name}", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether it still takes jobs."""
        return self._thread.is_alive() and not self._closing

    def check_room(self, tenant: str) -> None:
        """Raise `ExpertUnavailableError` if another job of `tenant` would have to be refused."""
        with self._changed:
            self._make_room(tenant)

    def submit(self, job: Job) -> None:
        """Begin `job`, as soon as there is room. Where the queue is full, whoever has most waiting makes room.

        Raises `ExpertUnavailableError`.
        """
        with self._changed:
            displaced = self._make_room(job.tenant)
            if displaced is not None:
                self._queue.remove(displaced)
                displaced.cancelled = True
                _deliver([(displaced, self._full())], displaced.loop)
            self._queue.push(job)
            self._changed.notify()

    def forget(self, adapter: Adapter) -> None:
        """Let go of an adapter that nobody can ask for any more."""
        with self._changed:
            self._retired.append(adapter)
            self._changed.notify()

    def close(self) -> None:
        """Stop after the current step; jobs under way fail. Blocks until the thread has ended."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(_JOIN_TIMEOUT_S)

    def _make_room(self, tenant: str) -> Job | None:
        """Whom a job of `tenant` displaces, if the queue is full. Raises `ExpertUnavailableError`."""
        if not self.alive:
            raise ExpertUnavailableError(f"the engine of {self._name!r} has stopped")
        most = self._max_queue + self._free
        if len(self._queue) >= most:
            self._queue.drop_cancelled()
        if len(self._queue) < most:
            return None
        displaced = self._queue.displaced_by(tenant) if self._max_queue else None
        if displaced is None:
            raise self._full()
        return displaced

    def _full(self) -> ExpertUnavailableError:
        return ExpertUnavailableError(
            f"{self._name!r} has {len(self._queue)} requests waiting", retry_after_s=_RETRY_AFTER_S
        )

    @torch.inference_mode()
    def _run(self) -> None:
        torch.set_num_threads(self._threads)
        try:
            while self._wait_for_work():
                self._drop_ended()
                self._admit()
                self._read_prompts()
                self._step()
                self._flush()
        finally:
            self._closing = True
            self._fail_all()

    def _wait_for_work(self) -> bool:
        """Whether there is something to do; False when closing."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._closing or self._queue or self._retired or self._prompts or self._rows()
            )
        return not self._closing

    def _growing(self) -> list[Steps]:
        return [*(one for one in self._batches.values() if one.rows), *self._alone]

    def _rows(self) -> list[Row]:
        """All answers under way: those whose prompt is being read, and those that grow."""
        reading = [row for prompt in self._prompts for row in prompt.rows]
        return reading + [row for steps in self._growing() for row in steps.rows]

    def _drop_ended(self) -> None:
        for steps in self._growing():
            self._leave(steps.drop_ended())
        shortest = min(self._batches, default=0)  # whose memory is kept: it would be needed again at once
        self._batches = {length: one for length, one in self._batches.items() if one.rows or length == shortest}
        self._alone = [one for one in self._alone if one.rows]
        for prompt in [prompt for prompt in self._prompts if prompt.cancelled]:
            self._prompts.remove(prompt)
            self._leave(prompt.rows)
        while self._retired:
            self._model.pool.forget(self._retired.popleft())

    def _leave(self, rows: Sequence[Row]) -> None:
        """Rows are gone; with its last one, a job's adapters may go too."""
        for row in rows:
            job = row.job
            job.rows_left -= 1
            if not job.rows_left:
                self._model.pool.release(job.mixture.adapters)

    def _admit(self) -> None:
        """Begin to read the prompts of waiting jobs, while there is room for all rows of one and for its adapters.

        Where answers grow, no more begin in a turn once a few adapters were copied, or that took as long as a step.
        """
        pool = self._model.pool
        with self._changed:
            self._free = self.max_batch - len(self._rows())
        hurried = bool(self._growing())
        most_loads = pool.loads + (_COPIES if hurried else pool.slots)
        most_load_s = pool.load_s + (self._step_s if hurried else math.inf)
        while self._free and pool.loads < most_loads and pool.load_s <= most_load_s:
            if (job := self._next()) is None:
                return
            if not job.cancelled and self._guarded(partial(self._acquire, job), [job]):
                self._begin(job)

    def _next(self) -> Job | None:
        """Who begins now, if anybody can. Its adapters are copied later: event loops wait for this lock."""
        with self._changed:
            job = self._queue.pop(lambda job: job.rows <= self._free and self._model.pool.fits(job.mixture.adapters))
            if job is not None and not job.cancelled:
                self._free -= job.rows
        return job

    def _acquire(self, job: Job) -> bool:
        pool, pace = self._model.pool, job.pace
        hits, loads = pool.hits, pool.loads
        pool.acquire(job.mixture.adapters)
        pace.adapter_hits, pace.adapter_loads = pool.hits - hits, pool.loads - loads
        return True

    def _begin(self, job: Job) -> None:
        n = job.generation.n
        pace = job.pace
        pace.admitted, pace.steps, pace.rows = time.perf_counter(), self._steps, self._stepped_rows
        pace.cache_use = self._cache_use()
        job.rows_left = job.rows
        for i, prompt in enumerate(job.prompts):
            rows = [Row(job, i, j, self._model.tokenizer, self._model.end_tokens) for j in range(n)]
            shared = [rows] if self._model.batchable else [[row] for row in rows]
            self._prompts.extend(map(Prompt, shared))
            self._charge([job], len(prompt))

    def _charge(self, jobs: Sequence[Job], tokens: int) -> None:
        """Count tokens that each of `jobs` was served."""
        with self._changed:
            for job in jobs:
                self._queue.charge(job.flow, tokens)

    def _cache_use(self) -> float:
        """The share of the allocated key-value cache that is in use."""
        allocated = sum(one.allocated for one in self._batches.values())
        return sum(one.used for one in self._batches.values()) / allocated if allocated else 0.0

    def _read_prompts(self) -> None:
        """One piece of one long prompt, or several short ones together of that size; who waits longest comes first.

        Where no answer grows yet, more is read at once: nobody has to wait for it.
        """
        budget = batch.PREFILL_CHUNK * (1 if self._growing() else _UNHURRIED)
        while self._prompts and budget > 0:
            if self._model.batchable and self._is_short(self._prompts[0]):
                prompts = self._short_prompts(budget)
                budget -= len(prompts) * max(len(prompt.tokens) for prompt in prompts)
                rows = [row for prompt in prompts for row in prompt.rows]
                read = self._guarded(partial(read_together, self._model, prompts, self._reply), _jobs(rows))
                if read is None:
                    self._leave(rows)
                for one in read or ():
                    self._join(one)
            else:
                prompt = self._prompts.popleft()
                chunk = batch.PREFILL_CHUNK if self._model.batchable else len(prompt.tokens)
                budget -= chunk
                ready = self._guarded(partial(read_piece, self._model, prompt, chunk, self._reply), _jobs(prompt.rows))
                if ready is not None:
                    self._join(ready)
                elif prompt.cancelled:
                    self._leave(prompt.rows)
                else:
                    self._prompts.append(prompt)

    @staticmethod
    def _is_short(prompt: Prompt) -> bool:
        return not prompt.read and len(prompt.tokens) <= batch.PREFILL_CHUNK

    def _short_prompts(self, budget: int) -> list[Prompt]:
        """The first prompts that fit into one pass of `budget` tokens, padding included; at least one."""
        prompts = [self._prompts.popleft()]
        longest = len(prompts[0].tokens)
        while self._prompts and self._is_short(self._prompts[0]):
            longest = max(longest, len(self._prompts[0].tokens))
            if longest * (len(prompts) + 1) > budget:
                break
            prompts.append(self._prompts.popleft())
        return prompts

    def _join(self, ready: Ready) -> None:
        """Let the rows of a prompt that was read grow, but those that have ended with their first token."""
        now = time.perf_counter()
        self._charge(_jobs(ready.rows), 1)
        for row, first in zip(ready.rows, ready.first, strict=True):
            row.job.pace.first_token = row.job.pace.first_token or now
            if row.finished or row.job.cancelled:
                self._end(row, now)
                self._leave([row])
            elif not self._guarded(partial(self._let_grow, row, first, ready), [row.job]):
                self._leave([row])

    def _let_grow(self, row: Row, first: int, ready: Ready) -> bool:
        if self._model.batchable:
            self._batch(ready.tokens).join(row, first, ready)
        else:
            self._alone.append(Alone(self._model, self._reply, row, ready))
        return True

    def _batch(self, tokens: int) -> Batch:
        """The batch for a row of `tokens` tokens."""
        length = length_class(tokens, self._model.longest)
        if length not in self._batches:
            self._batches[length] = Batch(self._model, self._reply, most=self.max_batch, length=length)
        return self._batches[length]

    def _step(self) -> None:
        self._move_outgrown()
        started = time.perf_counter()
        for steps in self._growing():
            rows = list(steps.rows)
            self._steps += 1
            self._stepped_rows += len(rows)
            self._guarded(steps.step, _jobs(rows))
            now = time.perf_counter()
            self._charge(_jobs(rows), 1)
            for row in rows:
                if row.finished:
                    self._end(row, now)
        self._step_s = time.perf_counter() - started

    def _move_outgrown(self) -> None:
        for one in list(self._batches.values()):
            if outgrown := one.outgrown():
                for i in outgrown:
                    row = one.rows[i]
                    if not self._guarded(partial(self._move, one, i), [row.job]):
                        self._leave([row])
                one.drop(outgrown)

    def _move(self, one: Batch, i: int) -> bool:
        self._batch(one.length).pull(one, i)
        return True

    def _end(self, row: Row, now: float) -> None:
        pace = row.job.pace
        if not pace.ended:
            pace.steps, pace.rows = self._steps - pace.steps, self._stepped_rows - pace.rows
        pace.ended = now

    def _guarded(self, run: Callable[[], T], jobs: Sequence[Job]) -> T | None:
        """Run a part of a turn; if it fails, whatever the reason, so do `jobs`, and no others."""
        try:
            return run()
        except Exception as error:
            logger.exception("a step of %r failed", self._name)
            self._fail(jobs, f"{self._name!r} failed while it generated")
            if isinstance(error, torch.AcceleratorError):  # the device is lost to this process: let it be replaced
                self._closing = True
            return None

    def _fail_all(self) -> None:
        with self._changed:
            jobs = [*(row.job for row in self._rows()), *self._queue]
            self._fail(jobs, f"the engine of {self._name!r} has stopped")
            self._flush()

    def _fail(self, jobs: Sequence[Job], message: str) -> None:
        for job in dict.fromkeys(jobs):
            job.cancelled = True
            self._reply(job, ExpertUnavailableError(message))

    def _reply(self, job: Job, reply: Piece | ExpertError) -> None:
        self._outbox.append((job, reply))

    def _flush(self) -> None:
        """Hand over what the turn has made: one call for each event loop."""
        replies, self._outbox = self._outbox, []
        for loop in {job.loop for job, _ in replies}:
            _deliver([(job, reply) for job, reply in replies if job.loop is loop], loop)


def _jobs(rows: Sequence[Row]) -> list[Job]:
    return [row.job for row in rows]


def _deliver(replies: Sequence[tuple[Job, Piece | ExpertError]], loop: asyncio.AbstractEventLoop) -> None:
    """Put replies where they are waited for; nobody listens any more where the loop is closed."""

    def put() -> None:
        for job, reply in replies:
            job.replies.put_nowait(reply)

    try:
        loop.call_soon_threadsafe(put)
    except RuntimeError:
        for job, _ in replies:
            job.cancelled = True
