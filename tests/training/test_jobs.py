"""Training as a Ray job: a real Ray with its dashboard, and a real service under load that takes the artefact over."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from transformers import AutoModelForCausalLM

from experts.mixing import load_mixture
from router_service.serve.environment import free_ports
from tests.experts.embedding.encoders import save_encoder
from tests.experts.models import save_model
from tests.experts.upstream import run_upstream
from tests.training.glider.pocket_tasks import ADAPTERS, BASE, pocket_tasks
from tests.training.retriever.corpora import save_corpus
from tests.training.tables import CARDS, small_table
from training.errors import SubmitError
from training.jobs import job_server
from training.manifest import Manifest
from training.observations import load_table
from training.pocket.fleet import FLEET
from training.pocket.grading import sample
from training.work_folder import read_report

COMMAND = [sys.executable, "-m", "router_service"]
PATIENCE_S = 900.0


@pytest.fixture(scope="module")
def ray_head() -> Iterator[dict[str, str]]:
    """The environment in which commands find a Ray that has a job server."""
    folder = tempfile.mkdtemp(prefix="jobs-", dir="/tmp")  # Ray's sockets need a short path
    port, dashboard, agent, client = free_ports(4)
    environment = {
        **os.environ,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_raylet_start_wait_time_s": f"{PATIENCE_S:.0f}",
        "RAY_DASHBOARD_STARTUP_TIMEOUT_S": f"{PATIENCE_S:.0f}",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    ray = str(Path(sys.executable).with_name("ray"))
    ports = [f"--port={port}", f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}"]
    options = ["--include-dashboard=true", "--num-cpus=2", f"--object-store-memory={100 << 20}", f"--temp-dir={folder}"]
    command = [ray, "start", "--head", "--block", *ports, f"--ray-client-server-port={client}", *options]
    with Running([*command, "--node-ip-address=127.0.0.1"], environment) as head:
        address = f"http://127.0.0.1:{dashboard}"
        headers = {"authorization": f"Bearer {environment['RAY_AUTH_TOKEN']}"}
        head.wait_for(lambda: httpx.get(f"{address}/api/version", headers=headers).is_success)
        yield {**environment, "RAY_ADDRESS": address}
    shutil.rmtree(folder, ignore_errors=True)


class Running:
    """A process that is expected to run on; what it says is shown when it does not."""

    def __init__(self, command: list[str], environment: dict[str, str]) -> None:
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 -- lives as long as the process
        self._process = subprocess.Popen(command, env=environment, stdout=self._said, stderr=subprocess.STDOUT)

    def __enter__(self) -> Running:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            raise
        finally:
            self._said.close()

    def wait_for(self, condition: Callable[[], bool]) -> None:
        """Wait until `condition`, which may fail to connect until then."""
        deadline = time.monotonic() + PATIENCE_S
        while self._process.poll() is None and time.monotonic() < deadline:
            with suppress(httpx.TransportError):
                if condition():
                    return
            time.sleep(0.2)
        self._said.seek(0)
        pytest.fail(self._said.read().decode())


def swapped(table: Path, folder: Path) -> Path:
    """The same table with the two experts' names exchanged, so that whoever learns from it chooses the other one."""
    text = (table / "observations.jsonl").read_text()
    text = text.replace('"sums": {', '"_": {').replace('"words": {', '"sums": {').replace('"_": {', '"words": {')
    folder.mkdir()
    (folder / "observations.jsonl").write_text(text)
    (folder / "experts.json").write_text((table / "experts.json").read_text())
    return folder


async def train(environment: dict[str, str], *arguments: str, trainer: str = "knn") -> dict[str, Any]:
    """Runs `router-service train TRAINER ... --json`; its manifest."""
    command = [*COMMAND, "train", trainer, *arguments, "--json"]
    process = await asyncio.create_subprocess_exec(*command, env=environment, stdout=asyncio.subprocess.PIPE)
    output, _ = await process.communicate()
    assert process.returncode == 0
    manifest: dict[str, Any] = json.loads(output)
    return manifest


