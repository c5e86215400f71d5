"""What every fitted router shares: experts' profiles, cost and latency, new experts, save and load.

A router of this project learns one thing, quality and answer length of the experts it was fitted on; everything that
any router needs beside it is here, once. The hot path is plain numpy on arrays made beforehand.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Generic, Self, TypeVar

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, ValidationError

from experts.cards import ExpertCard
from routers import artefact as artefacts
from routers.artefact import AnyArray, Artefact
from routers.card_prior import CardPrior
from routers.checkpoint import Checkpoint
from routers.contracts import Estimates, FloatArray, Observations, Query
from routers.embedder import Embedder, EmbedderConfig, shared_embedder
from routers.errors import ObservationError, RouterConfigError, RouterNotFittedError
from routers.newcomers import Newcomer, shrunk_mean
from routers.profile import Profile, checked, only
from routers.search_space import Choice, Range, search_space

_CHARS_PER_TOKEN = 4.0  # that `Query.input_tokens` was counted with
_MOST_VIEWS = 64


class RouterConfig(BaseModel):
    """The options of a router; each router adds its own. `seed` decides whatever is random in fitting."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    seed: int = 0
    embedder: EmbedderConfig = EmbedderConfig()


ConfigT = TypeVar("ConfigT", bound=RouterConfig)


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a router expects of the K experts it was fitted on, float32 [B, K] each, never NaN."""

    quality: FloatArray
    output_tokens: FloatArray
    uncertainty: FloatArray | None = None


class FittedRouter(ABC, Generic[ConfigT]):
    """Base of routers that are fitted on observations.

    A subclass sets `name`, `config_type` and, where it looks at no text, `embeds = False`; it writes `_fit`,
    `_predict`, `_arrays` and `_restore`, all of them about the K experts of `self.cards` alone, and gets the `Router`
    protocol. `self.profile` has the means of each expert, `self.config` the options. A `_fit` of many steps tells
    `self.checkpoint` of each, so that it can go on after a kill.
    """

    name: str
    embeds: ClassVar[bool] = True
    config_type: type[ConfigT]

    def __init__(self, config: ConfigT | None = None, *, embedder: Embedder | None = None) -> None:
        self.config: ConfigT = config or self.config_type()
        if embedder is not None and embedder.config != self.config.embedder:
            raise RouterConfigError(f"router {self.name!r} wants {self.config.embedder!r}, not {embedder.config!r}")
        self._embedder = embedder
        self._fitted: _Fitted | None = None
        self._newcomers: Mapping[str, Newcomer] = {}
        self._views: dict[tuple[int, ...], _View] = {}
        self.checkpoint = Checkpoint()

    @classmethod
    def search_space(cls) -> dict[str, Range | Choice]:
        """The options worth searching, by name."""
        return search_space(cls.config_type)

    # What a subclass writes

    @abstractmethod
    def _fit(self, table: Observations, embeddings: FloatArray) -> None:
        """Learn from `table` (quality [Q, K], NaN where unobserved) and its texts' `embeddings` [Q, D]."""

    @abstractmethod
    def _predict(self, texts: Sequence[str], embeddings: FloatArray) -> Prediction:
        """What to expect of `self.cards` for B texts with `embeddings` [B, D]. Row by row, whatever the batch."""

    @abstractmethod
    def _arrays(self) -> Mapping[str, AnyArray]:
        """What was learnt, by name."""

    @abstractmethod
    def _restore(self, artefact: Artefact) -> None:
        """Take up what `_arrays` gave. Read through `artefact.array(name, *shape)`, which validates."""

    # The `Router` protocol

    @property
    def cards(self) -> Sequence[ExpertCard]:
        """The K experts fitted on, in the order of all arrays."""
        return self._require().cards

    @property
    def profile(self) -> Profile:
        """The means of the K experts."""
        return self._require().profile

    def fit(self, observations: Observations) -> Self:
        """Learn from `observations`. Experts never observed in it are left to their cards. Returns itself."""
        table = checked(observations)
        embeddings = self._embed(table.texts)
        prior = CardPrior.fit(table.cards, self._descriptions(table.cards), embeddings, table.quality)
        self._fitted = _Fitted(tuple(table.cards), Profile.fit(table), prior)
        self._newcomers, self._views = {}, {}
        self._fit(table, embeddings)
        return self

    def add_expert(self, card: ExpertCard, observations: Observations | None = None) -> None:
        """Learn of a new expert from its card and, where there are any, a few observations, without refitting.

        `observations` may hold other experts too; only the column of `card.name` is read. A second call replaces the
        first. An expert that was fitted on cannot be added.
        """
        fitted = self._require()
        if any(card.name == known.name for known in fitted.cards):
            raise RouterConfigError(f"router {self.name!r} was fitted on {card.name!r} already")
        blank = self._from_card(card)
        newcomer = blank if observations is None else self._from_few(blank, observations)
        self._newcomers = {**self._newcomers, card.name: newcomer}

    def estimate(self, queries: Sequence[Query], cards: Sequence[ExpertCard]) -> Estimates:
        """Estimates of shape [len(queries), len(cards)]; any card may be asked for, at the price that it states."""
        self._require()
        texts = [query.text for query in queries]
        embeddings = self._embed(texts)
        prediction = self._predict(texts, embeddings)
        view = self._view(cards)
        quality = view.quality(prediction.quality, embeddings)
        output_tokens = np.minimum(view.output_tokens(prediction.output_tokens), _limits(queries))
        return Estimates(
            quality=quality,
            cost_usd=view.cost(_input_tokens(queries), output_tokens * _choices(queries)),
            latency_s=output_tokens * view.seconds_per_token,
            uncertainty=None if prediction.uncertainty is None else view.uncertainty(prediction.uncertainty),
        )

    def save(self, folder: Path) -> None:
        """Write `router.json` and `router.safetensors` into `folder`."""
        fitted = self._require()
        newcomers = list(self._newcomers.values())
        header = {
            "router": self.name,
            "config": self.config.model_dump(mode="json"),
            "cards": [card.model_dump(mode="json") for card in fitted.cards],
            "embedding_weights_sha256": self._weights_sha256(),
            "newcomers": [newcomer.card.model_dump(mode="json") for newcomer in newcomers],
        }
        arrays = {**fitted.profile.arrays(), **fitted.prior.arrays(), **self._arrays()}
        for i, newcomer in enumerate(newcomers):
            arrays |= newcomer.arrays(i)
        artefacts.write(folder, header, arrays)

    @classmethod
    def load(cls, folder: Path, *, embedder: Embedder | None = None) -> Self:
        """The router that `save` wrote. Raises `RouterConfigError` where it cannot be that router."""
        artefact = artefacts.read(folder)
        header = artefact.header
        if header["router"] != cls.name:
            artefact.refuse(f"is a {header['router']!r} router, not {cls.name!r}")
        try:
            router = cls(cls.config_type.model_validate(header.get("config")), embedder=embedder)
            cards = [ExpertCard.model_validate(card) for card in header["cards"]]
            new_cards = [ExpertCard.model_validate(card) for card in header["newcomers"]]
        except (ValidationError, KeyError, TypeError) as error:
            raise RouterConfigError(f"router artefact {str(folder)!r} is malformed: {error}") from error
        if header.get("embedding_weights_sha256") != router._weights_sha256():
            artefact.refuse(f"was fitted on embeddings of other weights than those of {router.config.embedder.model!r}")
        router._fitted = _Fitted(
            tuple(cards), Profile.restore(artefact, len(cards)), CardPrior.restore(artefact, cards)
        )
        router._newcomers = {
            card.name: Newcomer.restore(artefact, i, card, len(cards)) for i, card in enumerate(new_cards)
        }
        router._restore(artefact)
        return router

    # Inside

    def _require(self) -> _Fitted:
        if self._fitted is None:
            raise RouterNotFittedError(f"router {self.name!r} was neither fitted nor loaded")
        return self._fitted

    def _embed(self, texts: Sequence[str]) -> FloatArray:
        if not self.embeds:
            return np.zeros((len(texts), 0), np.float32)
        return self._used_embedder().embed(texts)

    def _used_embedder(self) -> Embedder:
        if self._embedder is None:
            self._embedder = shared_embedder(self.config.embedder)
        return self._embedder

    def _weights_sha256(self) -> str | None:
        return self._used_embedder().weights_sha256 if self.embeds else None

    def _descriptions(self, cards: Sequence[ExpertCard]) -> FloatArray:
        return self._embed([card.description or card.name for card in cards])

    def _from_card(self, card: ExpertCard) -> Newcomer:
        fitted = self._require()
        return fitted.prior.newcomer(card, self._descriptions([card])[0], fitted.profile)

    def _from_few(self, blank: Newcomer, observations: Observations) -> Newcomer:
        names = [card.name for card in observations.cards]
        if blank.card.name not in names:
            raise ObservationError(f"the observations have no expert {blank.card.name!r}, only {names!r}")
        column = names.index(blank.card.name)
        seen = np.flatnonzero(np.isfinite(observations.quality[:, column]))
        if not len(seen):
            return blank
        table = only(checked(observations.rows(seen)), blank.card.name)
        embeddings = self._embed(table.texts)
        expected = self._predict(table.texts, embeddings)
        promised = np.clip(expected.quality @ blank.peers + embeddings @ blank.direction + blank.bias, 0, 1)
        lengths = np.maximum(expected.output_tokens @ blank.peers, 1)
        chars = np.array([max(1, len(text)) for text in table.texts], np.float32)
        speed = table.latency_s[:, 0] / np.maximum(table.output_tokens[:, 0], 1)
        few = blank.observed(embeddings, (table.quality[:, 0] - promised).astype(np.float32))
        return replace(
            few,
            output_ratio=shrunk_mean(table.output_tokens[:, 0] / lengths, 1.0),
            tokens_per_char=shrunk_mean(table.input_tokens[:, 0] / chars, blank.tokens_per_char),
            seconds_per_token=shrunk_mean(speed, blank.seconds_per_token),
        )

    def _append_expert(self, card: ExpertCard, row: Profile) -> None:
        """Take `card`, of which a subclass knows as of those fitted on, in as the last of `self.cards`."""
        fitted = self._require()
        self._fitted = _Fitted(
            (*fitted.cards, card),
            fitted.profile.joined(row),
            fitted.prior.joined(card, self._descriptions([card])),
        )
        self._views = {}

    def _keep_experts(self, keep: npt.NDArray[np.intp]) -> None:
        """Go on with the experts at `keep` alone."""
        fitted = self._require()
        self._fitted = _Fitted(tuple(fitted.cards[i] for i in keep), fitted.profile.at(keep), fitted.prior.at(keep))
        self._views = {}

    def _view(self, cards: Sequence[ExpertCard]) -> _View:
        """What is the same for every query to `cards`; kept, since a service asks for the same cards every time."""
        key = tuple(map(id, cards))
        view, known_newcomers = self._views.get(key), self._newcomers
        if view is None or view.made_of is not known_newcomers:
            fitted = self._require()
            places = {card.name: place for place, card in enumerate(fitted.cards)}
            newcomers = {
                place: known_newcomers.get(card.name) or self._from_card(card)
                for place, card in enumerate(cards)
                if card.name not in places
            }
            view = _View.of(cards, places, fitted.profile, newcomers, made_of=known_newcomers)
            self._views = {**dict(list(self._views.items())[-_MOST_VIEWS:]), key: view}
        return view


