"""vLLM as the engine of a local model and its plain adapters, where it is installed (`engine: vllm`).

Checks, prompts, errors and OpenAI's shapes are those of every local expert; vLLM schedules, generates, finds stop
strings and turns tokens into text. Mixtures and gates need the project's own engine.
"""

from __future__ import annotations

import asyncio
import itertools
import time
import uuid
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from experts.adapter_files import local_copy
from experts.errors import ExpertConfigError, ExpertRequestError, ExpertUnavailableError
from experts.expert import Expert
from experts.fleet import AdapterSource, ExpertGroup, FleetEntry, LocalSource
from experts.local.expert import LocalExpert, Runtime, wanted_by
from experts.local.lora import read_adapter
from experts.local.mixture import Mixture
from experts.local.model import load_tokenizer, sampling_defaults
from experts.local.prompt import ChatPrompt
from experts.local.request import Generation, SamplingDefaults
from experts.local.row import FinishReason, Job, Logprob, Piece
from experts.local.sampling import TokenLogprob
from experts.mixtures import MixtureName
from experts.shared import Shared

_RETRY_AFTER_S = 1.0
_MAX_LORA_RANK = 64


def build_vllm(group: ExpertGroup) -> dict[str, Expert]:
    """The experts of a group on vLLM. Raises `ExpertConfigError`, also where vLLM is not installed."""
    source = group.head.local or LocalSource(model=group.name)
    if mixed := [entry.name for entry in group.adapters if entry.mixture]:
        raise ExpertConfigError(f"expert {mixed[0]!r}: mixtures need {group.name!r} to have engine: own, not vllm")
    try:
        import vllm
    except ImportError as error:
        message = f"expert {group.name!r}: engine vllm is asked for, but the package vllm is not installed"
        raise ExpertConfigError(message) from error
    from transformers import GenerationConfig

    tokenizer = load_tokenizer(group.name, source)
    try:
        engine = vllm.AsyncLLMEngine.from_engine_args(vllm.AsyncEngineArgs(**engine_arguments(group, source)))
        defaults = sampling_defaults(GenerationConfig.from_pretrained(source.model, revision=source.revision or "main"))
    except (OSError, ValueError, RuntimeError) as error:
        raise ExpertConfigError(f"expert {group.name!r}: vllm cannot load {source.model!r}: {error}") from error
    layers = base_layers(group.name, source) if group.adapters else None
    runtime = VllmRuntime(source, VllmModel(tokenizer, len(tokenizer), defaults), engine, layers)
    for entry in group.adapters:
        if entry.adapter:
            _register(entry, entry.adapter, runtime.registry)
    held = Shared[Runtime](runtime, runtime.close)
    return {entry.name: LocalExpert(entry, wanted_by(entry), held) for entry in group.entries}


def _register(entry: FleetEntry, source: AdapterSource, registry: VllmRegistry) -> None:
    try:
        registry.load(entry.name, source.path, source.revision)
    except ExpertConfigError as error:
        raise ExpertConfigError(f"expert {entry.name!r}: adapter {source.path!r}: {error}") from error


def base_layers(name: str, source: LocalSource) -> nn.Module:
    """The base's layers without their weights, against which adapters are checked. Raises `ExpertConfigError`."""
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(source.model, revision=source.revision or "main", trust_remote_code=False)
        with torch.device("meta"):
            layers: nn.Module = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except (OSError, ValueError, RuntimeError, KeyError, ImportError) as error:
        raise ExpertConfigError(f"expert {name!r}: model {source.model!r} cannot be read: {error}") from error
    return layers


def engine_arguments(group: ExpertGroup, source: LocalSource) -> dict[str, Any]:
    """vLLM's arguments for a group."""
    lora = {"enable_lora": True, "max_loras": source.max_adapters, "max_lora_rank": _MAX_LORA_RANK}
    return {
        "model": source.model,
        "revision": source.revision,
        "dtype": source.dtype,
        "max_model_len": max(entry.context_length for entry in group.entries),
        "max_num_seqs": source.max_batch,
        "trust_remote_code": False,
        **(lora if group.adapters else {}),
    }


