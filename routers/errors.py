"""What can go wrong in routing.

RoutingError
├── RouterConfigError      a router, policy or strategy is configured wrongly (raised before anything is served)
├── RouterNotFittedError   a router was asked for estimates before it was fitted or loaded
├── InvalidRequestError    the client's body cannot be routed; carries OpenAI's error fields
├── ObservationError       a table of observations is malformed; names file, line and field
└── NoExpertError          every expert was removed by a constraint; says by which
"""

from __future__ import annotations


class RoutingError(Exception):
    """Any failure of routing."""


class RouterConfigError(RoutingError):
    """A router, policy or strategy is configured wrongly."""


class RouterNotFittedError(RoutingError):
    """A router was asked for estimates before it was fitted or loaded."""


class InvalidRequestError(RoutingError):
    """The client's body cannot be routed: HTTP status 400, with `param` and `code` of OpenAI's error body."""

    def __init__(self, message: str, param: str, code: str) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class ObservationError(RoutingError):
    """A table of observations is malformed."""


class NoExpertError(RoutingError):
    """No expert is left to answer: `removed` maps each expert's name to the constraint that removed it.

    `param` is the field of the request that the one expert it named cannot serve.
    """

    def __init__(self, message: str, removed: dict[str, str], *, param: str | None = None) -> None:
        super().__init__(message)
        self.removed = removed
        self.param = param
