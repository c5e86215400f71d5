"""The fleet file: which experts there are, what they cost and where they run.

    experts:
      - name: pocket-base                 # any field of `ExpertCard` but `kind`, which follows from the source
        output_price: 0.04
        local: {model: ../../experts/pocket/base}
        resources: {cpus: 1, replicas: 2}
      - name: pocket-dates
        adapter: {base: pocket-base, path: ../../experts/pocket/adapters/dates}
      - name: pocket-calendar
        mixture: {base: pocket-base, adapters: {pocket-dates: 0.7, pocket-arithmetic: 0.3}}
      - name: gpt
        remote: {base_url: https://api.openai.com/v1, model: gpt-4.1-mini, api_key_env: OPENAI_API_KEY}
      - name: search
        encoder: {model: sentence-transformers/all-MiniLM-L6-v2}
      - name: search-medicine             # an adapter on an encoder makes embeddings, as its base does
        adapter: {base: search, path: ../../retriever/adapters/medicine}

A folder is written with a leading `.`, `/` or `~` and is relative to the fleet file; anything else is a hub name.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, HttpUrl, ValidationError, model_validator

from experts.cards import ExpertCard, Kind
from experts.errors import ExpertConfigError
from experts.mixtures import MOST_WEIGHT

POCKET_FLEET = Path(__file__).resolve().parent.parent / "deploy" / "fleets" / "pocket.yaml"
"""The fleet that ships with the project."""

DEFAULT_MODEL = "sentence-transformers/all-MiniLM-L6-v2"
"""The encoder used where none is named; a dependency of this project carries it."""

_SOURCES = ("local", "encoder", "adapter", "mixture", "remote")
_SECRET_HEADERS = {"authorization", "api-key", "x-api-key", "proxy-authorization", "cookie"}


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


def _no_secrets(headers: dict[str, str]) -> dict[str, str]:
    if secret := sorted(name for name in headers if name.lower() in _SECRET_HEADERS):
        raise ValueError(f"{', '.join(secret)}: keys come from the environment, set api_key_env (and api_key_header)")
    return headers


class LocalSource(_Model):
    """A causal language model that transformers loads from a folder or the hub; safetensors only.

    `dtype` "auto" is float32 on a CPU and the checkpoint's own on a GPU; `device` "auto" is the GPU where there is one.
    `max_batch` sequences are generated at once, `max_queue` more may wait; beyond that the expert is unavailable.
    `max_adapters` of its adapters are on the device at once, however many there are. `engine` is the project's own, or
    vLLM where that is installed, for the model and its adapters but not for mixtures.
    """

    model: str = Field(min_length=1)
    revision: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: str = Field(default="auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    max_batch: int = Field(default=64, ge=1)
    max_queue: int = Field(default=256, ge=0)
    max_adapters: int = Field(default=32, ge=1)
    engine: Literal["own", "vllm"] = "own"


class EncoderSource(_Model):
    """A text encoder in sentence-transformers' layout, from a folder or the hub: it and its adapters make embeddings.

    Texts are cut to `max_tokens`; `pooling` is what the model was trained with. The expert
    is unavailable to a request with which more than `max_queue` texts would wait or be computed.
    """

    model: str = Field(default=DEFAULT_MODEL, min_length=1)
    max_tokens: int = Field(default=256, ge=8)
    pooling: Literal["mean", "cls"] = "mean"
    max_queue: int = Field(default=8192, ge=1)


class AdapterSource(_Model):
    """A PEFT adapter (folder, fsspec URL or hub name) on the model of the local entry, or the encoder, named `base`."""

    base: str = Field(min_length=1)
    path: str = Field(min_length=1)
    revision: str | None = None


class MixtureSource(_Model):
    """Adapters of the local entry named `base`, mixed: by weights that are given, or by a gate for each token.

    `adapters` are weights by the adapters' names; `gate` is the folder (or hub name) of a saved mixture, which brings
    adapters of its own. A folder with a router beside the gate (`train glider`) steers each request by its task, which
    the expert named `writer` puts into words; without one the query itself stands for it.
    """

    base: str = Field(min_length=1)
    adapters: dict[str, Annotated[float, Field(ge=-MOST_WEIGHT, le=MOST_WEIGHT, allow_inf_nan=False)]] = {}
    gate: str | None = Field(default=None, min_length=1)
    revision: str | None = None
    writer: str | None = Field(default=None, min_length=1)

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if bool(self.adapters) == bool(self.gate):
            raise ValueError("give adapters with their weights, or a gate")
        return self


class RemoteSource(_Model):
    """An OpenAI-compatible API. Times are seconds.

    The key is read from the environment variable `api_key_env`; it is sent as `Authorization: Bearer <key>`, or bare in
    `api_key_header` if that is another header. `timeout_s` bounds a call with its retries. `task` says which endpoints
    the model has. `stream_usage` is false for the rare server that refuses `stream_options`. `health_path`, after
    `base_url`, is asked with the key whether the API is well; `None` asks nothing and counts it as up.
    """

    base_url: HttpUrl
    model: str = Field(min_length=1)
    api_key_env: str | None = Field(default=None, pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")
    api_key_header: str = Field(default="Authorization", pattern=r"^[A-Za-z0-9-]+$")
    headers: Annotated[dict[str, str], AfterValidator(_no_secrets)] = {}
    timeout_s: float = Field(default=60.0, gt=0, allow_inf_nan=False)
    connect_timeout_s: float = Field(default=5.0, gt=0, allow_inf_nan=False)
    max_retries: int = Field(default=2, ge=0, le=10)
    task: Literal["generation", "embedding"] = "generation"
    stream_usage: bool = True
    health_path: str | None = Field(default="/models", pattern=r"^/[^\s?#]*$")


class Autoscaling(_Model):
    """Between `min` and `max` replicas, so that each has about `target` requests under way.

    A replica is added when there were too few of them for `upscale_delay_s` seconds, and taken away when there were too
    many for `downscale_delay_s`. A request that finds none at all starts one at once.
    """

    min: int = Field(default=1, ge=0)
    max: int = Field(ge=1)
    target: float = Field(default=4.0, gt=0, allow_inf_nan=False)
    upscale_delay_s: float = Field(default=30.0, ge=0, allow_inf_nan=False)
    downscale_delay_s: float = Field(default=600.0, ge=0, allow_inf_nan=False)

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min > self.max:
            raise ValueError(f"min {self.min} is more than max {self.max}")
        return self


class Resources(_Model):
    """What each replica of a deployment gets, and how many replicas there are.

    `gpus` may be a fraction of one, or a whole number of them. `replicas` and `autoscaling` exclude each other.
    """

    cpus: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    gpus: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    replicas: int | None = Field(default=None, ge=1)
    autoscaling: Autoscaling | None = None
    max_ongoing_requests: int = Field(default=64, ge=1)

    @property
    def bounds(self) -> tuple[int, int]:
        """How few and how many replicas there may be."""
        if self.autoscaling:
            return self.autoscaling.min, self.autoscaling.max
        return (self.replicas or 1,) * 2

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.replicas is not None and self.autoscaling is not None:
            raise ValueError("give replicas or autoscaling, not both")
        if self.gpus > 1 and self.gpus != int(self.gpus):
            raise ValueError(f"gpus {self.gpus} is neither a fraction of one nor a whole number")
        return self


class FleetEntry(ExpertCard):
    """An expert's card with its one source (`local`, `encoder`, `adapter`, `mixture`, `remote`) and its resources."""

    local: LocalSource | None = None
    encoder: EncoderSource | None = None
    adapter: AdapterSource | None = None
    mixture: MixtureSource | None = None
    remote: RemoteSource | None = None
    resources: Resources | None = None

    @model_validator(mode="before")
    @classmethod
    def _derive_kind(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        sources = [name for name in _SOURCES if data.get(name) is not None]
        if len(sources) != 1:
            raise ValueError(f"needs exactly one of {', '.join(_SOURCES)}; has {' and '.join(sources) or 'none'}")
        kind = _kind(sources[0], data[sources[0]])
        said = data.get("kind", kind)
        if said != kind and (sources[0], said) != ("adapter", "embedding"):
            raise ValueError(f"kind {data['kind']!r} contradicts its source ({kind}): leave it out")
        return {**data, "kind": said}

    @model_validator(mode="after")
    def _adapter_shares_resources(self) -> Self:
        if self.base and self.resources:
            raise ValueError(f"an adapter runs on its base: give the resources to {self.base!r}")
        return self

    @model_validator(mode="after")
    def _local_features(self) -> Self:
        if not self.remote and (beyond := sorted(self.features & {"tools", "json"})):
            raise ValueError(f"local models cannot serve {' and '.join(beyond)}: leave it out of features")
        return self

    @property
    def base(self) -> str | None:
        """The entry that an adapter or a mixture runs on."""
        source = self.adapter or self.mixture
        return source.base if source else None

    @property
    def card(self) -> ExpertCard:
        """The part of the entry that routers see."""
        return ExpertCard.model_construct(**{name: getattr(self, name) for name in ExpertCard.model_fields})


class ExpertGroup(_Model):
    """What is deployed together: a model or encoder with its adapters, or a remote expert that asked for resources."""

    head: FleetEntry
    adapters: tuple[FleetEntry, ...] = ()

    @property
    def name(self) -> str:
        """The name of its first expert."""
        return self.head.name

    @property
    def entries(self) -> tuple[FleetEntry, ...]:
        """Head and adapters."""
        return (self.head, *self.adapters)

    @property
    def resources(self) -> Resources:
        """The head's resources, or the defaults."""
        return self.head.resources or Resources()


class Fleet(_Model):
    """All experts of a service. Paths are absolute once loaded."""

    experts: tuple[FleetEntry, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _adapters_are_of_their_base(self) -> Self:
        """An adapter's kind follows from its base, which the entry alone does not know."""
        encoders = {entry.name for entry in self.experts if entry.encoder}
        settled = [
            entry.model_copy(update={"kind": "embedding" if entry.adapter.base in encoders else "adapter"})
            if entry.adapter
            else entry
            for entry in self.experts
        ]
        object.__setattr__(self, "experts", tuple(settled))
        return self

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        names = Counter(entry.name for entry in self.experts)
        if double := [name for name, count in names.items() if count > 1]:
            raise ValueError(f"expert {double[0]!r} is there {names[double[0]]} times: names must differ")
        bases = {entry.name for entry in self.experts if entry.local or entry.encoder}
        for entry in self.experts:
            if entry.adapter and entry.adapter.base not in bases:
                known = ", ".join(map(repr, sorted(bases))) or "none"
                raise ValueError(
                    f"expert {entry.name!r}: base {entry.adapter.base!r} is no model or encoder; there are: {known}"
                )
            if entry.mixture:
                self._check_mixture(entry, entry.mixture)
        return self

    def _check_mixture(self, entry: FleetEntry, mixture: MixtureSource) -> None:
        """Raise where a mixture's base is no local model, or its adapters are not adapters of that."""
        models = sorted(other.name for other in self.experts if other.local)
        if mixture.base not in models:
            known = ", ".join(map(repr, models)) or "none"
            raise ValueError(f"expert {entry.name!r}: base {mixture.base!r} is no local model; there are: {known}")
        if mixture.writer and mixture.writer not in {other.name for other in self.experts}:
            raise ValueError(f"expert {entry.name!r}: its writer {mixture.writer!r} is no expert of the fleet")
        own = {other.name for other in self.experts if other.adapter and other.base == mixture.base}
        if unknown := sorted(set(mixture.adapters) - own):
            known = ", ".join(map(repr, sorted(own))) or "none"
            raise ValueError(
                f"expert {entry.name!r}: {unknown[0]!r} is no adapter of {mixture.base!r}; these are: {known}"
            )

    @property
    def cards(self) -> tuple[ExpertCard, ...]:
        """Every expert's card, in the file's order."""
        return tuple(entry.card for entry in self.experts)

    @property
    def groups(self) -> tuple[ExpertGroup, ...]:
        """What is deployed on its own: models and encoders with adapters, remote experts that ask for resources."""
        return tuple(
            ExpertGroup(head=entry, adapters=tuple(e for e in self.experts if e.base == entry.name))
            for entry in self.experts
            if entry.local or entry.encoder or (entry.remote and entry.resources)
        )

    def space(self, entry: FleetEntry) -> str | None:
        """What says whose vectors an expert's can be compared with: equal, of one space. None: it makes none."""
        if entry.kind != "embedding":
            return None
        if entry.adapter:
            entry = next(head for head in self.experts if head.name == entry.adapter.base)
        if entry.encoder:
            return entry.encoder.model_dump_json(exclude={"max_queue"})
        return entry.remote.model if entry.remote else None

    @property
    def proxied(self) -> tuple[FleetEntry, ...]:
        """The remote experts that the ingress calls itself: those that ask for no resources."""
        return tuple(entry for entry in self.experts if entry.remote and not entry.resources)


def load_fleet(path: Path | str) -> Fleet:
    """Read and check a fleet file. Raises `ExpertConfigError` that names file, expert and field."""
    path = Path(path).resolve()
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ExpertConfigError(f"fleet file {str(path)!r} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ExpertConfigError(f"fleet file {str(path)!r} is not YAML: {error}") from error
    try:
        fleet = Fleet.model_validate(data)
    except ValidationError as error:
        raise ExpertConfigError(f"fleet file {str(path)!r}:\n" + "\n".join(_explain(error, data))) from error
    return Fleet(experts=tuple(_resolved(entry, path.parent) for entry in fleet.experts))


def _kind(source: str, value: Any) -> Kind:
    if source == "remote":
        task = value.task if isinstance(value, RemoteSource) else isinstance(value, dict) and value.get("task")
        return "embedding" if task == "embedding" else "remote"
    kinds: dict[str, Kind] = {"local": "local", "encoder": "embedding"}
    return kinds.get(source, "adapter")


def _resolved(entry: FleetEntry, folder: Path) -> FleetEntry:
    """The entry with its path, if it is one, made absolute."""
    if entry.local:
        local = entry.local.model_copy(update={"model": _absolute(entry.local.model, folder)})
        return entry.model_copy(update={"local": local})
    if entry.encoder:
        encoder = entry.encoder.model_copy(update={"model": _absolute(entry.encoder.model, folder)})
        return entry.model_copy(update={"encoder": encoder})
    if entry.adapter:
        adapter = entry.adapter.model_copy(update={"path": _absolute(entry.adapter.path, folder)})
        return entry.model_copy(update={"adapter": adapter})
    if entry.mixture and entry.mixture.gate:
        mixture = entry.mixture.model_copy(update={"gate": _absolute(entry.mixture.gate, folder)})
        return entry.model_copy(update={"mixture": mixture})
    return entry


def _absolute(name: str, folder: Path) -> str:
    return str((folder / Path(name).expanduser()).resolve()) if name.startswith((".", "/", "~")) else name


def _explain(error: ValidationError, data: Any) -> list[str]:
    return [f"  {_where(item['loc'], data)}{item['msg'].removeprefix('Value error, ')}" for item in error.errors()]


def _where(loc: tuple[int | str, ...], data: Any) -> str:
    """`expert 'name': field: ` for pydantic's location of an error."""
    if len(loc) < 2 or loc[0] != "experts" or not isinstance(loc[1], int):
        return ": ".join(map(str, loc)) + (": " if loc else "")
    entry = data["experts"][loc[1]]
    name = repr(entry["name"]) if isinstance(entry, dict) and "name" in entry else f"number {loc[1] + 1}"
    field = ".".join(map(str, loc[2:]))
    return f"expert {name}: " + (f"{field}: " if field else "")
