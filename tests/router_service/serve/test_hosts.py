"""What the service asks of the cluster before it starts."""

from __future__ import annotations

from typing import Any

import pytest

from experts.fleet import Fleet
from router_service.errors import SettingsError
from router_service.serve.hosts import check_gpus, most_cpus


def fleet(*resources: dict[str, Any] | None) -> Fleet:
    """A local expert with each of `resources`, one remote expert with resources and one without."""
    remote = {"base_url": "http://far.example/v1", "model": "m"}
    local = [{"name": f"e{i}", "local": {"model": "m"}, "resources": each} for i, each in enumerate(resources)]
    far = [{"name": "far", "remote": remote, "resources": {"cpus": 0.5}}, {"name": "proxied", "remote": remote}]
    return Fleet.model_validate({"experts": [*local, *far]})


def test_cpus_are_counted_for_every_replica_that_there_may_be() -> None:
    assert most_cpus(fleet(None)) == 2  # 1 and a half
    scaling = {"cpus": 2, "autoscaling": {"min": 0, "max": 3}}
    assert most_cpus(fleet({"cpus": 2, "replicas": 2}, scaling)) == 11  # 4, 6 and a half


@pytest.mark.parametrize(
    ("resources", "needed"),
    [
        ([None], 0),
        ([{"gpus": 0.5}, {"gpus": 0.5, "replicas": 3}], 2),
        ([{"gpus": 1, "autoscaling": {"min": 2, "max": 8}}], 2),
        ([{"gpus": 1, "autoscaling": {"min": 0, "max": 8}}], 1),
        ([{"gpus": 1, "autoscaling": {"min": 0, "max": 1}}] * 3, 1),  # they may take turns
        ([{"gpus": 0.5}, {"gpus": 2, "autoscaling": {"min": 0, "max": 1}}], 2),
    ],
)
def test_too_few_gpus_are_told_at_the_start(resources: list[dict[str, Any] | None], needed: float) -> None:
    check_gpus(fleet(*resources), needed)
    if needed:
        with pytest.raises(SettingsError, match=f"asks for {needed:g} GPUs, and the cluster has"):
            check_gpus(fleet(*resources), needed - 0.5)