class Load:
    """Asks the service one question again and again; counts whole answers and failures, remembers who answered."""

    def __init__(self, url: str) -> None:
        self.outcomes: Counter[str] = Counter()
        self.experts: list[str] = []
        self._url = url

    @asynccontextmanager
    async def from_clients(self, count: int) -> AsyncIterator[None]:
        tasks = [asyncio.create_task(self._ask(stream=bool(i % 2))) for i in range(count)]
        yield
        for task in tasks:
            task.cancel()
        done = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(result, asyncio.CancelledError) for result in done), done

    async def more(self, count: int) -> None:
        """Wait for `count` more answers."""
        enough = len(self.experts) + count
        async with asyncio.timeout(PATIENCE_S):
            while len(self.experts) < enough:  # noqa: ASYNC110
                await asyncio.sleep(0.05)

    async def _ask(self, *, stream: bool) -> None:
        body = {"model": "auto", "messages": [{"role": "user", "content": "What is 17 plus 25?"}], "stream": stream}
        async with httpx.AsyncClient(base_url=self._url, timeout=60.0) as client:
            while True:
                response = await client.post("/v1/chat/completions", json=body)
                whole = not stream or response.text.endswith("data: [DONE]\n\n")
                self.outcomes["whole" if response.status_code == 200 and whole else response.text] += 1
                self.experts.append(response.headers.get("x-router-expert", response.text))
                await asyncio.sleep(0.02)


def service_files(folder: Path, upstream: str, artefact: Path) -> list[str]:
    """Arguments for a service with two remote experts at `upstream` and one policy, on `artefact`."""
    remote = {"base_url": upstream, "model": "good", "api_key_env": "UPSTREAM_KEY"}
    fleet = {"experts": [{**card.model_dump(include={"name", "description"}), "remote": remote} for card in CARDS]}
    router = {"name": "knn", "artefact": str(artefact)}
    policy = {"name": "auto", "objective": {"quality": 1, "cost": 0}, "router": router, "strategy": {"name": "single"}}
    (folder / "policies").mkdir()
    (folder / "fleet.yaml").write_text(yaml.safe_dump(fleet))
    (folder / "policies" / "auto.yaml").write_text(yaml.safe_dump(policy))
    return ["--fleet", str(folder / "fleet.yaml"), "--policies", str(folder / "policies")]


@pytest.mark.slow
async def test_a_submitted_jobs_artefact_is_promoted_under_load_without_a_failed_request(
    ray_head: dict[str, str], tmp_path: Path
) -> None:
    table = small_table(tmp_path / "table", 60)
    environment = {**ray_head, "UPSTREAM_KEY": "sk-secret", "ROUTER_DATA_FOLDER": tempfile.mkdtemp(dir="/tmp")}
    await train(environment, "--observations", str(table), "--out", str(tmp_path / "first"))
    (port,) = free_ports(1)
    url = f"http://127.0.0.1:{port}"
    async with run_upstream() as upstream:
        files = service_files(tmp_path, upstream.url, tmp_path / "first")
        load = Load(url)
        with Running([*COMMAND, "serve", "--no-ray", "--port", str(port), *files], environment) as service:
            await asyncio.to_thread(service.wait_for, lambda: httpx.get(f"{url}/readyz").is_success)
            async with load.from_clients(4):
                await load.more(20)
                before = len(load.experts)
                second = swapped(table, tmp_path / "swapped")
                arguments = ["--observations", str(second), "--out", str(tmp_path / "second")]
                manifest = await train(environment, *arguments, "--submit", "--promote", "--url", url)
                after = len(load.experts)
                await load.more(20)
    assert set(load.outcomes) == {"whole"}
    assert set(load.experts[:before]) == {"sums"}
    assert set(load.experts[after + 4 :]) == {"words"}  # four were under way
    assert Manifest.read(tmp_path / "second").model_dump(mode="json") == manifest
    shutil.rmtree(environment["ROUTER_DATA_FOLDER"])


@pytest.mark.slow
async def test_a_job_that_fails_fails_the_command(ray_head: dict[str, str], tmp_path: Path) -> None:
    table = small_table(tmp_path / "table", 2)
    command = [*COMMAND, "train", "best", "--observations", str(table), "--out", str(tmp_path / "out"), "--submit"]
    process = await asyncio.create_subprocess_exec(*command, env=ray_head, stderr=asyncio.subprocess.PIPE)
    _, said = await process.communicate()
    assert process.returncode == 1
    assert b"too few" in said  # the job's own log came through
    assert b"FAILED" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
async def test_a_tune_in_a_job_runs_on_its_cluster_and_is_seeded(ray_head: dict[str, str], tmp_path: Path) -> None:
    table = small_table(tmp_path / "table", 60)
    arguments = ["--observations", str(table), "--trials", "3", "--seed", "7"]
    one = await train(ray_head, *arguments, "--out", str(tmp_path / "one"), "--submit")
    assert len(one["trials"]) == 3
    assert one["trials"] == sorted(one["trials"], key=lambda trial: -trial["aiq"])
    assert one["metrics"]["aiq"] == pytest.approx(one["trials"][0]["aiq"], abs=1e-6)
    assert one["config"].items() >= one["trials"][0]["config"].items()
    local = {name: value for name, value in ray_head.items() if name != "RAY_ADDRESS"}
    again = await train(local, *arguments, "--out", str(tmp_path / "two"))
    assert [trial["config"] for trial in again["trials"]] == [trial["config"] for trial in one["trials"]]
    arrays = [(tmp_path / name / "router.safetensors").read_bytes() for name in ("one", "two")]
    assert arrays[0] == arrays[1]


