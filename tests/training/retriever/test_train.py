"""Training a retriever, end to end, on a tiny encoder: what is written, what is taken over, what a kill costs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from experts.build import build_experts
from experts.embedding.adapters import AdaptedEncoder
from experts.embedding.encoder import EmbedderConfig, Encoder, EncoderFiles
from experts.errors import ExpertConfigError
from experts.fleet import load_fleet
from routers.checkpoint import Checkpoint
from routers.policy import load_policies
from routers.registry import load_router
from tests.experts.embedding.encoders import save_encoder, save_lora
from tests.training.retriever.corpora import DOMAINS, save_corpus, save_judged
from training.errors import TrainJobError
from training.observations import read_rows
from training.retriever import train as training
from training.retriever.corpus import read_corpus
from training.retriever.evaluate import Collections, Retriever, evaluate
from training.retriever.fit import AdapterConfig, cautious_scale, fit_adapter
from training.retriever.pairs import pairs_of
from training.retriever.train import RetrieverManifest, RetrieverSpec, train_retriever

pytestmark = pytest.mark.slow

CONFIG = AdapterConfig(rank=2, batch_size=4, max_steps=6, epochs=4, learning_rate=1e-2)


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The embeddings' file of these tests alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ROUTER_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("corpora")
    return {name: save_corpus(folder / name, seed=i) for i, name in enumerate(DOMAINS)}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> EmbedderConfig:
    return EmbedderConfig(model=str(save_encoder(tmp_path_factory.mktemp("tiny"))))


@pytest.fixture(scope="module")
def work(corpora: dict[str, Path], encoder: EmbedderConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Retrievers of two domains, of three that started from it, and of two again."""
    folder = tmp_path_factory.mktemp("work")
    two = spec(corpora, encoder, folder / "two", "air", "med")
    train_retriever(two)
    train_retriever(spec(corpora, encoder, folder / "three", "air", "med", "cs", start=folder / "two"))
    train_retriever(two.model_copy(update={"out": folder / "again", "start": folder / "three"}))
    return folder


def spec(
    corpora: dict[str, Path], encoder: EmbedderConfig, out: Path, *names: str, start: Path | None = None
) -> RetrieverSpec:
    chosen = tuple(corpora[name] for name in names)
    return RetrieverSpec(corpora=chosen, out=out, start=start, encoder=encoder, adapter=CONFIG, pilot_queries=12)


def files(folder: Path) -> dict[str, bytes]:
    found = (path for path in folder.rglob("*") if path.is_file() and path.name != "retriever.json")
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def test_what_is_written_can_be_served(work: Path) -> None:
    manifest = RetrieverManifest.read(work / "three")
    assert list(manifest.domains) == ["air", "med", "cs"]
    fleet = load_fleet(work / "three" / "fleet.yaml")
    assert [card.name for card in fleet.cards] == ["search", "search-air", "search-med", "search-cs"]
    assert {card.kind for card in fleet.cards} == {"embedding"}
    assert list(build_experts(fleet)) == [card.name for card in fleet.cards]
    policy = load_policies(work / "three" / "policies")["embeddings"]
    assert policy.serves == "embeddings"
    assert policy.router.artefact is not None
    assert [card.name for card in load_router(policy.router.artefact).cards] == [card.name for card in fleet.cards]
    assert not (work / "three.part").exists()


def test_a_folder_whose_name_no_expert_can_have_is_refused_at_once(encoder: EmbedderConfig, tmp_path: Path) -> None:
    corpora = {"a b": save_corpus(tmp_path / "air", seed=0).rename(tmp_path / "a b")}
    with pytest.raises(TrainJobError, match="'search-a b' can be no expert's name"):
        train_retriever(spec(corpora, encoder, tmp_path / "out", "a b"))
    assert not (tmp_path / "out.part").exists()


def test_a_description_is_of_the_domain_itself_where_anothers_name_ends_alike(tmp_path: Path) -> None:
    made = {"key": "", "documents": 1, "train_pairs": 1, "held_out_pairs": 1, "steps": 1, "scale": 1.0}
    domains = {name: training.Domain(**made, held_out_ndcg={}, topic=f"topic of {name}") for name in ("law", "tax-law")}
    training.write_fleet(tmp_path, "my-law", EmbedderConfig(), domains)
    said = [card.description for card in load_fleet(tmp_path / "fleet.yaml").cards]
    assert "any subject" in said[0]
    assert ["topic of law" in said[1], "topic of tax-law" in said[2]] == [True, True]


