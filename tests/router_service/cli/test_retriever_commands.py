"""`train retriever` and `index` as commands, on a tiny encoder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from experts.embedding.encoder import EmbedderConfig
from experts.embedding.index import Document, DocumentIndex
from router_service.cli import app
from router_service.cli.console import CommandError
from router_service.cli.train_retriever import _command
from routers.embedder import shared_embedder
from tests.experts.embedding.encoders import save_encoder
from tests.training.retriever.corpora import save_corpus
from training.retriever.train import RetrieverSpec

pytestmark = pytest.mark.slow


def run(*arguments: str | Path) -> str:
    """What a command prints on stdout; its error is raised."""
    done = CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROUTER_CACHE_DIR", str(tmp_path / "cache"))


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    return save_encoder(tmp_path / "encoder")


def test_a_retriever_is_trained_from_the_command_line(tmp_path: Path, encoder: Path) -> None:
    adapter = {"rank": 2, "batch_size": 4, "max_steps": 3}
    options = {"encoder": {"model": str(encoder)}, "adapter": adapter, "pilot_queries": 6}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(options))
    corpus = save_corpus(tmp_path / "air")
    command = ["train", "retriever", "--corpus", corpus, "--out", tmp_path / "out", "--base", "vectors"]
    manifest = json.loads(run(*command, "--config", tmp_path / "config.yaml", "--aggregation", "max", "--json"))
    assert manifest["aggregation"] == "max"
    assert manifest["domains"]["air"]["steps"] == 3
    experts = yaml.safe_load((tmp_path / "out" / "fleet.yaml").read_text())["experts"]
    assert [expert["name"] for expert in experts] == ["vectors", "vectors-air"]
    with pytest.raises(CommandError, match="aggregation: Input should be"):
        run(*command, "--aggregation", "median")
    (tmp_path / "config.yaml").write_text("adapters: {}")
    with pytest.raises(CommandError, match=r"adapters: Extra inputs are not permitted"):
        run(*command, "--config", tmp_path / "config.yaml")


def test_the_command_for_a_cluster_is_the_same_run(tmp_path: Path) -> None:
    spec = RetrieverSpec(
        corpora=(tmp_path / "a", tmp_path / "b"), out=tmp_path / "out", start=tmp_path / "old", base="v", seed=7
    )
    command = _command(spec, tmp_path / "c.yaml", resume=False)
    assert command[1:5] == ["-m", "router_service", "train", "retriever"]
    assert command[5:] == [
        *("--corpus", str(tmp_path / "a"), "--corpus", str(tmp_path / "b"), "--out", str(tmp_path / "out")),
        *("--base", "v", "--aggregation", "mean", "--seed", "7", "--from", str(tmp_path / "old")),
        *("--config", str(tmp_path / "c.yaml"), "--no-resume"),
    ]


def test_an_index_is_made_changed_and_shown(tmp_path: Path, encoder: Path) -> None:
    air, med, index = save_corpus(tmp_path / "air"), save_corpus(tmp_path / "med"), tmp_path / "index"
    run("index", "add", index, "--corpus", air, "--model", encoder)
    run("index", "add", index, "--corpus", med, "--corpus", air, "--model", encoder)
    assert json.loads(run("index", "show", index, "--json")) == {
        "documents": 48,
        "dimensions": 32,
        "collections": {"med": 24, "air": 24},
    }
    (air / "corpus.jsonl").write_text(json.dumps({"_id": "titled", "title": "wing", "text": "of flow"}) + "\n")
    run("index", "add", index, "--corpus", air, "--model", encoder)
    whole = shared_embedder(EmbedderConfig(model=str(encoder))).embed(["wing of flow"])
    [best] = DocumentIndex(index).search(whole, 1)[0]
    assert (best.document, best.score) == (Document("air/titled", "of flow", "wing"), pytest.approx(1, abs=1e-5))
    run("index", "delete", index, "--id", "air/titled")
    run("index", "delete", index, "--collection", "med", "--id", "air/3")
    assert json.loads(run("index", "show", index, "--json"))["collections"] == {"air": 23}
    with pytest.raises(CommandError, match="name documents with --id"):
        run("index", "delete", index)
