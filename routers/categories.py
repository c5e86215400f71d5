"""Categories of queries: a classifier that knows what it does not know.

Two views of a query, stacked: softmax regression on the sentence embedding and the text features, which tells tasks
apart by their wording, and the cosine to the nearest of each category's prototypes (k-means centres of its own
queries), which tells what a category of many topics is made of. How much each counts is fitted on queries that neither
had seen, by their likelihood, so that the probabilities are calibrated (two weights instead of the one temperature of
Guo et al., arXiv 1706.04599).

A query belongs to no category, "general", where its nearest prototype is farther than that of all but a small share of
the train queries, or where its category is too uncertain.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np

from routers.artefact import AnyArray, Artefact
from routers.contracts import FloatArray
from routers.text_features import TextFeatures

GENERAL = "general"

_FOLDS = 4
_LEAST_PER_PROTOTYPE = 8
_REGULARISATION = 10.0  # C of scikit-learn's logistic regression, chosen on the train splits of the public tables
_MOST_WORDS = 4000
_SHARPNESS = 10.0  # of cosines, the unit in which their weight is searched
_WEIGHTS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0)


@dataclass(frozen=True, slots=True)
class _Views:
    """Both views. `centres` [P, D] are unit vectors, `owner` [P] their categories; `weights` [F, C], `bias` [C]."""

    features: TextFeatures
    weights: FloatArray
    bias: FloatArray
    centres: FloatArray
    owner: AnyArray

    @classmethod
    def fit(cls, texts: Sequence[str], embeddings: FloatArray, labels: AnyArray, prototypes: int, seed: int) -> Self:
        features = TextFeatures.fit(texts, seed)
        weights, bias = _regression(_seen(features, texts, embeddings), labels)
        centres, owner = _prototypes(embeddings, labels, prototypes, seed)
        return cls(features, weights, bias, centres, owner)

    def __call__(self, texts: Sequence[str], embeddings: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Log-probabilities [B, C] of the regression, and the cosine to each category's nearest prototype [B, C]."""
        logits = _seen(self.features, texts, embeddings) @ self.weights + self.bias
        logits -= logits.max(1, keepdims=True)
        cosines = embeddings @ self.centres.T
        nearest = np.stack([cosines[:, self.owner == c].max(1, initial=-1) for c in range(len(self.bias))], axis=1)
        return logits - np.log(np.exp(logits).sum(1, keepdims=True)), nearest.astype(np.float32)


@dataclass(frozen=True, slots=True)
class Categories:
    """A fitted classifier into `names` [C]. `mixture` [2] are the weights of the two views.

    What is farther than `least_cosine` from every prototype, or less likely than `least_probability`, is "general".
    """

    names: tuple[str, ...]
    views: _Views
    mixture: FloatArray
    least_cosine: float
    least_probability: float

    @classmethod
    def fit(
        cls,
        texts: Sequence[str],
        embeddings: FloatArray,
        labels: Sequence[str],
        *,
        prototypes: int,
        unknown_share: float,
        least_probability: float,
        seed: int,
    ) -> tuple[Self, FloatArray]:
        """The classifier, and for the train queries what it says of each without having seen it [Q, C + 1].

        The last column is "general". Queries labelled "general" teach where the edge lies, and are no category.
        """
        inside = np.array([label != GENERAL for label in labels])
        names = tuple(sorted({label for label in labels if label != GENERAL}))
        places = np.array([names.index(label) if label != GENERAL else -1 for label in labels])
        log_odds, cosines = _held_out(texts, embeddings, places, inside, prototypes, seed)
        mixture = _mixture(log_odds[inside], cosines[inside], places[inside])
        edge = float(np.quantile(cosines[inside].max(1), unknown_share))
        rows = np.flatnonzero(inside)
        views = _Views.fit([texts[i] for i in rows.tolist()], embeddings[rows], places[rows], prototypes, seed)
        made = cls(names, views, mixture, edge, least_probability)
        return made, made._decide(log_odds, cosines)

    def __call__(self, texts: Sequence[str], embeddings: FloatArray) -> FloatArray:
        """Calibrated probabilities [B, C + 1]: of each category or, where a query belongs to none, 1 for "general"."""
        return self._decide(*self.views(texts, embeddings))

    def _decide(self, log_probabilities: FloatArray, cosines: FloatArray) -> FloatArray:
        found = _mixed(self.mixture, log_probabilities, cosines)
        unknown = (cosines.max(1) < self.least_cosine) | (found.max(1) < self.least_probability)
        whole = np.hstack([found, np.zeros((len(found), 1), np.float32)])
        whole[unknown] = 0
        whole[unknown, -1] = 1
        return whole

    def arrays(self) -> dict[str, AnyArray]:
        """For an artefact, in which the names stand too."""
        views = self.views
        return {
            "categories.weights": views.weights,
            "categories.bias": views.bias,
            "categories.centres": views.centres,
            "categories.owner": views.owner,
            "categories.mixture": self.mixture,
            "categories.edge": np.array([self.least_cosine, self.least_probability], np.float32),
            **views.features.arrays(),
        }

    @classmethod
    def restore(cls, artefact: Artefact, names: Sequence[str]) -> Self:
        """From an artefact."""
        owner = artefact.array("categories.owner", None)
        if len(owner) and not 0 <= owner.min() <= owner.max() < len(names):
            artefact.refuse("has prototypes of a category that it does not name")
        edge = artefact.array("categories.edge", 2)
        views = _Views(
            TextFeatures.restore(artefact),
            artefact.array("categories.weights", None, len(names)),
            artefact.array("categories.bias", len(names)),
            artefact.array("categories.centres", len(owner), None),
            owner,
        )
        return cls(tuple(names), views, artefact.array("categories.mixture", 2), float(edge[0]), float(edge[1]))


