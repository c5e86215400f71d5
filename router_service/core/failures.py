"""What the client is told when something below the service fails."""

from __future__ import annotations

from experts.errors import ExpertError, ExpertRequestError, ExpertTimeoutError, ExpertUnavailableError
from router_service.errors import (
    BadRequestError,
    ContextLengthError,
    ExpertRefusedError,
    RequestError,
    StateError,
    UnavailableError,
    UpstreamError,
    UpstreamTimeoutError,
)
from routers.errors import InvalidRequestError, NoExpertError, RoutingError

FAILURES = (RequestError, ExpertError, RoutingError, StateError, TimeoutError)
"""The failures that `to_request_error` knows."""


def to_request_error(error: Exception) -> RequestError:
    """The answer for one of `FAILURES`."""
    match error:
        case RequestError():
            return error
        case ExpertRequestError():
            return ExpertRefusedError(str(error), status=error.status, param=error.param, code=error.code)
        case ExpertTimeoutError():
            return UpstreamTimeoutError(str(error))
        case ExpertUnavailableError(retry_after_s=None):
            return UpstreamError(str(error))
        case ExpertUnavailableError():
            return UnavailableError(str(error), retry_after_s=error.retry_after_s)
        case InvalidRequestError():
            return BadRequestError(str(error), param=error.param, code=error.code)
        case NoExpertError():
            return _no_expert(error)
        case TimeoutError():
            return UpstreamTimeoutError("the request's time is up")
        case StateError():
            return UnavailableError(str(error), retry_after_s=1.0)
        case _:
            return UnavailableError(str(error))


def _no_expert(error: NoExpertError) -> RequestError:
    if error.removed and all("context" in constraint for constraint in error.removed.values()):
        return ContextLengthError(str(error), param="messages")
    return BadRequestError(str(error), param=error.param, code="unsupported_parameter" if error.param else "no_expert")
