"""What the body of a request asks for, checked. Fields that are not known here are ignored."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from experts.errors import ExpertRequestError

_COMPLETION_MAX_TOKENS = 16  # OpenAI's default for completions; chats are bounded by the context alone
_ROLES = ("system", "developer", "user", "assistant", "tool", "function")
_GREEDY_BELOW = 1e-4  # logits divided by less overflow
_MOST_BIAS = 1e9  # of a gate's scores, which are float32 and must stay finite

_Stop = Annotated[str, Field(min_length=1)]
_Bias = Annotated[float, Field(ge=-100, le=100)]


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingDefaults:
    """What holds where a request says nothing, from the model's generation config."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How tokens are chosen. `top_k` 0, `top_p` 1 and `min_p` 0 leave every token in; `temperature` 0 is greedy."""

    temperature: float
    top_p: float
    top_k: int
    min_p: float
    seed: int | None
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float]

    @property
    def greedy(self) -> bool:
        """Whether the next token is that with the largest logit, whatever came before."""
        return self.temperature == 0 and not (self.presence_penalty or self.frequency_penalty or self.logit_bias)


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """One request. `prompts` are texts, tokens or one conversation; each is answered `n` times.

    `top_logprobs` is how many alternatives of each token are reported besides itself, None if no log-probabilities are.
    `ignore_eos` goes on after the token that ends an answer, as measurements need it. With `gate_load` the answer says
    how much of each adapter its tokens got.
    """

    messages: list[dict[str, Any]] | None
    prompts: list[str] | list[list[int]]
    n: int
    max_tokens: int | None
    stop: tuple[str, ...]
    sampling: Sampling
    top_logprobs: int | None
    stream: bool
    include_usage: bool
    ignore_eos: bool
    gate_load: bool


class _StreamOptions(BaseModel):
    include_usage: bool | None = None


class _Body(BaseModel):
    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, ge=0, le=1)
    top_k: int | None = Field(default=None, ge=-1, lt=2**31)
    min_p: float | None = Field(default=None, ge=0, le=1)
    max_tokens: int | None = Field(default=None, ge=1)
    stop: Annotated[list[_Stop], Field(max_length=4)] | _Stop | None = None
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    n: int | None = Field(default=None, ge=1, le=128)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    logit_bias: dict[str, _Bias] | None = None
    ignore_eos: bool | None = None
    gate_load: bool | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None


class _ChatBody(_Body):
    messages: list[dict[str, Any]] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)


class _CompletionBody(_Body):
    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: int | None = Field(default=None, ge=0, le=5)
    echo: bool | None = None
    suffix: str | None = None


B = TypeVar("B", bound=_Body)


def parse_chat(body: Mapping[str, Any], defaults: SamplingDefaults) -> Generation:
    """Check the body of a `chat/completions` request. Raises `ExpertRequestError`."""
    checked = _checked(_ChatBody, body)
    if checked.top_logprobs is not None and not checked.logprobs:
        raise ExpertRequestError("top_logprobs needs logprobs: true", param="top_logprobs", code="invalid_value")
    max_tokens = checked.max_completion_tokens or checked.max_tokens
    return _generation(
        checked,
        defaults,
        messages=[_text_message(message, f"messages.{i}") for i, message in enumerate(checked.messages)],
        max_tokens=max_tokens,
        top_logprobs=(checked.top_logprobs or 0) if checked.logprobs else None,
    )


def parse_completion(body: Mapping[str, Any], defaults: SamplingDefaults) -> Generation:
    """Check the body of a `completions` request. Raises `ExpertRequestError`."""
    checked = _checked(_CompletionBody, body)
    for name in ("echo", "suffix"):
        if getattr(checked, name):
            raise ExpertRequestError(f"{name} is not supported", param=name, code="unsupported_parameter")
    return _generation(
        checked,
        defaults,
        prompts=_prompts(checked.prompt),
        max_tokens=checked.max_tokens or _COMPLETION_MAX_TOKENS,
        top_logprobs=checked.logprobs,
    )


