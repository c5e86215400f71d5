"""The command line as a person and as a program use it: what it prints, and its exit status."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.conftest import LOCAL, Stack

pytestmark = pytest.mark.slow


def run(*arguments: str, stdin: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "router_service", *arguments]
    variables = {**os.environ, "COLUMNS": "200", **environment}
    return subprocess.run(command, input=stdin, capture_output=True, text=True, env=variables, timeout=60, check=False)


def test_query_streams_the_answer_and_the_trace(stack: Stack) -> None:
    done = run("query", "-m", "fast", "--trace", "What is six times seven?", ROUTER_URL=stack.service.url)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("The answer is 42.\n")
    assert "the caller named the expert" in done.stdout


def test_query_reads_stdin_and_prints_json(stack: Stack) -> None:
    done = run("query", "--json", "--max-tokens", "8", stdin="What is 2 + 3?\n", ROUTER_URL=stack.service.url)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["model"] == LOCAL


def test_route_shows_the_ranking(stack: Stack) -> None:
    decision = json.loads(run("route", "--json", "What is 2 + 3?", ROUTER_URL=stack.service.url).stdout)
    assert [candidate["expert"] for candidate in decision["ranking"]] == [LOCAL, "fast"]
    table = run("route", "What is 2 + 3?", ROUTER_URL=stack.service.url).stdout
    assert table.index(LOCAL) < table.index("it is not among the experts allowed")


def test_experts_and_policies_of_a_service(stack: Stack) -> None:
    experts = json.loads(run("experts", "--json", "--url", stack.service.url).stdout)
    assert {LOCAL, "fast"} <= {expert["name"] for expert in experts}
    policies = json.loads(run("policies", "--json", "--url", stack.service.url).stdout)
    assert {"auto", "auto:remote-first"} <= {policy["name"] for policy in policies}
    assert LOCAL in run("experts", "--url", stack.service.url).stdout


def test_a_service_that_is_not_there_is_one_line() -> None:
    done = run("query", "hello", "--url", "http://127.0.0.1:9")
    assert done.returncode == 1
    assert (
        done.stderr == "error: nothing answers at http://127.0.0.1:9: is the service running? (router-service serve)\n"
    )


def test_an_unknown_model_is_one_line(stack: Stack) -> None:
    done = run("query", "-m", "no-such", "hello", "--url", stack.service.url)
    assert done.returncode == 2
    assert done.stderr.startswith("error: 404: there is no model 'no-such'")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "environment", "said"),
    [
        (("--host", "0.0.0.0"), {}, "host '0.0.0.0' is not loopback: set ROUTER_API_KEYS"),
        (("--fleet", "no-such.yaml"), {}, "no-such.yaml' cannot be read"),
        (("--policies", "no-such"), {}, "folder 'no-such' has no policy"),
        (("--port", "99999"), {}, "PORT: Input should be less than or equal to 65535"),
        ((), {"ROUTER_API_KEYS": "secret"}, "entry 1 is not name:key"),
    ],
)
def test_serve_refuses_a_wrong_configuration_before_anything_starts(
    arguments: tuple[str, ...], environment: dict[str, str], said: str, tmp_path: Path
) -> None:
    done = run("serve", "--data", str(tmp_path / "data"), *arguments, **environment)
    assert done.returncode == 2
    assert said in done.stderr
    assert not (tmp_path / "data").exists()


def test_serve_says_that_its_port_is_in_use(stack: Stack, tmp_path: Path) -> None:
    port = stack.service.url.rsplit(":", 1)[1]
    done = run("serve", "--port", port, "--data", str(tmp_path / "data"))
    assert done.returncode == 2
    assert done.stderr == f"error: port {port} on 127.0.0.1 is in use: choose another with --port\n"


def test_files_are_checked_without_a_service(tmp_path: Path) -> None:
    fleet = tmp_path / "fleet.yaml"
    fleet.write_text("experts: [{name: a, remote: {base_url: 'http://127.0.0.1:9/v1', model: m, modle: x}}]")
    done = run("experts", "check", str(fleet))
    assert done.returncode == 2
    assert "expert 'a': remote.modle" in done.stderr
    policy = tmp_path / "frugal.yaml"
    policy.write_text("{name: frugal, router: {name: no-such}}")
    done = run("policies", "check", str(policy))
    assert done.returncode == 2
    assert "no router is named 'no-such'" in done.stderr
    policy.write_text("{name: frugal, router: {name: random}}")
    assert run("policies", "check", str(policy)).returncode == 0
