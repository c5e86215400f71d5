"""What every expert speaks: OpenAI's wire format in, pieces of OpenAI's wire format out.

Bodies and replies pass through untouched, so that tools, multimodal parts and parameters this project has never heard
of reach the expert and its answer reaches the client.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

if TYPE_CHECKING:
    from experts.fleet import FleetEntry

Endpoint = Literal["chat/completions", "completions", "embeddings"]


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one call, counted by the expert's tokenizer. `cached_input_tokens` is a part of `input_tokens`.

    `estimated` says that the expert told no numbers, so that these were guessed from its words.
    """

    input_tokens: int = 0
    output_tokens: int = 0
    cached_input_tokens: int = 0
    estimated: bool = False


@dataclass(frozen=True, slots=True)
class Work:
    """How an engine of our own came by one answer, for metrics. Seconds count from when the engine was asked.

    `batch_size` is the mean number of answers that grew together, `cache_use` the share of the key-value cache's memory
    that was in use, `tokens_per_s` the speed after the first token; None is not known. `adapter_hits` of its adapters
    were on the device, `adapter_loads` had to be copied there.
    """

    queue_s: float | None
    first_token_s: float
    tokens_per_s: float | None
    batch_size: float
    cache_use: float | None
    adapter_hits: int
    adapter_loads: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertRequest:
    """One call of one expert.

    `id` stands in every piece of the reply (`"id": ...`). `body` is the client's JSON body; an expert reads what it
    understands and overwrites `model` alone. `body["stream"]` says whether the reply comes as chunks.
    `timeout_s` bounds the whole call, in seconds. `tenant` is on whose behalf it is made: an engine is shared fairly.
    """

    id: str
    endpoint: Endpoint
    body: Mapping[str, Any]
    timeout_s: float = 60.0
    tenant: str = ""

    @property
    def stream(self) -> bool:
        """Whether the reply is wanted as chunks."""
        return bool(self.body.get("stream"))


@dataclass(frozen=True, slots=True)
class Part:
    """One piece of a reply: the JSON of one chunk (streaming) or of the whole answer, without SSE framing.

    A reply's last part carries `usage`, whether or not the client asked to see it. A part whose `data` is empty exists
    for its usage alone and is not sent to the client. `expert` says whose it is, where a strategy chose among several.
    """

    data: bytes
    usage: Usage | None = None
    expert: str | None = None
    work: Work | None = None


class Expert(Protocol):
    """Something that answers: a local model, an adapter on a shared base, or a remote API."""

    def generate(self, request: ExpertRequest) -> AsyncIterator[Part]:
        """Answer `request` part by part; closing the iterator stops the generation.

        Raises `ExpertRequestError`, `ExpertUnavailableError` or `ExpertTimeoutError`, possibly after some parts.
        """
        ...

    async def embed(self, request: ExpertRequest) -> Part:
        """Answer an embeddings request; `ExpertRequestError` where the expert cannot."""
        ...

    async def healthy(self) -> bool:
        """Whether it could answer now."""
        ...

    async def close(self) -> None:
        """Free what it holds."""
        ...


@runtime_checkable
class AdapterHost(Protocol):
    """An expert whose model takes adapters while it serves: the base that they are on."""

    async def load_adapter(self, name: str, path: str, revision: str | None = None) -> None:
        """Check an adapter and load it beside the others, or replace it. Raises `ExpertConfigError`."""
        ...

    async def unload_adapter(self, name: str) -> None:
        """Forget an adapter, once what waits for it is done. Raises `ExpertConfigError` where there is none."""
        ...

    def adapted(self, entry: FleetEntry) -> Expert:
        """The expert that answers through the loaded adapter of the entry's name."""
        ...
