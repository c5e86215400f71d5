"""A real Ray with two logical GPUs, and Serve without HTTP, for the tests of handles and replicas."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from router_service.serve.environment import serve_environment
from router_service.settings import Settings
from tests.experts.models import save_adapter, save_model
from tests.router_service.fakes import RedisProcess

FOLDER = Path(f"/tmp/rs-test-{os.getpid()}")
os.environ.update(serve_environment(Settings(), FOLDER))  # before anything imports ray.serve, which reads them once


@pytest.fixture(scope="session")
def fleet_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two groups: a model with an adapter that answers one request at a time, and a model with two replicas."""
    folder = tmp_path_factory.mktemp("fleet")
    base = save_model(folder / "base")
    save_adapter(base, folder / "adapter", seed=1)
    local, single = {"model": "./base"}, {"model": "./base", "max_batch": 1, "max_queue": 0}
    resources = {"cpus": 0.5, "gpus": 0.5}
    experts = [
        {
            "name": "one",
            "context_length": 512,
            "local": single,
            "resources": resources,
        },
        {"name": "one-adapted", "context_length": 512, "adapter": {"base": "one", "path": "./adapter"}},
        {"name": "org/two", "context_length": 512, "local": local, "resources": {**resources, "replicas": 2}},
    ]
    path = folder / "fleet.yaml"
    path.write_text(yaml.safe_dump({"experts": experts}))
    return path


@pytest.fixture(scope="session")
def cluster(fleet_file: Path) -> Iterator[None]:
    """Ray, with both groups of the fleet deployed, and a Redis in which it stands which adapters were added."""
    import ray
    from ray import serve

    from router_service.serve.applications import ExpertsArgs, experts, experts_app

    redis = RedisProcess(FOLDER / "redis")
    redis.start()
    os.environ["REDIS_URL"] = redis.url  # replicas read it
    ray.init(
        num_cpus=2,
        num_gpus=2,
        include_dashboard=False,
        object_store_memory=80 << 20,
        _temp_dir=str(FOLDER / "ray"),
    )
    serve.start(proxy_location="Disabled")
    targets = [
        serve.RunTarget(experts(ExpertsArgs(fleet=fleet_file, group=group)), experts_app(group), None)
        for group in ("one", "org/two")
    ]
    serve.run_many(targets)
    yield
    ray.shutdown()
    del os.environ["REDIS_URL"]
    redis.stop()
    shutil.rmtree(FOLDER, ignore_errors=True)
