"""Composition of Experts (SambaNova, arXiv 2412.01868): a query's category says which expert answers it.

Two steps that are learnt apart: a classifier into categories (`routers.categories`), calibrated, with "general" for
what is uncertain or out of scope; and a table from category to expert, chosen offline. The table has for each category
the expert of the best mean quality less `cost_weight` times cost or, under a `budget` of mean cost or mean active
parameters, the exact solution of that assignment (`routers.assignment`). Categories are the data's task labels, or
clusters where there are none.

Estimates are the categories' records weighted by the classifier's probabilities; no expert is estimated above the one
that the table names for the likeliest category, so that a policy of quality alone does what the table says, and one
that weighs cost may go below it. The table is `table.yaml` in the artefact, and `expert` in it may be edited by hand.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal, Self

import numpy as np
import yaml
from pydantic import BaseModel, ConfigDict, Field, model_validator

from routers.artefact import AnyArray, Artefact
from routers.assignment import assign
from routers.base import FittedRouter, Prediction, RouterConfig
from routers.categories import GENERAL, Categories, found_categories
from routers.cluster import records
from routers.contracts import FloatArray, Observations
from routers.embedder import Embedder
from routers.errors import ObservationError, RouterConfigError
from routers.profile import checked
from routers.search_space import Range

TABLE_FILE = "table.yaml"
_BELOW = 1e-4  # how far under the table's expert the others are kept: more than what a policy rounds away


class TableBudget(BaseModel):
    """What the table may take on the mean over queries: USD, or active parameters of the expert that answers.

    `active_parameters` are each expert's, in any one unit, which is then the budget's too.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    mean_cost_usd: Annotated[float, Field(gt=0)] | None = None
    mean_active_parameters: Annotated[float, Field(gt=0)] | None = None
    active_parameters: Mapping[str, Annotated[float, Field(gt=0)]] = {}

    @model_validator(mode="after")
    def _is_one(self) -> Self:
        if self.mean_cost_usd is not None and self.mean_active_parameters is not None:
            raise ValueError("a budget is of `mean_cost_usd` or of `mean_active_parameters`, not of both")
        if (self.mean_active_parameters is None) != (not self.active_parameters):
            raise ValueError("`mean_active_parameters` needs `active_parameters`, by expert, and nothing else does")
        return self


class CompositionConfig(RouterConfig):
    """Where categories come from, how they are told apart, and how the table is chosen.

    `categories`: the table's task labels, or `clusters` of its queries (also where it has no labels). `prototypes` per
    category at most. `unknown_share` of the train queries lie beyond the edge of what is known, by choice of that edge;
    a query whose likeliest category is less likely than `least_probability` is "general" too. `shrinkage` in queries.
    """

    categories: Literal["tasks", "clusters"] = "tasks"
    clusters: Annotated[int, Field(ge=1), Range(8, 64, log=True)] = 32
    prototypes: Annotated[int, Field(ge=1), Range(5, 60, log=True)] = 30
    unknown_share: Annotated[float, Field(ge=0, le=0.5)] = 0.05
    least_probability: Annotated[float, Field(ge=0, le=1)] = 0.3
    shrinkage: Annotated[float, Field(ge=0), Range(1.0, 100.0, log=True)] = 20.0
    cost_weight: Annotated[float, Field(ge=0)] = 0.0
    budget: TableBudget = TableBudget()


