"""Which expert answers which category: the exact solution under a budget of the mean over queries."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from routers.artefact import AnyArray
from routers.errors import RouterConfigError

Floats = npt.NDArray[np.floating]


def assign(shares: Floats, value: Floats, price: Floats, budget: float | None) -> AnyArray:
    """The expert of each category, int64 [C], of the highest mean `value` [C, E] whose mean `price` [C, E] fits.

    `shares` [C] are the categories' shares of the queries. Without a budget each category has its best expert, the
    cheapest of those that are equal. With one, so has a category of share 0, which the mean says nothing of, among the
    experts that fit the budget by themselves (the cheapest where none does). Raises `RouterConfigError` where nothing
    fits the budget, saying what would.
    """
    if budget is None:
        return _best(value, price)
    least = float(shares @ price.min(1))
    if least > budget:
        raise RouterConfigError(f"a budget of {budget:g} is too small: the cheapest table takes {least:g}")
    fits = price <= np.maximum(budget, price.min(axis=1, keepdims=True))
    return np.where(shares > 0, _solve(shares, value, price, budget), _best(np.where(fits, value, -np.inf), price))


def _best(value: Floats, price: Floats) -> AnyArray:
    order = np.lexsort((price.T, -value.T), axis=0)
    return np.asarray(order[0], np.int64)


def _solve(shares: Floats, value: Floats, price: Floats, budget: float) -> AnyArray:
    """Mixed-integer programming: x[c, e] is 1 where expert e answers category c."""
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array, kron

    categories, experts = value.shape
    scale = budget or 1.0  # prices are tiny numbers, and values may be close: the solver's tolerances are absolute
    gain = shares[:, None] * (value - value.min(axis=1, keepdims=True))
    one_each = LinearConstraint(csr_array(kron(np.eye(categories), np.ones((1, experts)))), 1, 1)
    affordable = LinearConstraint((shares[:, None] * price / scale).reshape(1, -1), -np.inf, budget / scale)
    found = milp(
        -(gain / (gain.max() or 1.0)).ravel(),
        constraints=[one_each, affordable],
        integrality=np.ones(value.size),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": 0},  # it would be content with 1e-4
    )
    if found.x is None:
        raise RouterConfigError(f"no table was found within a budget of {budget:g}: {found.message}")
    return np.asarray(found.x.reshape(value.shape).argmax(1), np.int64)