def sampling_arguments(generation: Generation, max_tokens: int) -> dict[str, Any]:
    """vLLM's sampling parameters for a request."""
    sampling = generation.sampling
    return {
        "n": generation.n,
        "max_tokens": max_tokens,
        "temperature": sampling.temperature,
        "top_p": max(sampling.top_p, 1e-6),  # which vLLM wants above 0
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "seed": sampling.seed,
        "presence_penalty": sampling.presence_penalty,
        "frequency_penalty": sampling.frequency_penalty,
        "logit_bias": dict(sampling.logit_bias) or None,
        "stop": list(generation.stop),
        "logprobs": generation.top_logprobs,
        "ignore_eos": generation.ignore_eos,
    }


@dataclass(frozen=True, slots=True)
class VllmModel:
    """What a local expert needs to know of its model."""

    tokenizer: Any
    vocabulary: int
    defaults: SamplingDefaults


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class VllmMixture(Mixture):
    """The base alone, or an adapter by vLLM's own request for it."""

    lora: Any = None


class VllmRegistry:
    """The adapters that vLLM may be asked for; it reads them when they are. `layers` are the base's.

    They are None where vLLM was started without room for adapters, which it cannot make later.
    """

    def __init__(self, layers: nn.Module | None) -> None:
        self._layers = layers
        self._adapters: dict[str, VllmMixture] = {}
        self._numbers = itertools.count(1)

    def load(self, name: str, path: str, revision: str | None = None) -> None:
        """Check an adapter and name it. vLLM reads its folder, so it must stay: URLs are not taken.

        Raises `ExpertConfigError`.
        """
        from vllm.lora.request import LoRARequest

        if "://" in path:
            raise ExpertConfigError(f"adapter {name!r}: vllm reads folders and the hub, not {path!r}")
        if self._layers is None:
            raise ExpertConfigError("its base has no adapters in the fleet file, and vllm makes room at its start only")
        with local_copy(path, revision) as folder:
            rank = max(part.a.shape[0] for part in read_adapter(folder, self._layers).values())
            if rank > _MAX_LORA_RANK:
                raise ExpertConfigError(f"its rank is {rank}, and vllm has room for {_MAX_LORA_RANK}")
            self._adapters[name] = VllmMixture(name, lora=LoRARequest(name, next(self._numbers), str(folder)))

    def unload(self, name: str) -> None:
        """Forget an adapter. Raises `ExpertConfigError` where there is none."""
        if name not in self._adapters:
            raise ExpertConfigError(f"there is no adapter {name!r}")
        del self._adapters[name]

    def mixture(self, wanted: MixtureName, bias: Mapping[str, float]) -> Mixture:
        """The base or one whole adapter. Raises `ExpertRequestError`."""
        if not (wanted.weights or wanted.gate or bias):
            return VllmMixture()
        name = next(iter(wanted.weights), "")
        if wanted.gate or bias or wanted.weights != {name: 1.0}:
            message = "model: this model's engine serves single adapters of weight 1, no mixtures"
            raise ExpertRequestError(message, param="model", code="invalid_value")
        if name not in self._adapters:
            message = f"model: there is no adapter {name[:128]!r} on this base"
            raise ExpertRequestError(message, status=404, param="model", code="model_not_found")
        return self._adapters[name]