class CompositionRouter(FittedRouter[CompositionConfig]):
    """Query -> category -> expert."""

    name = "composition"
    config_type = CompositionConfig

    def _fit(self, table: Observations, embeddings: FloatArray) -> None:
        labels = list(table.tasks)
        if self.config.categories == "clusters" or len({*labels} - {"", GENERAL}) < 2:
            labels = found_categories(table.texts, embeddings, self.config.clusters, self.config.seed)
        self._categories, held_out = self._classifier(table.texts, embeddings, [label or GENERAL for label in labels])
        self._fill_table(table, held_out, labels, self.config.budget)

    def retrain_categories(self, texts: Sequence[str], labels: Sequence[str]) -> None:
        """Learn the categories anew, from any labelled texts (`general` is what is out of scope); the table stays.

        Raises `ObservationError` where the labels are not the table's categories.
        """
        names = {*labels} - {GENERAL}
        if names != {*self._categories.names}:
            odd = ", ".join(map(repr, sorted(names ^ {*self._categories.names})))
            raise ObservationError(f"the table and the labels must have the same categories; they differ in {odd}")
        self._categories, _ = self._classifier(texts, self._embed(texts), labels)

    def retrain_table(self, observations: Observations, budget: TableBudget | None = None) -> None:
        """Choose the table anew from observations of the experts fitted on, labelled or not; the categories stay.

        A `budget` given is the router's from now on.
        """
        table = checked(observations)
        if {card.name for card in table.cards} != {card.name for card in self.cards}:
            raise ObservationError("the observations are not of the experts that the router was fitted on")
        order = [[card.name for card in table.cards].index(card.name) for card in self.cards]
        found = self._categories(table.texts, self._embed(table.texts))
        labels = [(*self._categories.names, GENERAL)[place] for place in found.argmax(1)]
        budget = budget or self.config.budget
        self._fill_table(_reordered(table, order), found, labels, budget)
        self.config = self.config.model_copy(update={"budget": budget})

    @property
    def table(self) -> dict[str, str]:
        """Category -> expert, "general" last."""
        names = [card.name for card in self.cards]
        return {category: names[e] for category, e in zip(self._rows, self._table, strict=True)}

    @table.setter
    def table(self, wanted: Mapping[str, str]) -> None:
        names = [card.name for card in self.cards]
        if wanted.keys() != {*self._rows}:
            raise RouterConfigError(f"must have the categories {', '.join(self._rows)}, and no others")
        if lost := sorted({*wanted.values()} - {*names}):
            raise RouterConfigError(f"names {lost}, and the router knows {', '.join(names)}")
        self._table = np.array([names.index(wanted[category]) for category in self._rows], np.int64)

    def categorise(self, texts: Sequence[str]) -> list[tuple[str, float]]:
        """The category of each text, and how likely it is."""
        found = self._categories(texts, self._embed(texts))
        return [(self._rows[place], float(row[place])) for row, place in zip(found, found.argmax(1), strict=True)]

    def save(self, folder: Path) -> None:
        """As every router, with `table.yaml` beside."""
        super().save(folder)
        (folder / TABLE_FILE).write_text(self._table_text(), "utf-8")

    @classmethod
    def load(cls, folder: Path, *, embedder: Embedder | None = None) -> Self:
        """As every router, with the experts that `table.yaml` names now."""
        router = super().load(folder, embedder=embedder)
        try:
            router.table = _read_table(folder / TABLE_FILE)
        except RouterConfigError as error:
            raise RouterConfigError(f"table {str(folder / TABLE_FILE)!r}: {error}") from error
        return router

    # Inside

    @property
    def _rows(self) -> tuple[str, ...]:
        return (*self._categories.names, GENERAL)

    def _classifier(
        self, texts: Sequence[str], embeddings: FloatArray, labels: Sequence[str]
    ) -> tuple[Categories, FloatArray]:
        config = self.config
        return Categories.fit(
            texts,
            embeddings,
            labels,
            prototypes=config.prototypes,
            unknown_share=config.unknown_share,
            least_probability=config.least_probability,
            seed=config.seed,
        )

    def _fill_table(self, table: Observations, found: FloatArray, labels: Sequence[str], budget: TableBudget) -> None:
        """Records from the queries' own labels, shares and costs from where the classifier will send such queries."""
        chosen = np.eye(len(self._rows), dtype=np.float32)[found.argmax(1)]
        member = np.eye(len(self._rows), dtype=np.float32)[[self._rows.index(label or GENERAL) for label in labels]]
        member[:, -1] = chosen[:, -1]
        profile, shrinkage = self.profile, self.config.shrinkage
        mean_cost = np.nanmean(table.cost_usd, axis=0)
        self._quality = np.clip(records(member, table.quality, profile.quality, shrinkage), 0, 1)
        self._output_tokens = records(member, table.output_tokens, profile.output_tokens, shrinkage)
        self._cost = np.maximum(records(chosen, table.cost_usd, mean_cost.astype(np.float32), shrinkage), 0)
        self._shares = chosen.mean(0, dtype=np.float64)
        self._table = self._solved(records(chosen, table.quality, profile.quality, shrinkage), budget)

    def _solved(self, quality: FloatArray, budget: TableBudget) -> AnyArray:
        cost = self._cost.astype(np.float64)
        value = quality.astype(np.float64) - self.config.cost_weight * cost
        if budget.mean_active_parameters is None:
            return assign(self._shares, value, cost, budget.mean_cost_usd)
        names = [card.name for card in self.cards]
        if lost := sorted({*names} - budget.active_parameters.keys()):
            raise RouterConfigError(f"router 'composition': `active_parameters` lacks {', '.join(lost)}")
        sizes = np.array([budget.active_parameters[name] for name in names])
        return assign(self._shares, value, np.broadcast_to(sizes, value.shape), budget.mean_active_parameters)

    def _predict(self, texts: Sequence[str], embeddings: FloatArray) -> Prediction:
        found = self._categories(texts, embeddings)
        quality = found @ self._quality
        named = self._table[found.argmax(1)]
        rows = np.arange(len(quality))
        highest = quality[rows, named]
        quality = np.minimum(quality, np.maximum(highest - _BELOW, 0)[:, None])
        quality[rows, named] = highest
        return Prediction(quality.astype(np.float32), np.maximum(found @ self._output_tokens, 1).astype(np.float32))

    def _arrays(self) -> Mapping[str, AnyArray]:
        return {
            "composition.quality": self._quality,
            "composition.output_tokens": self._output_tokens,
            "composition.cost": self._cost,
            "composition.shares": self._shares,
            "composition.table": self._table,
            "composition.names": np.frombuffer("\n".join(self._categories.names).encode(), np.uint8),
            **self._categories.arrays(),
        }

    def _restore(self, artefact: Artefact) -> None:
        names = bytes(artefact.array("composition.names", None)).decode().split("\n")
        shape = len(names) + 1, len(self.cards)
        self._categories = Categories.restore(artefact, names)
        self._quality = artefact.array("composition.quality", *shape)
        self._output_tokens = artefact.array("composition.output_tokens", *shape)
        self._cost = artefact.array("composition.cost", *shape)
        self._shares = artefact.array("composition.shares", shape[0])
        self._table = artefact.array("composition.table", shape[0])
        if not 0 <= self._table.min() <= self._table.max() < len(self.cards):
            artefact.refuse("has a table that names an expert it does not know")

    def _table_text(self) -> str:
        """The table for people: by falling share of the queries, "general" last."""
        order = sorted(range(len(self._rows)), key=lambda c: (self._rows[c] == GENERAL, -self._shares[c]))
        return _TABLE_HEAD + "".join(f"  {_quoted(self._rows[c])}: {{{self._row(c)}}}\n" for c in order)

    def _row(self, category: int) -> str:
        expert = int(self._table[category])
        return (
            f"expert: {_quoted(self.cards[expert].name)}, share: {self._shares[category]:.3f}, "
            f"quality: {self._quality[category, expert]:.3f}, cost_usd: {self._cost[category, expert]:.3g}"
        )