@dataclass(frozen=True, slots=True)
class _Fitted:
    cards: tuple[ExpertCard, ...]
    profile: Profile
    prior: CardPrior


@dataclass(frozen=True, slots=True)
class _View:
    """A fitted router seen by E cards, which need not be those it was fitted on.

    Column e of `mix` [K, E] says whose estimates are those of card e: one expert fitted on, or the peers of a new one.
    The cards are held, so that the ids under which the view is kept stay theirs; `made_of` are the router's newcomers
    at the time, so that a view is not used after another was added.
    """

    cards: tuple[ExpertCard, ...]
    made_of: Mapping[str, Newcomer]
    newcomers: Mapping[int, Newcomer]
    mix: FloatArray
    output_ratio: FloatArray
    tokens_per_char: FloatArray
    seconds_per_token: FloatArray
    input_price: FloatArray
    output_price: FloatArray

    @classmethod
    def of(
        cls,
        cards: Sequence[ExpertCard],
        places: Mapping[str, int],
        profile: Profile,
        newcomers: Mapping[int, Newcomer],
        *,
        made_of: Mapping[str, Newcomer],
    ) -> Self:
        mix = np.zeros((len(places), len(cards)), np.float32)
        output_ratio, tokens_per_char, seconds_per_token = np.ones((3, len(cards)), np.float32)
        for e, card in enumerate(cards):
            if e in newcomers:
                new = newcomers[e]
                mix[:, e], output_ratio[e] = new.peers, new.output_ratio
                tokens_per_char[e], seconds_per_token[e] = new.tokens_per_char, new.seconds_per_token
            else:
                k = places[card.name]
                mix[k, e] = 1
                tokens_per_char[e], seconds_per_token[e] = profile.tokens_per_char[k], profile.seconds_per_token[k]
        return cls(
            cards=tuple(cards),
            made_of=made_of,
            newcomers=newcomers,
            mix=mix,
            output_ratio=output_ratio,
            tokens_per_char=tokens_per_char,
            seconds_per_token=seconds_per_token,
            input_price=np.array([card.input_price for card in cards], np.float32) * 1e-6,
            output_price=np.array([card.output_price for card in cards], np.float32) * 1e-6,
        )

    def quality(self, known: FloatArray, embeddings: FloatArray) -> FloatArray:
        quality: FloatArray = known @ self.mix
        for e, new in self.newcomers.items():
            quality[:, e] = np.clip(quality[:, e] + embeddings @ new.direction + new.bias, 0, 1)
            quality[:, e] += new.correction(embeddings)
        return np.clip(quality, 0, 1)

    def output_tokens(self, known: FloatArray) -> FloatArray:
        return known @ self.mix * self.output_ratio

    def uncertainty(self, known: FloatArray) -> FloatArray:
        uncertainty: FloatArray = known @ self.mix
        for e, new in self.newcomers.items():
            uncertainty[:, e] = new.uncertainty
        return uncertainty

    def cost(self, input_tokens: FloatArray, output_tokens: FloatArray) -> FloatArray:
        paid_in = input_tokens * (_CHARS_PER_TOKEN * self.tokens_per_char * self.input_price)
        cost: FloatArray = paid_in + output_tokens * self.output_price
        return cost


def _input_tokens(queries: Sequence[Query]) -> FloatArray:
    """Tokens at 4 characters each, [B, 1]."""
    return np.array([q.input_tokens or len(q.text) / _CHARS_PER_TOKEN for q in queries], np.float32)[:, None]


def _choices(queries: Sequence[Query]) -> FloatArray:
    """How many answers each caller wants, [B, 1]."""
    return np.array([q.choices for q in queries], np.float32)[:, None]


def _limits(queries: Sequence[Query]) -> FloatArray:
    """The most output tokens each caller allows, [B, 1]."""
    limits = [math.inf if q.max_output_tokens is None else q.max_output_tokens for q in queries]
    return np.array(limits, np.float32)[:, None]
