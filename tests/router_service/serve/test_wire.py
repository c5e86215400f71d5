"""What crosses a handle comes out as it went in."""

from __future__ import annotations

import pickle

import pytest

from experts.errors import (
    ExpertConfigError,
    ExpertError,
    ExpertRequestError,
    ExpertTimeoutError,
    ExpertUnavailableError,
    MixingError,
)
from experts.expert import ExpertRequest, Part, Usage, Work
from router_service.serve.wire import ACCEPTED, pack_error, pack_part, pack_request, unpack_reply, unpack_request

REQUEST = ExpertRequest(
    id="a", endpoint="completions", body={"prompt": "héllo", "stop": None, "n": 1}, timeout_s=1.5, tenant="t"
)
WORK = Work(
    queue_s=0.1, first_token_s=0.2, tokens_per_s=9.0, batch_size=2.5, cache_use=0.5, adapter_hits=1, adapter_loads=2
)


def test_requests_cross() -> None:
    assert unpack_request(pickle.loads(pickle.dumps(pack_request(REQUEST)))) == REQUEST


@pytest.mark.parametrize(
    "part", [Part(b"{}"), Part(b"", Usage(1, 2, 3), work=WORK), Part(b"x" * 70_000, Usage(estimated=True))]
)
def test_parts_cross(part: Part) -> None:
    assert unpack_reply(pickle.loads(pickle.dumps(pack_part(part)))) == part


@pytest.mark.parametrize(
    "error",
    [
        ExpertRequestError("too long", status=422, param="messages", code="context_length_exceeded"),
        ExpertUnavailableError("busy", retry_after_s=2.0),
        ExpertTimeoutError("late"),
        ExpertConfigError("no such folder"),
    ],
)
def test_errors_cross_with_their_fields(error: ExpertError) -> None:
    with pytest.raises(type(error)) as caught:
        unpack_reply(pickle.loads(pickle.dumps(pack_error(error))))
    assert str(caught.value) == str(error)
    assert vars(caught.value) == vars(error)


def test_an_error_of_another_class_counts_as_unavailable() -> None:
    with pytest.raises(ExpertUnavailableError, match="MixingError: no weights"):
        unpack_reply(pack_error(MixingError("no weights")))


def test_the_word_that_a_request_is_in_work_is_an_empty_part() -> None:
    assert unpack_reply(ACCEPTED) == Part(b"")
