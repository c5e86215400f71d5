"""Log lines on stderr: for people, or (`ROUTER_LOG_JSON`) one JSON object a line. Never keys, never prompts."""

from __future__ import annotations

import logging
from datetime import UTC, datetime
from typing import Any

import orjson

PACKAGES = ("router_service", "routers", "experts")

_TEXT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


class JsonFormatter(logging.Formatter):
    """Time (UTC), level, logger, message and, for an error that was caught, its stack."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as one line of JSON."""
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["stack"] = self.formatException(record.exc_info)
        return orjson.dumps(line).decode()


def configure_logging(*, as_json: bool, level: int = logging.INFO) -> None:
    """Send our own packages' log to stderr; other libraries' log is left to whoever hosts the service."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if as_json else logging.Formatter(_TEXT))
    for name in PACKAGES:
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)
