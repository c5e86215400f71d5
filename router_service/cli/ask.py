"""Asking a running service for one expert's answer, as the collector needs it."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from experts.expert import Usage
from training.collect import AskError
from training.errors import CollectError
from training.journal import Reply

if TYPE_CHECKING:
    import httpx

    from experts.cards import ExpertCard

_MAY_WORK_LATER = frozenset({408, 409, 425, 429, 500, 502, 503, 504})


class ServiceAsk:
    """Asks through `client`, whose base URL is the service's."""

    def __init__(self, client: httpx.AsyncClient) -> None:
        self._client = client

    async def __call__(
        self, card: ExpertCard, messages: Sequence[Mapping[str, str]], max_tokens: int, temperature: float
    ) -> Reply:
        """The expert's whole answer. Raises `AskError`, or `CollectError` where the service is gone or refuses us."""
        import httpx

        body = {
            "model": card.name,
            "messages": messages,
            "max_tokens": max_tokens,
            "temperature": temperature,
            **({"logprobs": True} if "logprobs" in card.features else {}),
        }
        at, started = time.time(), time.perf_counter()
        try:
            response = await self._client.post("/v1/chat/completions", json=body)
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            raise CollectError(f"no service answers at {self._client.base_url}: {error}") from error
        except httpx.TransportError as error:
            message = f"{type(error).__name__}: {error}".rstrip(": ")
            raise AskError(message, retryable=True, billed=True) from error
        if response.status_code != 200:
            raise _refusal(response)
        text, usage, confidence = _read(response)
        return Reply(
            text=text,
            input_tokens=usage.input_tokens,
            output_tokens=usage.output_tokens,
            latency_s=time.perf_counter() - started,
            cost_usd=card.cost(usage),
            at=at,
            confidence=confidence,
        )


def _refusal(response: httpx.Response) -> Exception:
    status = response.status_code
    message = f"status {status}: {_error_message(response)}"
    if status in (401, 403):
        return CollectError(f"the service refuses us, {message}")
    return AskError(
        message,
        retryable=status in _MAY_WORK_LATER,
        billed=status >= 500 or status == 408,
        retry_after_s=_seconds(response.headers.get("retry-after")),
    )


def _error_message(response: httpx.Response) -> str:
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return response.text[:200]


def _seconds(header: str | None) -> float | None:
    try:
        return None if header is None else float(header)
    except ValueError:
        return None


def _read(response: httpx.Response) -> tuple[str, Usage, float | None]:
    """Text, usage and confidence of an answer in OpenAI's form.

    An answer that cannot be read may have cost money all the same.
    """
    try:
        body: dict[str, Any] = response.json()
        choice = body["choices"][0]
        text = choice["message"].get("content") or ""
        logprobs = [float(token["logprob"]) for token in (choice.get("logprobs") or {}).get("content") or ()]
        tokens = body["usage"]
        details = tokens.get("prompt_tokens_details") or {}
        usage = Usage(
            input_tokens=int(tokens["prompt_tokens"]),
            output_tokens=int(tokens["completion_tokens"]),
            cached_input_tokens=int(details.get("cached_tokens") or 0),
        )
        if min(usage.input_tokens, usage.output_tokens, usage.cached_input_tokens) < 0:
            raise ValueError("negative usage")
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError) as error:
        raise AskError(f"the answer has no text or no usage: {response.text[:200]}", billed=True) from error
    return str(text), usage, math.exp(sum(logprobs) / len(logprobs)) if logprobs else None
