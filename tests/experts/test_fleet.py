"""Fleet files: what they mean, what is refused, and the ones that ship."""

from __future__ import annotations

import copy
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from experts.build import build_experts
from experts.errors import ExpertConfigError
from experts.expert import ExpertRequest
from experts.fleet import POCKET_FLEET, Fleet, load_fleet
from tests.experts.models import save_adapter, save_model

REAL_FLEET = POCKET_FLEET.parent / "real.yaml"

BASE = {"name": "base", "local": {"model": "./base"}}
ADAPTER = {"name": "skill", "adapter": {"base": "base", "path": "./skill"}}
REMOTE = {"name": "far", "remote": {"base_url": "https://far.example/v1", "model": "m"}}


def write(folder: Path, *experts: Any) -> Path:
    path = folder / "fleet.yaml"
    path.write_text(yaml.safe_dump({"experts": list(experts)}))
    return path


def test_a_fleet_with_every_kind(tmp_path: Path) -> None:
    embedding = {"name": "vec", "remote": {**REMOTE["remote"], "task": "embedding"}}
    fleet = load_fleet(write(tmp_path, ADAPTER, REMOTE, BASE, embedding))
    assert [(card.name, card.kind) for card in fleet.cards] == [
        ("skill", "adapter"),
        ("far", "remote"),
        ("base", "local"),
        ("vec", "embedding"),
    ]
    [group] = fleet.groups
    assert [entry.name for entry in group.entries] == ["base", "skill"]
    assert [entry.name for entry in fleet.proxied] == ["far", "vec"]


def test_folders_are_relative_to_the_file_and_hub_names_are_not(tmp_path: Path) -> None:
    hub = {"name": "hub", "local": {"model": "Qwen/Qwen2.5-0.5B", "revision": "main"}}
    fleet = load_fleet(write(tmp_path, BASE, ADAPTER, hub))
    base, skill, other = fleet.experts
    assert base.local
    assert base.local.model == str(tmp_path / "base")
    assert skill.adapter
    assert skill.adapter.path == str(tmp_path / "skill")
    assert other.local
    assert other.local.model == "Qwen/Qwen2.5-0.5B"


def test_a_remote_expert_with_resources_is_deployed_on_its_own(tmp_path: Path) -> None:
    resources = {"cpus": 0.5, "gpus": 2, "autoscaling": {"min": 0, "max": 3, "target": 2}}
    fleet = load_fleet(write(tmp_path, {**REMOTE, "resources": resources}))
    assert fleet.proxied == ()
    assert fleet.groups[0].resources.autoscaling
    assert fleet.groups[0].resources.autoscaling.max == 3


def test_a_fleet_travels(tmp_path: Path) -> None:
    fleet = load_fleet(write(tmp_path, BASE, ADAPTER, REMOTE))
    assert pickle.loads(pickle.dumps(fleet)) == fleet
    assert Fleet.model_validate_json(fleet.model_dump_json()) == fleet
    assert json.loads(fleet.cards[0].model_dump_json())["kind"] == "local"


def _with(entry: dict[str, Any], **change: Any) -> dict[str, Any]:
    return {**copy.deepcopy(entry), **change}


