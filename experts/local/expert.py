"""The experts of one local model: its base and each of its adapters."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from math import ceil

from jinja2 import TemplateError

from experts.errors import ExpertError, ExpertRequestError, ExpertTimeoutError
from experts.expert import Expert, ExpertRequest, Part, Usage
from experts.fleet import ExpertGroup, FleetEntry, LocalSource
from experts.local.engine import Engine
from experts.local.lora import NO_ADAPTER
from experts.local.model import LocalModel, load_model
from experts.local.prompt import ChatPrompt
from experts.local.reply import Replies
from experts.local.request import Generation, parse_chat, parse_completion
from experts.local.row import Job, Piece
from experts.shared import Shared


def build_local(group: ExpertGroup) -> dict[str, Expert]:
    """Load a local model with its adapters: one expert each, by name, on one engine. Raises `ExpertConfigError`."""
    model = load_model(group.head, group.adapters)
    runtime = _Runtime(group, model, group.head.local or LocalSource(model=group.name))
    shared = Shared(runtime, runtime.close)
    numbered = enumerate(group.entries, start=NO_ADAPTER)
    return {entry.name: LocalExpert(entry, adapter, shared) for adapter, entry in numbered}


class _Runtime:
    """What the experts of one model share: the model, its engine, and a thread that turns text into tokens."""

    def __init__(self, group: ExpertGroup, model: LocalModel, source: LocalSource) -> None:
        threads = max(1, ceil(group.resources.cpus))
        self.model = model
        self.chat = ChatPrompt(model.tokenizer)
        self.engine = Engine(group.name, model, max_batch=source.max_batch, max_queue=source.max_queue, threads=threads)
        self.tokenizing = ThreadPoolExecutor(1, thread_name_prefix=f"tokenizing-{group.name}")

    async def close(self) -> None:
        await asyncio.get_running_loop().run_in_executor(None, self.engine.close)
        self.tokenizing.shutdown(wait=False, cancel_futures=True)


class LocalExpert:
    """A model in this process: the base (`adapter` -1) or one of its adapters."""

    def __init__(self, entry: FleetEntry, adapter: int, shared: Shared[_Runtime]) -> None:
        self._entry = entry
        self._adapter = adapter
        self._shared = shared.hold()
        self._model = shared.resource.model
        self._engine = shared.resource.engine

    async def generate(self, request: ExpertRequest) -> AsyncIterator[Part]:
        """Answer part by part; closing the iterator stops the generation at its next step."""
        deadline = asyncio.get_running_loop().time() + request.timeout_s
        generation = self._parse(request)
        self._engine.check_room()
        job = await self._job(generation, deadline)
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

    async def healthy(self) -> bool:
        """Whether its engine runs."""
        return self._engine.alive

    async def close(self) -> None:
        """Let go of the model; the last of its experts to do so stops the engine."""
        await self._shared.release()

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

    async def _job(self, generation: Generation, deadline: float) -> Job:
        """The request as tokens, within the context and the engine's limits."""
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout_at(deadline):
                prompts = await loop.run_in_executor(self._shared.resource.tokenizing, self._tokenize, generation)
        except TimeoutError as error:
            raise self._too_late() from error
        max_tokens = [self._max_tokens(len(prompt), generation.max_tokens) for prompt in prompts]
        job = Job(prompts=prompts, generation=generation, adapter=self._adapter, max_tokens=max_tokens, loop=loop)
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
        yield Part(replies.usage_chunk(usage) if job.generation.include_usage else b"", usage)

    async def _whole(self, job: Job, replies: Replies, deadline: float) -> Part:
        choices: list[list[Piece]] = [[] for _ in range(job.rows)]
        async for piece in self._pieces(job, deadline):
            choices[piece.choice].append(piece)
        usage = Usage(sum(map(len, job.prompts)), sum(pieces[-1].tokens for pieces in choices))
        return Part(replies.whole(choices, usage), usage)

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