def test_another_domain_trains_itself_alone(work: Path) -> None:
    two, three = files(work / "two"), files(work / "three")
    for name in (name for name in two if name.startswith("adapters/")):
        assert three[name] == two[name]
    assert (
        RetrieverManifest.read(work / "three").domains.items() >= RetrieverManifest.read(work / "two").domains.items()
    )


def test_removed_again_everything_is_as_before_bit_for_bit(work: Path) -> None:
    assert files(work / "again") == files(work / "two")


def test_every_system_is_measured(work: Path, corpora: dict[str, Path]) -> None:
    retriever = Retriever(work / "three")
    base = training.shared_embedder(retriever.manifest.encoder)
    collections = Collections.read(list(corpora.values()), lambda _, texts: base.embed(texts))
    measured = evaluate(retriever, collections)
    assert set(measured.systems) == {
        "bm25", "base", "mean", "max", "softmax", "classifier", "dataset_oracle", "query_oracle",
    }  # fmt: skip
    oracle = measured.systems["query_oracle"]["mixed"]["ndcg@10"]
    for system in ("base", "mean", "max", "softmax", "dataset_oracle"):
        assert (measured.systems[system]["mixed"]["ndcg@10"] <= oracle + 1e-9).all()
    assert all(((v >= 0) & (v <= 1)).all() for s in measured.systems.values() for i in s.values() for v in i.values())


def test_the_querys_oracle_may_choose_the_base(
    work: Path, corpora: dict[str, Path], encoder: EmbedderConfig, tmp_path: Path
) -> None:
    """Where all adapters are one that was never trained, the base serves some queries better."""
    retriever = Retriever(work / "three")
    wrong = save_lora(Path(encoder.model), tmp_path, seed=0)
    retriever._encoder.load({retriever.expert(name): wrong for name in retriever.domains})
    base = training.shared_embedder(retriever.manifest.encoder)
    collections = Collections.read(list(corpora.values()), lambda _, texts: base.embed(texts))
    asked = replace(
        collections,
        queries=list(collections.corpora[0].texts[:8]),  # each finds itself, through the base
        of_query=np.zeros(8, int),
        judged=[{str(name): 1} for name in collections.ids[:8]],
    )
    systems = evaluate(retriever, asked).systems
    for index in ("alone", "mixed"):
        assert (systems["base"][index]["ndcg@10"] <= systems["query_oracle"][index]["ndcg@10"] + 1e-9).all()


def test_a_finished_retriever_is_left_as_it_is_and_another_is_refused(
    work: Path, corpora: dict[str, Path], encoder: EmbedderConfig
) -> None:
    before = files(work / "two")
    train_retriever(spec(corpora, encoder, work / "two", "air", "med"))
    assert files(work / "two") == before
    same = spec(corpora, encoder, work / "two", "air", "med")
    for another in (
        spec(corpora, encoder, work / "two", "air"),
        same.model_copy(update={"aggregation": "max"}),
        same.model_copy(update={"base": "vectors"}),
        same.model_copy(update={"start": work / "three"}),
    ):
        with pytest.raises(TrainJobError, match="holds another retriever"):
            train_retriever(another)


def test_an_unfinished_run_of_another_kind_is_not_gone_on_with(
    corpora: dict[str, Path], encoder: EmbedderConfig, tmp_path: Path
) -> None:
    def kill(step: str, done: int, total: int) -> None:
        if step.startswith("observe"):
            raise KilledError

    wanted = spec(corpora, encoder, tmp_path / "out", "air", "med")
    with pytest.raises(KilledError):
        train_retriever(wanted, on_progress=kill)
    other = wanted.model_copy(update={"aggregation": "max"})
    with pytest.raises(TrainJobError, match="unfinished run with other data, options or versions"):
        train_retriever(other)
    assert train_retriever(other, resume=False).aggregation == "max"
    assert not (tmp_path / "out.part").exists()


