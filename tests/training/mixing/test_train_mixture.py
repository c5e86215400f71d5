"""Training gates on the pocket base through the command: what is learned, balanced, reported, resumed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from experts.errors import MixingError
from experts.mixing import RequestMixture, load_mixture
from experts.mixing.balance import auxiliary_loss
from router_service.cli import app
from training.errors import TrainJobError
from training.mixing.spec import MixtureSpec
from training.mixing.train import build_mixture, load_base, sft_config, train_mixture
from training.pocket.fleet import FLEET
from training.pocket.grading import sample
from training.work_folder import read_report

BASE = FLEET / "base"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    lines = ({"query": q.query, "answer": q.answer, "adapter": q.skills[0]} for q in sample(0, 400, "one", "train"))
    path.write_text("".join(json.dumps(line) + "\n" for line in lines if line["adapter"] in ("units", "roman")))
    return path


def spec_of(data: Path, out: Path, **own: Any) -> MixtureSpec:
    small = {"steps": 3, "batch": 8, "micro_batch": 4, "checkpoint_every": 2, "max_tokens": 64, "device": "cpu"}
    return MixtureSpec.model_validate({"base": str(BASE), "data": data, "out": out} | small | own)


@pytest.mark.slow
def test_the_command_trains_reports_and_saves(data: Path, tmp_path: Path) -> None:
    config = tmp_path / "mixture.yaml"
    spec = spec_of(data, tmp_path / "unused", gate="unused", rank=16, experts=3, targets=["up_proj"])
    config.write_text(json.dumps(spec.model_dump(mode="json", exclude={"out", "gate"})))
    arguments = ["train", "mole", "--gate", "mixlora", "--config", str(config), "--out", str(tmp_path / "m"), "--json"]
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    report = json.loads((tmp_path / "m" / "report.json").read_text())
    assert set(report["gates"]) == {f"model.layers.{i}.mlp.up_proj" for i in range(4)}
    for line in report["gates"].values():
        assert sum(line["load"]) == pytest.approx(2, abs=1e-3)  # two adapters for each token
        assert 0 < line["token_entropy"] <= 1
    assert all(line["auxiliary"] == pytest.approx(2e-3, rel=0.2) for line in report["loss"])  # balanced: 1e-3 * k
    model = AutoModelForCausalLM.from_pretrained(BASE)
    mixture = load_mixture(model, tmp_path / "m")
    assert mixture.adapters == ("expert-0", "expert-1", "expert-2")
    assert all(bool(layer.B.any()) for layer in mixture.layers.values())
    assert not (tmp_path / "m.part").exists()


@pytest.mark.slow
def test_a_killed_run_ends_with_the_same_mixture(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from training.mixing.trainer import MixtureTrainer

    runtimes: dict[str, float] = {}
    log = MixtureTrainer.log

    def note(self: Any, logs: dict[str, float], *rest: Any) -> None:
        if "train_runtime" in logs:
            runtimes[Path(self.args.output_dir).parent.stem] = logs["train_runtime"]
        log(self, logs, *rest)

    monkeypatch.setattr(MixtureTrainer, "log", note)
    own = {"gate": "mola", "experts": 2, "rank": 4, "targets": ["q_proj"]}
    train_mixture(spec_of(data, tmp_path / "whole", **own))

    class KilledError(Exception):
        pass

    def kill(step: str, done: int, total: int) -> None:
        if done == 3:
            raise KilledError

    with pytest.raises(KilledError):
        train_mixture(spec_of(data, tmp_path / "cut", **own), on_progress=kill)
    seen: list[int] = []
    train_mixture(spec_of(data, tmp_path / "cut", **own), on_progress=lambda step, done, total: seen.append(done))
    assert seen == [3]
    for folder in ("whole", "cut"):
        assert read_report(tmp_path / folder)["gates"]
    assert runtimes["cut"] == pytest.approx(read_report(tmp_path / "cut")["seconds_per_step"])  # of the one step left
    assert runtimes["whole"] == pytest.approx(3 * read_report(tmp_path / "whole")["seconds_per_step"])
    whole, cut = (
        dict(load_mixture(AutoModelForCausalLM.from_pretrained(BASE), tmp_path / name).model.state_dict())
        for name in ("whole", "cut")
    )
    torch.testing.assert_close(cut, whole, rtol=1e-4, atol=1e-5)
    with pytest.raises(TrainJobError, match="is there already"):
        train_mixture(spec_of(data, tmp_path / "cut", **own))


@pytest.mark.slow
def test_phatgooses_gates_learn_each_on_its_adapters_own_data(data: Path, tmp_path: Path) -> None:
    adapters = {name: FLEET / "adapters" / name for name in ("units", "roman", "dates")}
    train_mixture(spec_of(data, tmp_path / "m", gate="phatgoose", adapters=adapters, gate_learning_rate=1e-2))
    mixture = load_mixture(AutoModelForCausalLM.from_pretrained(BASE), tmp_path / "m")
    lines = read_report(tmp_path / "m")["gates"]
    assert set(lines) == set(mixture.gates)
    for line in lines.values():  # of the gates' own decisions: two of the three adapters for each token
        assert sum(line["load"]) == pytest.approx(2, abs=1e-3)
        assert 0 < line["token_entropy"] <= 1
    for gate in mixture.gates.values():
        units, roman, dates = gate.vectors
        assert units.any()
        assert roman.any()
        assert not dates.any()  # no example was of its data
        assert not torch.equal(units, roman)


@pytest.mark.slow
def test_micro_batches_sum_to_the_global_batchs_load(data: Path, tmp_path: Path) -> None:
    from training.mixing.data import dataset, read_examples
    from training.mixing.trainer import MixtureTrainer

    spec = spec_of(data, tmp_path / "m", gate="mixlora", experts=3, rank=4, targets=["up_proj"], steps=1)
    model, tokenizer = load_base(spec)
    mixture = build_mixture(spec, model)
    rows = dataset(read_examples(data), mixture.adapters, alone=False)
    args = sft_config(spec, tmp_path / "c", on_cpu=True)
    trainer = MixtureTrainer(mixture, args=args, train_dataset=rows, processing_class=tokenizer)
    trainer.model.train()
    batches = [next(iter(trainer.get_train_dataloader())) for _ in range(2)]
    own, losses = [], []
    for batch in batches:
        with mixture.recording() as records:
            model(**{k: v for k, v in batch.items() if k != "labels"})
            own.append(list(records))
            losses.append(trainer._auxiliary(own[-1], False))
    expected = auxiliary_loss(own[1], mixture.rule, trainer._step)
    torch.testing.assert_close(losses[1], expected)
    torch.testing.assert_close(trainer._step[0].load, own[0][0].load + own[1][0].load)
    assert float(trainer._step[0].tokens) == sum(float(batch["attention_mask"].sum()) for batch in batches)


@pytest.mark.slow
def test_processes_share_a_batch_and_balance_over_all_of_it(data: Path, tmp_path: Path) -> None:
    own = {"gate": "mixlora", "experts": 3, "rank": 4, "targets": ["up_proj"], "steps": 1, "warmup": 0}
    whole = train_mixture(spec_of(data, tmp_path / "whole", **own))
    shared = spec_of(data, tmp_path / "shared", **own)
    (tmp_path / "mixture.json").write_text(json.dumps(shared.model_dump(mode="json", exclude_none=True)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "router_service", "train", "mole", "--config", str(tmp_path / "mixture.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    report = read_report(tmp_path / "shared")
    for site, line in whole["gates"].items():
        assert report["gates"][site]["load"] == pytest.approx(line["load"], abs=1e-3)
        assert report["gates"][site]["token_entropy"] == pytest.approx(line["token_entropy"], abs=1e-4)
    one, two = (load_mixture(AutoModelForCausalLM.from_pretrained(BASE), tmp_path / n) for n in ("whole", "shared"))
    for name, layer in one.layers.items():  # Adam's first step: the sign of each gradient
        assert bool(layer.B.any())
        assert torch.cosine_similarity(layer.B.flatten(), two.layers[name].B.flatten(), 0) > 0.99
    assert not (tmp_path / "shared.part").exists()


def test_what_cannot_be_trained_is_refused_first(data: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainJobError, match="has nothing to learn"):
        train_mixture(spec_of(data, tmp_path / "m", gate="arrow", experts=3, rank=4))
    with pytest.raises(TrainJobError, match="cannot be loaded"):
        train_mixture(spec_of(data, tmp_path / "m", gate="mola", base=str(tmp_path / "none")))
    with pytest.raises(MixingError, match="no gate 'moe'"):
        train_mixture(spec_of(data, tmp_path / "m", gate="moe"))
    assert not list(tmp_path.iterdir())


def test_the_pocket_specialists_answer_by_request() -> None:
    from experts.mixing import install_mixture, read_adapters
    from training.pocket.generate import respond
    from training.pocket.tokens import build_tokenizer

    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32).eval()
    adapters = {name: FLEET / "adapters" / name for name in ("arithmetic", "roman")}
    mixture = install_mixture(model, read_adapters(adapters, model), "static")
    queries = ["Write 44 as a Roman numeral."] * 2
    with mixture.requests([RequestMixture.only("roman"), RequestMixture.only("arithmetic")]):
        right, other = respond(model, build_tokenizer(), queries)
    assert right.text == "XLIV"
    assert other.text != "XLIV"