@pytest.mark.parametrize(
    ("experts", "complaint"),
    [
        ([], "at least 1"),
        ([BASE, BASE], "'base' is there 2 times"),
        ([ADAPTER], "'skill': base 'base' is no model or encoder"),
        ([REMOTE, _with(ADAPTER, adapter={"base": "far", "path": "x"})], "base 'far' is no model or encoder"),
        ([BASE, _with(ADAPTER, resources={"cpus": 2})], "'skill': an adapter runs on its base"),
        ([_with(BASE, remote=REMOTE["remote"])], "'base': needs exactly one of .* has local and remote"),
        ([{"name": "bare"}], "'bare': needs exactly one of .* has none"),
        ([_with(BASE, kind="remote")], "'base': kind 'remote' contradicts"),
        ([_with(BASE, features=["tools"])], "'base': local models cannot serve tools"),
        ([_with(BASE, colour="red")], "'base': colour: "),
        ([_with(BASE, input_price=-1)], "'base': input_price: "),
        ([_with(BASE, local={"model": "x", "dtype": "int3"})], r"'base': local\.dtype: "),
        ([_with(BASE, resources={"gpus": 1.5})], r"'base': resources: gpus 1\.5"),
        ([_with(BASE, resources={"replicas": 1, "autoscaling": {"max": 2}})], "replicas or autoscaling"),
        ([_with(BASE, resources={"autoscaling": {"min": 3, "max": 2}})], "min 3 is more than max 2"),
        ([_with(REMOTE, remote={"base_url": "ftp://x", "model": "m"})], r"'far': remote\.base_url: "),
        (
            [_with(REMOTE, remote={**REMOTE["remote"], "headers": {"Authorization": "Bearer sk"}})],
            r"'far': remote\.headers: Authorization: keys come from the environment",
        ),
        ([_with(REMOTE, remote={**REMOTE["remote"], "api_key_env": "sk-123"})], r"remote\.api_key_env: "),
        ([5], "number 1: "),
    ],
)
def test_contradictions_are_named(tmp_path: Path, experts: list[Any], complaint: str) -> None:
    path = write(tmp_path, *experts)
    with pytest.raises(ExpertConfigError, match=complaint) as caught:
        load_fleet(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("text", ["experts: [", "", "- a", "experts: 5", "other: []"])
def test_files_that_are_no_fleet(tmp_path: Path, text: str) -> None:
    path = tmp_path / "fleet.yaml"
    path.write_text(text)
    with pytest.raises(ExpertConfigError, match=r"fleet\.yaml"):
        load_fleet(path)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ExpertConfigError, match="cannot be read"):
        load_fleet(tmp_path / "none.yaml")


def test_the_pocket_fleet_loads_from_anywhere_without_torch(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    code = (
        "import sys; from experts.fleet import POCKET_FLEET, load_fleet; fleet = load_fleet(POCKET_FLEET);"
        "assert not {'torch', 'ray', 'transformers', 'peft'} & sys.modules.keys();"
        "print(fleet.groups[0].head.local.model)"
    )
    environment = {**os.environ, "PYTHONPATH": str(root)}
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert ran.stdout.strip() == str(root / "experts" / "pocket" / "base")


def test_the_pocket_fleet_prices_follow_size() -> None:
    fleet = load_fleet(POCKET_FLEET)
    price = {card.name: card.output_price for card in fleet.cards}
    specialists = [card.name for card in fleet.cards if card.kind == "adapter"]
    assert len(specialists) >= 8
    assert all(price["pocket-base"] < price[name] <= price["pocket-generalist"] / 3 for name in specialists)


def test_the_fleet_of_real_models_is_valid() -> None:
    fleet = load_fleet(REAL_FLEET)
    assert {card.kind for card in fleet.cards} == {"local", "adapter", "remote", "embedding"}
    assert [len(group.adapters) for group in fleet.groups] == [2]


async def test_the_fleet_of_real_models_runs_on_a_tiny_model_of_its_architecture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shipped file with its hub names exchanged for folders, through the code that would load the real ones."""
    data = yaml.safe_load(REAL_FLEET.read_text())
    model = save_model(tmp_path / "qwen", "qwen2")
    for i, entry in enumerate(data["experts"]):
        if "local" in entry:
            entry["local"]["model"] = str(model)
        if "adapter" in entry:
            entry["adapter"]["path"] = str(save_adapter(model, tmp_path / f"adapter-{i}", seed=i))
        if "local" in entry or "adapter" in entry:
            entry["context_length"] = 512
        if key := entry.get("remote", {}).get("api_key_env"):
            monkeypatch.setenv(key, "sk-test")
    experts = build_experts(load_fleet(write(tmp_path, *data["experts"])))
    body = {"messages": [{"role": "user", "content": "SELECT"}], "max_tokens": 8, "temperature": 0}
    answers = set()
    for name in ("qwen-0.5b", "qwen-0.5b-sql", "qwen-0.5b-support"):
        request = ExpertRequest(id="r", endpoint="chat/completions", body=body)
        [part] = [part async for part in experts[name].generate(request)]
        answers.add(json.loads(part.data)["choices"][0]["message"]["content"])
    assert len(answers) == 3
    for expert in experts.values():
        await expert.close()