def _seen(features: TextFeatures, texts: Sequence[str], embeddings: FloatArray) -> FloatArray:
    """What the regression sees [B, F]; bounded, for a text unlike all others must not be a category beyond doubt."""
    return np.hstack([embeddings, np.clip(features(texts), -1, 1)])


def _held_out(
    texts: Sequence[str], embeddings: FloatArray, labels: AnyArray, inside: AnyArray, prototypes: int, seed: int
) -> tuple[FloatArray, FloatArray]:
    """Both views [Q, C] of every query, by classifiers that had not seen it."""
    from sklearn.model_selection import KFold

    count = int(labels.max()) + 1
    views = np.full((len(texts), count), -np.log(count), np.float32), np.zeros((len(texts), count), np.float32)
    for learn, ask in KFold(_FOLDS, shuffle=True, random_state=seed).split(embeddings):
        learn = learn[inside[learn]]
        missing = np.setdiff1d(np.arange(count), labels[learn])
        learn = np.concatenate([learn, [int(np.flatnonzero(labels == c)[0]) for c in missing]]).astype(np.intp)
        fitted = _Views.fit([texts[i] for i in learn], embeddings[learn], labels[learn], prototypes, seed)
        found = fitted([texts[i] for i in ask], embeddings[ask])
        for view, part in zip(views, found, strict=True):
            view[ask] = part
    return views


def _regression(features: FloatArray, labels: AnyArray) -> tuple[FloatArray, FloatArray]:
    """Softmax regression: weights [F, C] and bias [C]."""
    from sklearn.linear_model import LogisticRegression

    count = int(labels.max()) + 1
    if count == 1:
        return np.zeros((features.shape[1], 1), np.float32), np.zeros(1, np.float32)
    found = LogisticRegression(C=_REGULARISATION, max_iter=300).fit(features, labels)
    weights, bias = found.coef_.T, found.intercept_
    if count == 2:  # scikit-learn then gives one column, of the second class's log-odds
        weights, bias = np.hstack([0 * weights, weights]), np.concatenate([[0.0], bias])
    return weights.astype(np.float32), bias.astype(np.float32)


def _prototypes(embeddings: FloatArray, labels: AnyArray, most: int, seed: int) -> tuple[FloatArray, AnyArray]:
    """Unit vectors [P, D] and their categories [P]."""
    from sklearn.cluster import KMeans

    centres, owner = [], []
    for category in range(int(labels.max()) + 1):
        own = embeddings[labels == category]
        count = max(1, min(most, len(own) // _LEAST_PER_PROTOTYPE))
        centres.append(KMeans(count, n_init=1, random_state=seed).fit(own).cluster_centers_)
        owner += [category] * count
    stacked = np.concatenate(centres)
    lengths = np.linalg.norm(stacked, axis=1, keepdims=True)
    return (stacked / np.maximum(lengths, 1e-9)).astype(np.float32), np.array(owner, np.int64)


def _mixture(log_probabilities: FloatArray, cosines: FloatArray, labels: AnyArray) -> FloatArray:
    """The two views' weights of the highest likelihood."""
    rows = np.arange(len(labels))

    def loss(pair: tuple[float, float]) -> float:
        found = _mixed(np.array(pair, np.float32), log_probabilities, cosines)[rows, labels]
        return float(-np.log(np.maximum(found, 1e-9)).mean())

    return np.array(min(((a, b) for a in _WEIGHTS for b in _WEIGHTS), key=loss), np.float32)


def _mixed(mixture: FloatArray, log_probabilities: FloatArray, cosines: FloatArray) -> FloatArray:
    logits = mixture[0] * log_probabilities + mixture[1] * _SHARPNESS * cosines
    odds = np.exp(logits - logits.max(1, keepdims=True))
    probabilities: FloatArray = (odds / odds.sum(1, keepdims=True)).astype(np.float32)
    return probabilities


def found_categories(texts: Sequence[str], embeddings: FloatArray, count: int, seed: int) -> list[str]:
    """Labels for queries that have none: k-means clusters, named by their number and their most telling words."""
    from sklearn.cluster import KMeans

    count = max(1, min(count, len(texts) // (2 * _LEAST_PER_PROTOTYPE)))
    places = KMeans(count, n_init=4, random_state=seed).fit(embeddings).labels_
    names = _telling_names(texts, places, count)
    return [names[place] for place in places]


def _telling_names(texts: Sequence[str], places: AnyArray, count: int) -> Mapping[int, str]:
    from sklearn.feature_extraction.text import CountVectorizer

    try:
        vectorizer = CountVectorizer(
            stop_words="english", token_pattern=r"[A-Za-z]{3,}", binary=True, max_features=4000
        )
        words = vectorizer.fit_transform(texts)
    except ValueError:  # no text has a word
        return {place: f"{place + 1:02}" for place in range(count)}
    vocabulary, overall = vectorizer.get_feature_names_out(), np.asarray(words.mean(0)).ravel()
    names = {}
    for place in range(count):
        share = np.asarray(words[places == place].mean(0)).ravel()
        telling = vocabulary[np.argsort(overall - share, kind="stable")[:2]]
        names[place] = "-".join([f"{place + 1:02}", *telling])
    return names
