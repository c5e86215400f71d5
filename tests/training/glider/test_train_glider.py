"""`train glider` on the pocket base: parts that know nothing of each other, added later, resumed, refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from experts.mixing import RequestMixture, load_mixture
from router_service.cli import app
from routers.glider import GliderRouter
from routers.registry import load_router
from tests.training.glider.pocket_tasks import ADAPTERS, BASE, pocket_tasks
from training.errors import TrainJobError
from training.glider.spec import GliderSpec, read_tasks_file
from training.glider.train import GliderManifest, train_glider
from training.pocket.generate import respond
from training.pocket.grading import sample
from training.pocket.tokens import build_tokenizer


def spec_of(tasks: Path, out: Path, **own: Any) -> GliderSpec:
    return GliderSpec(base=str(BASE), adapters=ADAPTERS, file=read_tasks_file(tasks), out=out, **own)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.*") if path.is_file()}


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture of two experts, made by the command."""
    folder = tmp_path_factory.mktemp("first")
    tasks = pocket_tasks(folder, "units", "roman")
    arguments = ["--base", str(BASE), "--adapters", str(ADAPTERS), "--tasks", str(tasks), "--out", str(folder / "out")]
    done = CliRunner().invoke(app, ["train", "glider", *arguments, "--json"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["experts"].keys() == {"units", "roman"}
    return folder / "out"


@pytest.mark.slow
def test_the_command_leaves_a_mixture_and_its_router(first: Path) -> None:
    manifest = GliderManifest.read(first)
    assert manifest.steps == 3
    assert manifest.experts["units"].instruction == "About units."
    assert manifest.experts["units"].right > 0.8
    mixture = load_mixture(AutoModelForCausalLM.from_pretrained(BASE), first)
    assert mixture.gate.method == "glider"
    assert all(bool(gate.vectors.any(1).all()) for gate in mixture.gates.values())
    router = load_router(first / "router")
    assert isinstance(router, GliderRouter)
    (guidance,) = router.guidance(["Write 14 as a Roman numeral."], [None])
    assert max(guidance.scores, key=guidance.scores.__getitem__) == "roman"
    assert not [path for path in first.rglob("*") if path.suffix in (".bin", ".pt", ".pkl", ".part")]


@pytest.mark.slow
def test_another_expert_touches_no_other(first: Path, tmp_path: Path) -> None:
    tasks = pocket_tasks(tmp_path, "units", "roman", "dates")
    seen: list[str] = []
    train_glider(spec_of(tasks, tmp_path / "out", start=first), on_progress=lambda step, *_: seen.append(step))
    assert set(seen) == {"train dates"}
    before, after = files(first), files(tmp_path / "out")
    for name in before:
        if name.startswith(("adapters/", "parts/")):
            assert after[name] == before[name], name
    for file, key_of_rows in (("gate.safetensors", ""), ("router/router.safetensors", "glider.")):
        old, new = (load_file(folder / file) for folder in (first, tmp_path / "out"))
        for key in (key for key in old if key.startswith(key_of_rows)):
            for name, row in rows_of(first).items():
                assert torch.equal(new[key][rows_of(tmp_path / "out")[name]], old[key][row]), (key, name)


def rows_of(folder: Path) -> dict[str, int]:
    """Each expert's row in the arrays of a mixture's gate and router."""
    with safe_open(folder / "gate.safetensors", framework="pt") as file:
        names = json.loads(file.metadata()["mixture"])["adapters"]
    assert [card.name for card in load_router(folder / "router").cards] == names
    return {name: row for row, name in enumerate(names)}


@pytest.mark.slow
def test_a_killed_run_goes_on_and_ends_with_the_same(first: Path, tmp_path: Path) -> None:
    class KilledError(Exception):
        pass

    def kill(step: str, done: int, total: int) -> None:
        if step == "train units" and done == 2:
            raise KilledError

    spec = spec_of(pocket_tasks(tmp_path, "units", "roman"), tmp_path / "out")
    with pytest.raises(KilledError):
        train_glider(spec, on_progress=kill)
    assert not spec.out.exists()
    seen: list[str] = []
    train_glider(spec, on_progress=lambda step, *_: seen.append(step))
    assert set(seen) == {"train units"}  # the one before it was done
    one, two = files(first), files(tmp_path / "out")
    assert {name for name in one if one[name] != two[name]} == {"experts.json"}  # times
    assert train_glider(spec) == GliderManifest.read(spec.out)  # done already
    with pytest.raises(TrainJobError, match="holds another mixture"):
        train_glider(spec.model_copy(update={"seed": 1}))


@pytest.mark.slow
def test_arrow_needs_no_training_and_steers_as_well(tmp_path: Path) -> None:
    tasks = pocket_tasks(tmp_path, "units", "roman", "text")
    manifest = train_glider(spec_of(tasks, tmp_path / "out", gate="arrow"))
    assert manifest.steps == 0
    assert manifest.experts["text"].loss is None
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32).eval()
    mixture = load_mixture(model, tmp_path / "out")
    questions = [q for q in sample(1, 60) if q.skills[0] in ("units", "roman", "text")][:9]
    router = load_router(tmp_path / "out" / "router")
    assert isinstance(router, GliderRouter)
    asked = sorted((q.query for q in questions), key=len)
    wishes = [RequestMixture(bias=g.bias) for g in router.guidance(asked, [None] * len(asked))]
    tokenizer = build_tokenizer()
    with mixture.requests(wishes):
        together = [response.text for response in respond(model, tokenizer, asked)]
    for query, wish, text in zip(asked, wishes, together, strict=True):
        with mixture.requests([wish]):
            assert respond(model, tokenizer, [query])[0].text == text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tasks": {}}, "tasks: "),
        ({"gate": "arrow"}, "gate: Extra inputs"),
        ({"steps": 0}, "steps: "),
        (
            {"tasks": {"../units": {"data": "units.jsonl"}}},
            r"task '\.\./units' has no adapter in .*there are arithmetic",
        ),
        ({"tasks": {"units": {"data": "none.jsonl"}}}, "cannot read .*none.jsonl"),
    ],
)
def test_what_cannot_be_trained_is_refused(change: Mapping[str, Any], message: str, tmp_path: Path) -> None:
    path = pocket_tasks(tmp_path, "units")
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | change))
    with pytest.raises(TrainJobError, match=message):
        train_glider(spec_of(path, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_an_expert_needs_an_instruction_or_a_writer(tmp_path: Path) -> None:
    path = pocket_tasks(tmp_path, "units")
    content = yaml.safe_load(path.read_text())
    del content["tasks"]["units"]["instruction"]
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(TrainJobError, match="'units' has no instruction"):
        train_glider(spec_of(path, tmp_path / "out", gate="arrow"))
