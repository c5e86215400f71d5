"""The experts of one local model: its base and each of its adapters."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from math import ceil
from typing import Any, Protocol

from jinja2 import TemplateError

from experts.errors import ExpertConfigError, ExpertError, ExpertRequestError, ExpertTimeoutError
from experts.expert import Expert, ExpertRequest, Part, Usage
from experts.fleet import ExpertGroup, FleetEntry, LocalSource
from experts.local.batch import can_share, first_pass
from experts.local.engine import Engine
from experts.local.mixture import BASE, Mixture
from experts.local.model import LocalModel, load_model
from experts.local.prompt import ChatPrompt
from experts.local.registry import AdapterRegistry
from experts.local.reply import Replies
from experts.local.request import Generation, SamplingDefaults, gate_bias, parse_chat, parse_completion
from experts.local.row import Job, Piece
from experts.mixing.load import GateLoad
from experts.mixtures import MixtureName, is_mixture, parse_mixture
from experts.shared import Shared
from kernels import KernelError


def build_local(group: ExpertGroup) -> dict[str, Expert]:
    """Load a local model with its adapters and gates: one expert each, by name, on one engine.

    Raises `ExpertConfigError` that names the entry at fault.
    """
    model = load_model(group)
    if model.batchable and not can_share(model):
        model = replace(model, batchable=False)
    registry = AdapterRegistry(model)
    for entry in group.adapters:
        _register(entry, registry)
    experts = {entry.name: wanted_by(entry) for entry in group.entries}
    for entry in group.entries:
        _try(entry, model, _checked(entry, registry))
    shared = _OwnRuntime(group, model, registry, group.head.local or LocalSource(model=group.name))
    held = Shared[Runtime](shared, shared.close)
    return {entry.name: LocalExpert(entry, experts[entry.name], held) for entry in group.entries}


def _register(entry: FleetEntry, registry: AdapterRegistry) -> None:
    try:
        if entry.adapter:
            registry.load(entry.name, entry.adapter.path, entry.adapter.revision, short=True)
        elif entry.mixture and entry.mixture.gate:
            registry.load(entry.name, entry.mixture.gate, entry.mixture.revision, short=True)
    except ExpertConfigError as error:
        source = entry.adapter.path if entry.adapter else entry.mixture and entry.mixture.gate
        raise ExpertConfigError(f"expert {entry.name!r}: adapter {source!r}: {error}") from error


def wanted_by(entry: FleetEntry) -> MixtureName | None:
    """What an entry stands for; None is the base, which can be asked for any mixture."""
    if entry.adapter:
        return MixtureName(entry.adapter.base, {entry.name: 1.0})
    if entry.mixture and entry.mixture.gate:
        return MixtureName(entry.mixture.base, gate=entry.name)
    if entry.mixture:
        return MixtureName(entry.mixture.base, entry.mixture.adapters)
    return None


def _checked(entry: FleetEntry, registry: AdapterRegistry) -> Mixture:
    try:
        wanted = wanted_by(entry)
        return BASE if wanted is None else registry.mixture(wanted, {})
    except ExpertRequestError as error:
        raise ExpertConfigError(f"expert {entry.name!r}: {error}") from error


def _try(entry: FleetEntry, model: LocalModel, mixture: Mixture) -> None:
    """A first pass, so that the first request is no slower than others and finds no surprise."""
    try:
        finite = first_pass(model, mixture)
    except (RuntimeError, TypeError, ValueError, AttributeError, KernelError) as error:
        raise ExpertConfigError(f"expert {entry.name!r}: its model does not run: {error}") from error
    if not finite:
        raise ExpertConfigError(f"expert {entry.name!r}: its model gives numbers that are not finite")


def _load_of(mixture: Mixture) -> GateLoad:
    """What a gate tells a request of its load. Raises `ExpertRequestError` where no gate decides among adapters."""
    if mixture.gate is None or not mixture.gate.gate.takes_weights:
        message = "gate_load needs a gate over adapters: model BASE+gate:NAME"
        raise ExpertRequestError(message, param="gate_load", code="invalid_value")
    return GateLoad()


class Model(Protocol):
    """What an expert knows of its model."""

    @property
    def tokenizer(self) -> Any: ...
    @property
    def vocabulary(self) -> int: ...
    @property
    def defaults(self) -> SamplingDefaults: ...


class Registry(Protocol):
    """Adapters and gates by name; `AdapterRegistry` says what the methods do."""

    def load(self, name: str, path: str, revision: str | None = None) -> Any: ...
    def unload(self, name: str) -> Any: ...
    def mixture(self, wanted: MixtureName, bias: Mapping[str, float]) -> Mixture: ...


class JobEngine(Protocol):
    """What makes answers; `Engine` says what the methods do."""

    max_batch: int

    @property
    def alive(self) -> bool: ...
    def check_room(self, tenant: str) -> None: ...
    def submit(self, job: Job) -> None: ...
    def forget(self, adapter: Any) -> None: ...


class Runtime(Protocol):
    """What the experts of one model share: model, adapters, engine, and a thread that turns text into tokens."""

    chat: ChatPrompt
    tokenizing: ThreadPoolExecutor

    @property
    def model(self) -> Model: ...
    @property
    def registry(self) -> Registry: ...
    @property
    def engine(self) -> JobEngine: ...


class _OwnRuntime:
    """The runtime on the project's own engine."""

    def __init__(self, group: ExpertGroup, model: LocalModel, registry: AdapterRegistry, source: LocalSource) -> None:
        threads = max(1, ceil(group.resources.cpus))
        self.model = model
        self.registry = registry
        self.chat = ChatPrompt(model.tokenizer)
        self.engine = Engine(group.name, model, max_batch=source.max_batch, max_queue=source.max_queue, threads=threads)
        self.tokenizing = ThreadPoolExecutor(1, thread_name_prefix=f"tokenizing-{group.name}")

    async def close(self) -> None:
        await asyncio.get_running_loop().run_in_executor(None, self.engine.close)
        self.tokenizing.shutdown(wait=False, cancel_futures=True)


