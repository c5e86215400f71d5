"""The experts of one encoder: it and each of its adapters.

What waits for the encoder is computed together, whoever asked: texts for different adapters share a batch. A request of
many texts waits again after each slice of them, so that others come between, and ends there if nobody waits for it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from math import ceil

import numpy as np
import torch

from experts.adapter_files import local_copy
from experts.embedding.adapters import AdaptedEncoder
from experts.embedding.encoder import EmbedderConfig, Encoder, EncoderFiles, FloatArray
from experts.embedding.request import EmbeddingRequest, reply
from experts.errors import ExpertConfigError, ExpertRequestError, ExpertTimeoutError, ExpertUnavailableError
from experts.expert import Expert, ExpertRequest, Part, Usage
from experts.fleet import AdapterSource, EncoderSource, ExpertGroup, FleetEntry
from experts.shared import Shared

logger = logging.getLogger(__name__)

_TEXTS_PER_BATCH = 512


def build_encoder(group: ExpertGroup) -> dict[str, Expert]:
    """Load an encoder with its adapters: one expert each, by name. Raises `ExpertConfigError`."""
    source = group.head.encoder or EncoderSource()
    config = EmbedderConfig(model=source.model, max_tokens=source.max_tokens, pooling=source.pooling)
    files = EncoderFiles.find(config)
    encoder = AdaptedEncoder(Encoder(files, config))
    _load(encoder, {entry.name: entry.adapter for entry in group.adapters if entry.adapter})
    # As long as requests are, so that the first of them finds the kernels built.
    encoder.encode(encoder.tokenize(["warm up " * 32] * len(group.entries)), [None, *encoder.names])
    runtime = Runtime(encoder, files.dimensions, max_queue=source.max_queue, threads=ceil(group.resources.cpus))
    shared = Shared(runtime, runtime.close)
    adapters = [None, *(entry.name for entry in group.adapters)]
    return {
        entry.name: EmbeddingExpert(entry, adapter, shared)
        for entry, adapter in zip(group.entries, adapters, strict=True)
    }


def _load(encoder: AdaptedEncoder, sources: Mapping[str, AdapterSource]) -> None:
    """Fetch adapters, which may take its time, and load them: all or none. Raises `ExpertConfigError`."""
    with ExitStack() as copies:
        folders = {}
        for name, source in sources.items():
            try:
                folders[name] = copies.enter_context(local_copy(source.path, source.revision))
            except ExpertConfigError as error:
                raise ExpertConfigError(f"adapter {name!r}: {error}") from error
        encoder.load(folders)


@dataclass(slots=True)
class _Job:
    """A request's texts, or as many of them as are computed at once."""

    texts: Sequence[str]
    adapter: str | None
    done: Future[tuple[FloatArray, int]] = field(default_factory=Future)


@dataclass(eq=False, slots=True)
class _Request:
    """A request under way, of which `left` texts are not computed yet."""

    adapter: str | None
    left: int
    ended: asyncio.Event = field(default_factory=asyncio.Event)


