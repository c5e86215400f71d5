"""The command line without a service: help at once, and errors on one line."""

from __future__ import annotations

import subprocess
import sys

import pytest
from typer.testing import CliRunner

from router_service.cli import app

HEAVY = ("httpx", "pydantic", "numpy", "ray", "torch", "redis", "aiohttp", "yaml")


def test_nothing_heavy_is_imported_for_help() -> None:
    script = f"import sys, router_service.cli; print([name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize(
    "command",
    [
        ("serve",),
        ("query",),
        ("route",),
        ("experts",),
        ("experts", "check"),
        ("policies",),
        ("policies", "check"),
        ("policies", "tune"),
        ("train", "categories"),
        ("train", "table"),
        ("bench", "proxy"),
        ("bench", "first-token"),
        ("bench", "routing"),
        ("bench", "strategies"),
    ],
)
def test_every_command_has_help_with_an_example(command: tuple[str, ...]) -> None:
    result = CliRunner().invoke(app, [*command, "--help"], env={"COLUMNS": "160"})
    assert result.exit_code == 0
    assert f"router-service {' '.join(command)}" in result.output
    assert "Example" in result.output


def test_version() -> None:
    assert CliRunner().invoke(app, ["--version"]).output.count(".") == 2


def test_query_without_a_question_is_an_error_of_one_line() -> None:
    command = [sys.executable, "-m", "router_service", "query", "-"]
    done = subprocess.run(command, input="  \n", capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: no question: stdin is empty\n"