def gate_bias(body: Mapping[str, Any]) -> dict[str, float]:
    """The request's `gate_bias`: adapter -> what is added to the gate's scores of it, -inf (in JSON null) forbids it.

    Raises `ExpertRequestError`.
    """
    bias = body.get("gate_bias")
    if bias is None:
        return {}
    if not isinstance(bias, Mapping) or not all(value is None or _is_bias(value) for value in bias.values()):
        message = "gate_bias: must be an object of adapters' names with numbers from -1e9 to 1e9, or null to forbid one"
        raise ExpertRequestError(message, param="gate_bias", code="invalid_value")
    return {name: -math.inf if value is None else float(value) for name, value in bias.items()}


def _is_bias(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= _MOST_BIAS


def _checked(schema: type[B], body: Mapping[str, Any]) -> B:
    try:
        return schema.model_validate(body)
    except ValidationError as error:
        first = error.errors()[0]
        param = str(first["loc"][0])
        code = {"missing": "missing_required_parameter"}.get(first["type"], "invalid_value")
        where = ".".join(map(str, first["loc"]))
        raise ExpertRequestError(f"{where}: {first['msg']}", param=param, code=code) from error


def _generation(
    body: _Body,
    defaults: SamplingDefaults,
    *,
    messages: list[dict[str, Any]] | None = None,
    prompts: list[str] | list[list[int]] | None = None,
    max_tokens: int | None,
    top_logprobs: int | None,
) -> Generation:
    return Generation(
        messages=messages,
        prompts=prompts or [],
        n=body.n or 1,
        max_tokens=max_tokens,
        stop=(body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ()),
        sampling=_sampling(body, defaults),
        top_logprobs=top_logprobs,
        stream=bool(body.stream),
        include_usage=bool(body.stream_options and body.stream_options.include_usage),
        ignore_eos=bool(body.ignore_eos),
        gate_load=bool(body.gate_load),
    )


def _sampling(body: _Body, defaults: SamplingDefaults) -> Sampling:
    temperature = defaults.temperature if body.temperature is None else body.temperature
    return Sampling(
        temperature=temperature if temperature >= _GREEDY_BELOW else 0.0,
        top_p=defaults.top_p if body.top_p is None else body.top_p,
        top_k=max(0, defaults.top_k if body.top_k is None else body.top_k),
        min_p=defaults.min_p if body.min_p is None else body.min_p,
        seed=body.seed,
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        logit_bias=_logit_bias(body.logit_bias or {}),
    )


def _logit_bias(bias: Mapping[str, float]) -> dict[int, float]:
    try:
        return {int(token): value for token, value in bias.items()}
    except ValueError as error:
        message = "logit_bias: keys are token ids"
        raise ExpertRequestError(message, param="logit_bias", code="invalid_value") from error


def _prompts(prompt: str | list[str] | list[int] | list[list[int]]) -> list[str] | list[list[int]]:
    """The prompts as a list. Raises `ExpertRequestError` for an empty list."""
    if isinstance(prompt, str):
        return [prompt]
    if not prompt or not all(one or isinstance(one, (int, str)) for one in prompt):
        raise ExpertRequestError("prompt: must not be an empty list", param="prompt", code="invalid_value")
    if isinstance(prompt[0], int):
        return [prompt]
    return prompt


def _text_message(message: dict[str, Any], where: str) -> dict[str, Any]:
    """The message with its content as one text, as chat templates expect it. A developer is what they call system."""
    role = message.get("role")
    if role not in _ROLES:
        known = ", ".join(_ROLES)
        raise ExpertRequestError(f"{where}.role: must be one of {known}", param="messages", code="invalid_value")
    content = _text_content(message.get("content"), where)
    return {**message, "role": "system" if role == "developer" else role, "content": content}


def _text_content(content: object, where: str) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        message = f"{where}.content: must be a string, a list of parts or null"
        raise ExpertRequestError(message, param="messages", code="invalid_value")
    return "".join(_part_text(part, where) for part in content)


def _part_text(part: object, where: str) -> str:
    if isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    kind = part.get("type") if isinstance(part, Mapping) else part
    message = f"{where}.content: this expert reads parts of type 'text' only, not {kind!r}"
    raise ExpertRequestError(message, param="messages", code="unsupported_content")
