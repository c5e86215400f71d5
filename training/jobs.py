"""Run a command as a Ray job: what `ray job submit` does, with its log followed and its end reported.

    ray job submit --address http://127.0.0.1:8265 -- router-service train knn --observations DIR --out DIR

The cluster must run Ray's dashboard, which is the job server (`ray start --head --include-dashboard=true`; `ray[serve]`
brings all that it needs). Folders named in the command must be on a file system that both machines share.
"""

from __future__ import annotations

import asyncio
import os
import shlex
import time
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from training.errors import SubmitError

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
_POLL_S = 0.5
_START_S = 60.0  # a cluster that has just been started may need as long to take its first job


def job_server(address: str | None) -> JobSubmissionClient:
    """The job server at `address`, or at `RAY_ADDRESS`, or on this machine. Raises `SubmitError` where none answers."""
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    address = address or os.environ.get("RAY_ADDRESS") or DEFAULT_ADDRESS
    # Ray lets RAY_ADDRESS win over the address it is given; this variable wins over both.
    os.environ["RAY_API_SERVER_ADDRESS"] = address
    try:
        try:
            return JobSubmissionClient(address)
        except AuthenticationError:
            return JobSubmissionClient(address, headers={"Authorization": f"Bearer {_token()}"})
    except AuthenticationError as error:
        raise SubmitError(
            f"the Ray cluster at {address} asks for a token: set RAY_AUTH_TOKEN to what `ray get-auth-token` says there"
        ) from error
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise SubmitError(
            f"no Ray job server answers at {address}: {error}. Start Ray with its dashboard "
            "(ray start --head --include-dashboard=true), or name another with --address or RAY_ADDRESS"
        ) from error


def _token() -> str:
    """The cluster's token, from where Ray itself looks for it; empty where there is none."""
    if token := os.environ.get("RAY_AUTH_TOKEN"):
        return token
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token").expanduser()
    return path.read_text().strip() if path.is_file() else ""


def submit(server: JobSubmissionClient, command: Sequence[str], working_dir: Path | None = None) -> str:
    """Hand `command` to the cluster; returns the job's id, by which `ray job logs|status|stop` know it.

    `working_dir` is uploaded and is the command's folder there, if given. Raises `SubmitError`.
    """
    runtime_env = {"working_dir": str(working_dir)} if working_dir else {}
    deadline = time.monotonic() + _START_S
    while True:
        try:
            return str(server.submit_job(entrypoint=shlex.join(command), runtime_env=runtime_env))
        except (RuntimeError, ValueError, OSError) as error:
            # The job server answers some seconds before the agent that starts jobs does.
            if "No available agent" not in str(error) or time.monotonic() > deadline:
                raise SubmitError(f"the cluster refused the job: {error}") from error
            time.sleep(_POLL_S)


async def follow(server: JobSubmissionClient, job_id: str, on_log: Callable[[str], None]) -> None:
    """Pass the job's log on as it is written and return when it has succeeded; `SubmitError` when it has not.

    A connection that breaks is made again, and the log goes on where it was.
    """
    seen = 0
    while True:
        try:
            async for text in _tail(server, job_id, skip=seen):
                seen += len(text)
                on_log(text)
        except (RuntimeError, OSError) as error:
            on_log(f"the job's log broke off ({error}), following again\n")
        info = await asyncio.to_thread(server.get_job_info, job_id)
        if info.status.is_terminal():
            break
        await asyncio.sleep(_POLL_S)
    if info.status != "SUCCEEDED":
        raise SubmitError(f"job {job_id} ended as {info.status}: {info.message}")


async def _tail(server: JobSubmissionClient, job_id: str, skip: int) -> AsyncIterator[str]:
    async for text in server.tail_job_logs(job_id):
        if fresh := text[skip:]:
            yield fresh
        skip = max(0, skip - len(text))