class LocalExpert:
    """A model in this process: the base, which also answers for mixtures by name, an adapter, a mixture or a gate."""

    def __init__(self, entry: FleetEntry, wanted: MixtureName | None, shared: Shared[Runtime]) -> None:
        self._entry = entry
        self._wanted = wanted
        self._shared = shared.hold()
        self._model = shared.resource.model
        self._registry = shared.resource.registry
        self._engine = shared.resource.engine

    async def generate(self, request: ExpertRequest) -> AsyncIterator[Part]:
        """Answer part by part; closing the iterator stops the generation at its next step."""
        deadline = asyncio.get_running_loop().time() + request.timeout_s
        generation = self._parse(request)
        mixture = self._mixture(request)
        if generation.gate_load:
            mixture = replace(mixture, load=_load_of(mixture))
        self._engine.check_room(request.tenant)
        job = await self._job(generation, mixture, request.tenant, deadline)
        self._engine.submit(job)
        replies = Replies(request, self._entry.name, self._model.tokenizer, show_usage=generation.include_usage)
        try:
            if generation.stream:
                async for part in self._stream(job, replies, deadline):
                    yield part
            else:
                yield await self._whole(job, replies, deadline)
        finally:
            job.cancelled = True

    async def embed(self, request: ExpertRequest) -> Part:
        """Refused: these models generate."""
        message = f"expert {self._entry.name!r} does not make embeddings"
        raise ExpertRequestError(message, param="model", code="unsupported_endpoint")

    async def load_adapter(self, name: str, path: str, revision: str | None = None) -> None:
        """Register an adapter or a gate on the base, or replace it, while others answer; it is checked first.

        `path` is a folder, an fsspec URL or a name on the hub. Answers under way keep what they began with. Raises
        `ExpertConfigError`.
        """
        loop = asyncio.get_running_loop()
        replaced = await loop.run_in_executor(None, self._registry.load, name, path, revision)
        if replaced is not None:
            self._engine.forget(replaced)

    async def unload_adapter(self, name: str) -> None:
        """Forget an adapter or a gate; answers under way keep it. Raises `ExpertConfigError` where there is none."""
        unloaded = self._registry.unload(name)
        if unloaded is not None:
            self._engine.forget(unloaded)

    def adapted(self, entry: FleetEntry) -> LocalExpert:
        """The expert that answers through the loaded adapter of the entry's name."""
        return LocalExpert(entry, wanted_by(entry), self._shared)

    async def healthy(self) -> bool:
        """Whether its engine runs."""
        return self._engine.alive

    async def close(self) -> None:
        """Let go of the model; the last of its experts to do so stops the engine."""
        await self._shared.release()

    def _mixture(self, request: ExpertRequest) -> Mixture:
        """What the request is answered with: the expert's own, or what the base is asked for by name."""
        name = request.body.get("model")
        wanted = self._wanted
        if wanted is None and is_mixture(name):
            wanted = parse_mixture(str(name))
            if wanted.base != self._entry.name:
                message = f"model: mixtures on {wanted.base[:128]!r} are not for {self._entry.name!r}"
                raise ExpertRequestError(message, param="model", code="model_not_found", status=404)
        return self._registry.mixture(wanted or MixtureName(self._entry.name), gate_bias(request.body))

    def _parse(self, request: ExpertRequest) -> Generation:
        for field, feature in (("tools", "tools"), ("functions", "tools"), ("logprobs", "logprobs")):
            if request.body.get(field) and feature not in self._entry.features:
                raise self._lacks(feature, field)
        response_format = request.body.get("response_format")
        if response_format not in (None, {"type": "text"}) and "json" not in self._entry.features:
            raise self._lacks("json", "response_format")
        parse = parse_chat if request.endpoint == "chat/completions" else parse_completion
        return parse(request.body, self._model.defaults)

    def _lacks(self, feature: str, field: str) -> ExpertRequestError:
        message = f"expert {self._entry.name!r} has no {feature} feature, which {field} needs"
        return ExpertRequestError(message, param=field, code="unsupported_parameter")

    async def _job(self, generation: Generation, mixture: Mixture, tenant: str, deadline: float) -> Job:
        """The request as tokens, within the context and the engine's limits."""
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout_at(deadline):
                prompts = await loop.run_in_executor(self._shared.resource.tokenizing, self._tokenize, generation)
        except TimeoutError as error:
            raise self._too_late() from error
        max_tokens = [self._max_tokens(len(prompt), generation.max_tokens) for prompt in prompts]
        job = Job(
            prompts=prompts, generation=generation, mixture=mixture, max_tokens=max_tokens, loop=loop, tenant=tenant
        )
        if job.rows > self._engine.max_batch:
            message = f"{job.rows} answers are asked for at once, {self._engine.max_batch} are possible"
            raise ExpertRequestError(message, param="n", code="invalid_value")
        if any(token not in range(self._model.vocabulary) for token in generation.sampling.logit_bias):
            message = f"logit_bias: tokens are 0 to {self._model.vocabulary - 1}"
            raise ExpertRequestError(message, param="logit_bias", code="invalid_value")
        return job

    def _tokenize(self, generation: Generation) -> Sequence[Sequence[int]]:
        tokenizer = self._model.tokenizer
        if generation.messages is None:
            return [self._prompt_tokens(prompt) for prompt in generation.prompts]
        if not tokenizer.chat_template:
            message = f"expert {self._entry.name!r} has no chat template: use completions"
            raise ExpertRequestError(message, param="messages", code="unsupported_endpoint")
        try:
            return [self._shared.resource.chat.tokens(generation.messages)]
        except (TemplateError, TypeError) as error:
            message = f"messages do not fit the chat template of expert {self._entry.name!r}: {error}"
            raise ExpertRequestError(message, param="messages", code="invalid_value") from error

    def _prompt_tokens(self, prompt: str | list[int]) -> list[int]:
        tokens: list[int] = self._model.tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else prompt
        if not tokens:
            raise ExpertRequestError("prompt: must not be empty", param="prompt", code="invalid_value")
        if not all(0 <= token < self._model.vocabulary for token in tokens):
            message = f"prompt: tokens are 0 to {self._model.vocabulary - 1}"
            raise ExpertRequestError(message, param="prompt", code="invalid_value")
        return tokens

    def _max_tokens(self, prompt: int, wanted: int | None) -> int:
        """How many tokens the answer to a prompt of `prompt` tokens may have."""
        context = self._entry.context_length
        if prompt >= context:
            message = f"This model's maximum context length is {context} tokens. Your prompt has {prompt} tokens."
            raise ExpertRequestError(message, param="messages", code="context_length_exceeded")
        return min(wanted or context, context - prompt)

    async def _stream(self, job: Job, replies: Replies, deadline: float) -> AsyncIterator[Part]:
        tokens: dict[int, int] = {}
        async for piece in self._pieces(job, deadline):
            tokens[piece.choice] = piece.tokens
            for chunk in replies.chunks(piece):
                yield Part(chunk)
        usage = Usage(sum(map(len, job.prompts)), sum(tokens.values()))
        data = replies.last_chunk(usage, job.mixture.load)
        yield Part(data, usage, work=job.pace.work(usage.output_tokens - job.rows))

    async def _whole(self, job: Job, replies: Replies, deadline: float) -> Part:
        choices: list[list[Piece]] = [[] for _ in range(job.rows)]
        async for piece in self._pieces(job, deadline):
            choices[piece.choice].append(piece)
        usage = Usage(sum(map(len, job.prompts)), sum(pieces[-1].tokens for pieces in choices))
        return Part(
            replies.whole(choices, usage, job.mixture.load), usage, work=job.pace.work(usage.output_tokens - job.rows)
        )

    async def _pieces(self, job: Job, deadline: float) -> AsyncIterator[Piece]:
        """What the engine makes of `job`, until each of its choices has ended."""
        open_choices = job.rows
        while open_choices:
            try:
                async with asyncio.timeout_at(deadline):
                    reply = await job.replies.get()
            except TimeoutError as error:
                raise self._too_late() from error
            if isinstance(reply, ExpertError):
                raise reply
            open_choices -= reply.finish_reason is not None
            yield reply

    def _too_late(self) -> ExpertTimeoutError:
        return ExpertTimeoutError(f"expert {self._entry.name!r} did not answer in time")
