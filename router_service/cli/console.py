"""What commands share: two consoles, JSON for programs, and the error that ends a command with one line."""

from __future__ import annotations

import json
import sys
from typing import Any

from rich.console import Console

out = Console()
errors = Console(stderr=True)


class CommandError(Exception):
    """Ends the command: the message goes to stderr on one line, `status` is the exit status."""

    def __init__(self, message: str, *, status: int = 1) -> None:
        super().__init__(message)
        self.status = status


def write_json(value: Any) -> None:
    """One JSON document on stdout, for programs: no colour, no wrapping. Raises `ValueError` for NaN and infinity."""
    sys.stdout.write(json.dumps(value, ensure_ascii=False, allow_nan=False, indent=2) + "\n")