def test_what_was_observed_of_an_adapter_is_dropped_when_it_is_trained_again(
    work: Path, corpora: dict[str, Path], encoder: EmbedderConfig, tmp_path: Path
) -> None:
    """`med` has other documents now: `air` keeps its queries, and what the base and its own adapter made of them."""
    changed = {**corpora, "med": save_corpus(tmp_path / "med", seed=7)}
    train_retriever(spec(changed, encoder, tmp_path / "out", "air", "med", start=work / "two"))
    assert observed(tmp_path / "out", "med") == {"search", "search-air", "search-med"}
    assert observed(work / "two", "air") == {"search", "search-air", "search-med"}
    assert observed(tmp_path / "out", "air") == {"search", "search-air"}


def observed(folder: Path, domain: str) -> set[str]:
    """The experts that were observed on a domain's queries."""
    rows = [row for row in read_rows(folder / "observations") if row.task == domain]
    assert rows
    return {pair.expert for row in rows for pair in row.experts}


def test_judged_queries_make_a_retriever_too(encoder: EmbedderConfig, tmp_path: Path) -> None:
    queries = {f"t{i}": (f"query {DOMAINS['air'][i % 4]} {i}", [i, i + 1, i + 2]) for i in range(20)}
    folder = save_judged(tmp_path / "air", queries)
    for negatives in ("batch", "domain"):
        config = CONFIG.model_copy(update={"negatives": negatives})
        out = tmp_path / negatives
        made = RetrieverSpec(corpora=(folder,), out=out, encoder=encoder, adapter=config, pilot_queries=12)
        assert train_retriever(made).domains["air"].steps == 6
        asked = [row.query for row in read_rows(out / "observations")]
        assert len(asked) == len(set(asked)) == 12


def test_an_adapter_knows_its_encoder(work: Path, tmp_path: Path) -> None:
    """One that was trained on another encoder is refused, though its matrices would fit."""
    config = RetrieverManifest.read(work / "two").encoder
    folder = work / "two" / "adapters" / "air"
    encoder = AdaptedEncoder(Encoder(EncoderFiles.find(config), config))
    encoder.load({"air": folder})
    shorter = config.model_copy(update={"max_tokens": 16})
    other = AdaptedEncoder(Encoder(EncoderFiles.find(shorter), shorter))
    with pytest.raises(ExpertConfigError, match="adapter 'air': it was trained on the encoder"):
        other.load({"air": folder})


class KilledError(Exception):
    """Stands for a kill."""


def test_a_killed_training_goes_on_and_ends_with_the_same_adapter(
    corpora: dict[str, Path], encoder: EmbedderConfig, tmp_path: Path
) -> None:
    pairs = pairs_of(read_corpus(corpora["air"]))
    embed = training.shared_embedder(encoder).embed

    def fit(out: Path, checkpoint: Checkpoint) -> bytes:
        fit_adapter(pairs, out, embed=embed, encoder=encoder, config=CONFIG, seed=0, checkpoint=checkpoint)
        return (out / "adapter_model.safetensors").read_bytes()

    def kill(done: int, total: int) -> None:
        if done == total // 2:
            raise KilledError

    whole = fit(tmp_path / "whole", Checkpoint())
    with pytest.raises(KilledError):
        fit(tmp_path / "killed", Checkpoint(tmp_path / "state", every_s=0, on_progress=kill))
    assert not (tmp_path / "killed").exists()
    done: list[int] = []
    resumed = fit(tmp_path / "killed", Checkpoint(tmp_path / "state", on_progress=lambda n, _: done.append(n)))
    assert done[0] > 1
    assert resumed == whole


def test_the_smallest_scale_that_is_as_good_is_kept() -> None:
    base, best = np.zeros(100), np.full(100, 0.5)
    assert cautious_scale({0.0: base, 0.5: best - 0.001, 1.0: best}) == 1.0
    noisy = best + np.random.default_rng(0).normal(scale=0.1, size=100)
    assert cautious_scale({0.0: base, 0.5: best, 1.0: noisy + 0.001 - noisy.mean() + 0.5}) == 0.5
    assert cautious_scale({0.0: best, 1.0: base}) == 0.0
