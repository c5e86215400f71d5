"""Waiting for what comes a little later."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

import redis

T = TypeVar("T")


def eventually(look: Callable[[], T], seconds: float = 30.0) -> T:
    """The first true value of `look`; what it raises while Redis is away counts as not yet."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            if found := look():
                return found
        except redis.RedisError:
            if time.monotonic() > deadline:
                raise
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {seconds} s")
        time.sleep(0.05)