def test_no_job_server_is_said_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "")
    (port,) = free_ports(1)
    with pytest.raises(SubmitError, match=r"no Ray job server answers.*--include-dashboard=true"):
        job_server(f"http://127.0.0.1:{port}")


def test_the_swapped_table_is_one(tmp_path: Path) -> None:
    table = small_table(tmp_path / "table", 10)
    one, other = load_table(table), load_table(swapped(table, tmp_path / "swapped"))
    assert (one.train.quality == other.train.quality[:, ::-1]).all()


@pytest.mark.slow
async def test_a_retriever_trains_as_a_job(ray_head: dict[str, str], tmp_path: Path) -> None:
    options = {
        "encoder": {"model": str(save_encoder(tmp_path / "encoder"))},
        "adapter": {"rank": 2, "batch_size": 4, "max_steps": 3},
        "pilot_queries": 6,
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(options))
    environment = {**ray_head, "ROUTER_CACHE_DIR": str(tmp_path / "cache")}
    corpus = save_corpus(tmp_path / "air")
    arguments = ["--corpus", str(corpus), "--out", str(tmp_path / "out"), "--config", str(tmp_path / "config.yaml")]
    manifest = await train(environment, *arguments, "--submit", trainer="retriever")
    assert manifest["domains"]["air"]["steps"] == 3
    assert (tmp_path / "out" / "router" / "router.safetensors").is_file()


@pytest.mark.slow
async def test_a_policy_of_router_r1_trains_as_a_job(ray_head: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "replies.jsonl").touch()
    options = {
        "policy": str(save_model(tmp_path / "policy", "llama", spread=0.02)),
        "out": "unused",
        "questions": {"one": 2, "two": 0},
        "environment": "replay",
        "recorded": str(tmp_path / "replies.jsonl"),
        "steps": 2,
        "questions_per_step": 1,
        "rollouts": 2,
        "turn_tokens": 16,
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(options))
    arguments = ["--config", str(tmp_path / "config.yaml"), "--out", str(tmp_path / "out"), "--submit"]
    report = await train(ray_head, *arguments, trainer="router_r1")
    assert [line["step"] for line in report["curves"]] == [1, 2]
    assert (tmp_path / "out" / "model.safetensors").is_file()


@pytest.mark.slow
async def test_the_experts_of_a_glider_mixture_train_side_by_side_in_a_job(
    ray_head: dict[str, str], tmp_path: Path
) -> None:
    """As tasks of the job's cluster; the mixture is the one that is made here, one expert after another."""
    tasks = pocket_tasks(tmp_path, "units", "roman")
    arguments = ["--base", str(BASE), "--adapters", str(ADAPTERS), "--tasks", str(tasks)]
    manifest = await train(ray_head, *arguments, "--out", str(tmp_path / "job"), "--submit", trainer="glider")
    local = {name: value for name, value in ray_head.items() if name != "RAY_ADDRESS"}
    here = await train(local, *arguments, "--out", str(tmp_path / "here"), trainer="glider")
    assert manifest["experts"] == here["experts"]
    for file in ("gate.safetensors", "router/router.safetensors"):
        assert (tmp_path / "job" / file).read_bytes() == (tmp_path / "here" / file).read_bytes()


@pytest.mark.slow
async def test_a_mixture_trains_as_a_job(ray_head: dict[str, str], tmp_path: Path) -> None:
    lines = ({"query": q.query, "answer": q.answer} for q in sample(0, 8, "one", "train"))
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = {"base": str(FLEET / "base"), "data": str(tmp_path / "train.jsonl"), "steps": 2, "batch": 4}
    options |= {"experts": 2, "rank": 4, "targets": ["q_proj"], "device": "cpu"}
    (tmp_path / "mixture.yaml").write_text(yaml.safe_dump(options))
    arguments = [
        "--gate",
        "mola",
        "--config",
        str(tmp_path / "mixture.yaml"),
        "--out",
        str(tmp_path / "out"),
        "--seed",
        "3",
    ]
    report = await train(ray_head, *arguments, "--submit", trainer="mole")
    assert (report["spec"]["gate"], report["spec"]["seed"], report["examples"]) == ("mola", 3, 8)
    assert report == read_report(tmp_path / "out")
    mixture = load_mixture(AutoModelForCausalLM.from_pretrained(FLEET / "base"), tmp_path / "out")
    assert all(bool(layer.B.any()) for layer in mixture.layers.values())
