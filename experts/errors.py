"""What can go wrong with an expert.

ExpertError
├── ExpertConfigError       the fleet file, a card or a folder of weights is wrong (raised before anything is served)
│   └── MixingError         adapters, a gate or a request's mixture do not fit the model (raised before anything runs)
├── ExpertRequestError      the caller's request cannot be answered by this expert; carries OpenAI's error fields
├── ExpertUnavailableError  the expert cannot answer now: connection, overload, crash; another expert may
└── ExpertTimeoutError      the expert did not answer in time; another expert may
"""

from __future__ import annotations


class ExpertError(Exception):
    """Any failure of an expert."""


class ExpertConfigError(ExpertError):
    """A fleet file, a card or a folder of weights is wrong."""


class MixingError(ExpertConfigError):
    """Adapters, a gate or a request's mixture do not fit the model."""


class ExpertRequestError(ExpertError):
    """The request itself is at fault, so no other expert is tried.

    `status` is the HTTP status, `param` and `code` are the fields of OpenAI's error body.
    """

    def __init__(self, message: str, *, status: int = 400, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code


class ExpertUnavailableError(ExpertError):
    """The expert cannot answer now. `retry_after_s` is what it asked for, if it did."""

    def __init__(self, message: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class ExpertTimeoutError(ExpertError):
    """The expert did not answer in time."""
