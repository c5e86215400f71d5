"""Log lines as JSON."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import orjson
import pytest

from router_service.log import PACKAGES, configure_logging


@pytest.fixture
def loggers() -> Iterator[None]:
    ours = [logging.getLogger(name) for name in PACKAGES]
    before = [(logger.handlers, logger.propagate, logger.level) for logger in ours]
    yield
    for logger, (handlers, propagate, level) in zip(ours, before, strict=True):
        logger.handlers, logger.propagate = handlers, propagate
        logger.setLevel(level)


@pytest.mark.usefixtures("loggers")
def test_lines_are_json_with_the_stack_of_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging(as_json=True)
    logger = logging.getLogger("router_service.test")
    logger.info("redis is %s\nagain", "up")
    try:
        raise ValueError("bad")
    except ValueError:
        logger.exception("a request failed")
    logging.getLogger("somebody.else").info("not of interest")
    first, second = map(orjson.loads, capsys.readouterr().err.splitlines())
    assert (first["level"], first["logger"], first["message"]) == ("info", "router_service.test", "redis is up\nagain")
    assert first["time"].endswith("+00:00")
    assert "ValueError: bad" in second["stack"]


@pytest.mark.usefixtures("loggers")
def test_lines_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging(as_json=False)
    logging.getLogger("router_service.test").warning("redis is away")
    assert capsys.readouterr().err.endswith("WARNING router_service.test: redis is away\n")