_TABLE_HEAD = """\
# Which expert answers which category of queries. `expert` may be edited: it is read when the router is loaded.
# The rest says what was observed: the category's share of the queries, the expert's mean quality and cost (USD) there.
categories:
"""


def _quoted(text: str) -> str:
    """A string as YAML that means this string and nothing else: bare where that is safe."""
    return (
        text if re.fullmatch(r"[A-Za-z][A-Za-z0-9._/-]*", text) and yaml.safe_load(text) == text else json.dumps(text)
    )


def _read_table(path: Path) -> dict[str, str]:
    """Category -> expert. Raises `RouterConfigError`."""
    try:
        found = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RouterConfigError(f"cannot be read: {error}") from error
    rows = found.get("categories") if isinstance(found, dict) else None
    if not isinstance(rows, dict):
        raise RouterConfigError("must have `categories`, an object")
    wrong = [name for name, row in rows.items() if not isinstance(row, dict) or not isinstance(row.get("expert"), str)]
    if wrong:
        raise RouterConfigError(f"category {wrong[0]!r} must name its `expert`")
    return {str(name): row["expert"] for name, row in rows.items()}


def _reordered(table: Observations, order: Sequence[int]) -> Observations:
    columns = np.asarray(order, np.intp)
    return Observations(
        ids=table.ids,
        texts=table.texts,
        tasks=table.tasks,
        cards=[table.cards[i] for i in columns],
        quality=table.quality[:, columns],
        cost_usd=table.cost_usd[:, columns],
        input_tokens=table.input_tokens[:, columns],
        output_tokens=table.output_tokens[:, columns],
        latency_s=table.latency_s[:, columns],
    )