class VllmEngine:
    """Runs jobs on vLLM's engine, which batches them; at most `most` answers are under way or wait."""

    def __init__(self, engine: Any, *, max_batch: int, max_queue: int) -> None:
        self.max_batch = max_batch
        self._engine = engine
        self._most = max_batch + max_queue
        self._under_way: dict[asyncio.Task[None], Job] = {}
        self._closed = False

    @property
    def alive(self) -> bool:
        """Whether it still takes jobs."""
        return not self._closed and not getattr(self._engine, "errored", False)

    def check_room(self, tenant: str) -> None:
        """Raise `ExpertUnavailableError` if another job would have to be refused."""
        if not self.alive:
            raise ExpertUnavailableError("the engine has stopped")
        if self._answers >= self._most:
            raise ExpertUnavailableError(f"{self._most} answers are under way", retry_after_s=_RETRY_AFTER_S)

    @property
    def _answers(self) -> int:
        """How many are under way."""
        return sum(job.generation.n for job in self._under_way.values())

    def submit(self, job: Job) -> None:
        """Begin a job, on the event loop of its caller. Raises `ExpertUnavailableError`."""
        self.check_room(job.tenant)
        for i in range(len(job.prompts)):
            task = job.loop.create_task(self._run(job, i))
            self._under_way[task] = job
            task.add_done_callback(self._ended)

    def forget(self, adapter: object) -> None:
        """Nothing: vLLM keeps the adapters that were used last."""

    def close(self) -> None:
        """End vLLM's processes."""
        self._closed = True
        self._engine.shutdown()

    def _ended(self, task: asyncio.Task[None]) -> None:
        job = self._under_way.pop(task)
        if not task.cancelled() and (error := task.exception()):
            job.replies.put_nowait(ExpertUnavailableError(f"vllm failed: {error}"))

    async def _run(self, job: Job, prompt: int) -> None:
        """Generate the choices of one prompt; leaving the loop early makes vLLM stop."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        arguments = sampling_arguments(job.generation, job.max_tokens[prompt])
        parameters = SamplingParams(**arguments, output_kind=RequestOutputKind.DELTA)
        tokens = {"prompt_token_ids": list(job.prompts[prompt])}
        lora = job.mixture.lora if isinstance(job.mixture, VllmMixture) else None
        writer = _Pieces(prompt * job.generation.n, job.generation.top_logprobs)
        outputs = self._engine.generate(tokens, parameters, uuid.uuid4().hex, lora_request=lora)
        async with aclosing(outputs):
            async for output in outputs:
                job.pace.first_token = job.pace.first_token or time.perf_counter()
                job.pace.ended = time.perf_counter()
                job.pace.steps += 1
                job.pace.rows += self._answers
                for completion in output.outputs:
                    job.replies.put_nowait(writer.piece(completion))
                if job.cancelled:
                    return


class _Pieces:
    """vLLM's outputs as pieces of choices, the first of which has the number `first`."""

    def __init__(self, first: int, top: int | None) -> None:
        self._first, self._top = first, top
        self._tokens: dict[int, int] = {}
        self._chars: dict[int, int] = {}

    def piece(self, completion: Any) -> Piece:
        """What an output adds to its choice."""
        index = completion.index
        logprobs = self._logprobs(completion, self._chars.get(index, 0))
        self._tokens[index] = self._tokens.get(index, 0) + len(completion.token_ids)
        self._chars[index] = self._chars.get(index, 0) + len(completion.text)
        reason: FinishReason | None = None
        if completion.finish_reason is not None:
            reason = "length" if completion.finish_reason == "length" else "stop"
        return Piece(self._first + index, completion.text, logprobs, reason, self._tokens[index])

    def _logprobs(self, completion: Any, offset: int) -> list[Logprob]:
        if self._top is None:
            return []
        told = []
        for token, likely in zip(completion.token_ids, completion.logprobs or (), strict=False):
            ranked = sorted(likely.items(), key=lambda item: -item[1].logprob)
            top = [TokenLogprob(other, one.logprob) for other, one in ranked[: self._top]]
            told.append(Logprob(TokenLogprob(token, likely[token].logprob), top, offset))
        return told


class VllmRuntime:
    """What the experts of one model share."""

    def __init__(self, source: LocalSource, model: VllmModel, engine: Any, layers: nn.Module | None) -> None:
        self.model = model
        self.registry = VllmRegistry(layers)
        self.chat = ChatPrompt(model.tokenizer)
        self.engine = VllmEngine(engine, max_batch=source.max_batch, max_queue=source.max_queue)
        self.tokenizing = ThreadPoolExecutor(1, thread_name_prefix="tokenizing")

    async def close(self) -> None:
        """End the engine."""
        await asyncio.get_running_loop().run_in_executor(None, self.engine.close)
        self.tokenizing.shutdown(wait=False, cancel_futures=True)
