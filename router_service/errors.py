"""What can go wrong in the service, each with its HTTP status and the fields of OpenAI's error body.

ServiceError
├── SettingsError            the service is configured wrongly (raised before anything is served)
├── StateError               what is kept in Redis or on disk cannot be read or written
└── RequestError             an answer to the client
    ├── BadRequestError            400  the request is malformed
    │   └── ContextLengthError     400  the prompt is longer than any allowed expert's context
    ├── ExpertRefusedError         4xx  the expert refused the request as it stands
    ├── AuthenticationError        401  no API key, or a wrong one
    ├── ForbiddenOriginError       403  a web page calls a service that has no API keys
    ├── NotAdminError              403  the API key may not change the fleet
    ├── NotFoundError              404  no such route
    │   └── ModelNotFoundError     404  no such expert or policy
    ├── MethodNotAllowedError      405
    ├── SlowBodyError              408  the body did not come in time
    ├── ConflictError              409  the name is taken
    ├── BodyTooLargeError          413
    ├── RateLimitError             429  requests or tokens per minute
    ├── BudgetError                429  the key's or the policy's money is spent
    ├── OverloadError              429  too many requests under way
    ├── UpstreamError              502  the expert failed
    ├── UnavailableError           503  not ready, shutting down, or state is away and limits fail closed
    └── UpstreamTimeoutError       504  the expert did not answer in time
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar


class ServiceError(Exception):
    """Any failure of the service."""


class SettingsError(ServiceError):
    """The service is configured wrongly; says by which variable, and what would be right."""


class StateError(ServiceError):
    """What is kept in Redis or on disk cannot be read or written."""


class RequestError(ServiceError):
    """An answer to the client: `message`, `param` and `code` go into OpenAI's error body, `headers` beside it."""

    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    code: ClassVar[str | None] = None

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.param = param
        self.error_code = code or self.code
        self.headers = dict(headers or {})
        if retry_after_s is not None:
            self.headers["retry-after"] = str(max(1, math.ceil(retry_after_s)))

    @property
    def http_status(self) -> int:
        """The status of the HTTP answer."""
        return self.status

    def body(self) -> dict[str, Any]:
        """OpenAI's error body."""
        return {
            "error": {"message": str(self), "type": self.type, "param": self.param, "code": self.error_code},
        }


class BadRequestError(RequestError):
    """The request is malformed."""

    status = 400
    type = "invalid_request_error"


class ContextLengthError(BadRequestError):
    """The prompt is longer than any allowed expert's context."""

    code = "context_length_exceeded"


class ExpertRefusedError(RequestError):
    """The expert refused the request as it stands; the status is the expert's own (4xx)."""

    type = "invalid_request_error"

    def __init__(self, message: str, *, status: int, param: str | None, code: str | None) -> None:
        super().__init__(message, param=param, code=code)
        self._status = status

    @property
    def http_status(self) -> int:
        """The expert's own status."""
        return self._status


class AuthenticationError(RequestError):
    """No API key, or a wrong one."""

    status = 401
    type = "invalid_request_error"
    code = "invalid_api_key"


class ForbiddenOriginError(RequestError):
    """A web page calls a service that has no API keys."""

    status = 403
    type = "invalid_request_error"
    code = "forbidden_origin"


class NotAdminError(RequestError):
    """The API key may not change the fleet."""

    status = 403
    type = "invalid_request_error"
    code = "not_admin"


class NotFoundError(RequestError):
    """No such route."""

    status = 404
    type = "invalid_request_error"
    code = "not_found"


class ModelNotFoundError(NotFoundError):
    """No such expert or policy."""

    code = "model_not_found"


class MethodNotAllowedError(RequestError):
    """The route has other methods."""

    status = 405
    type = "invalid_request_error"
    code = "method_not_allowed"


class SlowBodyError(RequestError):
    """The body did not come in time."""

    status = 408
    type = "invalid_request_error"
    code = "body_timeout"


class ConflictError(RequestError):
    """The name is taken."""

    status = 409
    type = "invalid_request_error"
    code = "name_taken"


class BodyTooLargeError(RequestError):
    """The body is larger than the service takes."""

    status = 413
    type = "invalid_request_error"
    code = "body_too_large"


class RateLimitError(RequestError):
    """The key's requests or tokens per minute are used up."""

    status = 429
    type = "rate_limit_error"
    code = "rate_limit_exceeded"


class BudgetError(RequestError):
    """The key's or the policy's money is spent."""

    status = 429
    type = "insufficient_quota"
    code = "insufficient_quota"


class OverloadError(RequestError):
    """Too many requests are under way."""

    status = 429
    type = "rate_limit_error"
    code = "overloaded"


class UpstreamError(RequestError):
    """The expert failed."""

    status = 502
    type = "upstream_error"
    code = "upstream_error"


class UnavailableError(RequestError):
    """The service or the expert cannot answer now."""

    status = 503
    type = "server_error"
    code = "unavailable"


class UpstreamTimeoutError(RequestError):
    """The expert did not answer in time."""

    status = 504
    type = "upstream_error"
    code = "upstream_timeout"
