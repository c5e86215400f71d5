"""A real Redis for each test that asks for one."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.router_service.fakes import RedisProcess


@pytest.fixture
def redis_server() -> Iterator[RedisProcess]:
    folder = Path(tempfile.mkdtemp(prefix="rs"))  # short: a unix socket's path may have a hundred bytes
    server = RedisProcess(folder)
    server.start()
    yield server
    server.stop()
    shutil.rmtree(folder)