class Runtime:
    """What the experts of one encoder share: the encoder, with its one thread. `encoder` takes adapters at any time."""

    def __init__(self, encoder: AdaptedEncoder, dimensions: int, *, max_queue: int, threads: int) -> None:
        self.encoder = encoder
        self.dimensions = dimensions
        self._max_queue = max_queue
        self._requests: set[_Request] = set()
        self._waiting: list[_Job] = []
        self._thread = ThreadPoolExecutor(
            1, thread_name_prefix="encoder", initializer=torch.set_num_threads, initargs=(max(1, threads),)
        )

    async def encode(self, texts: Sequence[str], adapter: str | None) -> tuple[FloatArray, int]:
        """Unit vectors [len(texts), D], and how many tokens were read. Raises `ExpertUnavailableError`."""
        if sum(request.left for request in self._requests) + len(texts) > self._max_queue:
            raise ExpertUnavailableError(f"{self._max_queue} texts wait, which is the limit", retry_after_s=1.0)
        request = _Request(adapter, len(texts))
        self._requests.add(request)
        vectors, tokens = [], 0
        try:
            for start in range(0, len(texts), _TEXTS_PER_BATCH):
                some = texts[start : start + _TEXTS_PER_BATCH]
                job = _Job(some, adapter)
                self._waiting.append(job)
                self._thread.submit(self._run)
                found, read = await asyncio.wrap_future(job.done)
                request.left -= len(some)
                vectors.append(found)
                tokens += read
        finally:
            self._requests.remove(request)
            request.ended.set()
        return np.concatenate(vectors), tokens

    async def unload(self, adapter: str) -> None:
        """Forget an adapter, after all that waits for it now is computed. Raises `ExpertConfigError`."""
        for request in [request for request in self._requests if request.adapter == adapter]:
            await request.ended.wait()
        await asyncio.wrap_future(self._thread.submit(self.encoder.unload, adapter))

    async def close(self) -> None:
        """End the thread once its batch is done."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _run(self) -> None:
        """Compute what waits now; every job submits one run, so that what is left here has its own still to come."""
        jobs: list[_Job] = []
        room = _TEXTS_PER_BATCH
        while self._waiting and len(self._waiting[0].texts) <= room:
            job = self._waiting.pop(0)
            room -= len(job.texts)
            if job.done.set_running_or_notify_cancel():
                jobs.append(job)
        if jobs and not self._answer(jobs) and len(jobs) > 1:
            for job in jobs:  # one that cannot be encoded must not fail those beside it
                self._answer([job], last=True)

    def _answer(self, jobs: Sequence[_Job], *, last: bool = False) -> bool:
        """Whether jobs were encoded. A failure, whatever it is, reaches them if there is nothing else to try."""
        try:
            results = self._encode(jobs)
        except Exception as error:
            if last or len(jobs) == 1:
                logger.warning("an encoder failed", exc_info=error)
                for job in jobs:
                    job.done.set_exception(ExpertUnavailableError(f"the encoder failed: {error}"))
            return False
        for job, result in zip(jobs, results, strict=True):
            job.done.set_result(result)
        return True

    def _encode(self, jobs: Sequence[_Job]) -> list[tuple[FloatArray, int]]:
        tokens = self.encoder.tokenize([text for job in jobs for text in job.texts])
        vectors = self.encoder.encode(tokens, [job.adapter for job in jobs for _ in job.texts])
        results, start = [], 0
        for job in jobs:
            own = slice(start, start + len(job.texts))
            results.append((vectors[own], sum(map(len, tokens[own]))))
            start = own.stop
        return results


class EmbeddingExpert:
    """An encoder in this process: as it is (`adapter` None), or through one of its adapters."""

    def __init__(self, entry: FleetEntry, adapter: str | None, shared: Shared[Runtime]) -> None:
        self._name = entry.name
        self._adapter = adapter
        self._shared = shared.hold()

    async def generate(self, request: ExpertRequest) -> AsyncIterator[Part]:
        """Refused: an encoder makes embeddings."""
        message = f"expert {self._name!r} makes embeddings and answers nothing"
        raise ExpertRequestError(message, param="model", code="unsupported_endpoint")
        yield Part(b"")

    async def embed(self, request: ExpertRequest) -> Part:
        """Answer an embeddings request."""
        runtime = self._shared.resource
        asked = EmbeddingRequest.parse(request.body, runtime.dimensions)
        try:
            async with asyncio.timeout(request.timeout_s):
                vectors, tokens = await runtime.encode(asked.texts, self._adapter)
        except TimeoutError as error:
            raise ExpertTimeoutError(f"expert {self._name!r} did not answer in time") from error
        usage = Usage(input_tokens=tokens)
        encoder = runtime.encoder.fingerprint
        return Part(reply(self._name, vectors, usage, as_base64=asked.as_base64, encoder=encoder), usage)

    async def load_adapter(self, name: str, path: str, revision: str | None = None) -> None:
        """Load an adapter beside the others, or replace it, from a folder, an fsspec URL or the hub.

        Requests under way do not wait for it. Raises `ExpertConfigError`.
        """
        if self._adapter is not None:
            raise ExpertConfigError(f"expert {self._name!r} is an adapter itself, and can be no base")
        source = AdapterSource(base=self._name, path=path, revision=revision)
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(None, _load, self._shared.resource.encoder, {name: source})

    async def unload_adapter(self, name: str) -> None:
        """Forget an adapter, once what waits for it is computed. Raises `ExpertConfigError` where there is none."""
        await self._shared.resource.unload(name)

    def adapted(self, entry: FleetEntry) -> EmbeddingExpert:
        """The expert of an adapter that was loaded."""
        return EmbeddingExpert(entry, entry.name, self._shared)

    async def healthy(self) -> bool:
        """Whether its adapter is loaded."""
        return self._adapter is None or self._adapter in self._shared.resource.encoder.names

    async def close(self) -> None:
        """Let go of the encoder; the last of its experts to do so ends its thread."""
        await self._shared.release()
