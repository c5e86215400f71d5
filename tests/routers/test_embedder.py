"""The embedder, with the real model."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from experts.embedding.encoder import EncoderFiles
from experts.errors import ExpertConfigError
from routers.embedder import Embedder, EmbedderConfig, cache_folder, shared_embedder
from routers.embedding_store import EmbeddingStore

TEXTS = [
    "What day comes after Monday?",
    "hi",
    "",
    "Which day follows Monday in the week?",
    "Convert 12 kilometres to metres. " * 60,
    "Ünïcode \U0001f600 \ud800 and\x00 more",
]


@pytest.fixture(scope="module")
def embedder() -> Embedder:
    return Embedder(cache_dir=None)


def unused(embedder: Embedder) -> Embedder:
    """An embedder that has seen no text and does not load the model again."""
    other = Embedder(embedder.config)
    embedder.warm_up()
    other._encoder = embedder._encoder
    return other


def test_vectors_are_unit_and_mean_what_the_texts_mean(embedder: Embedder) -> None:
    vectors = embedder.embed(TEXTS)
    assert vectors.dtype == np.float32
    assert vectors.shape == (len(TEXTS), 384) == (len(TEXTS), embedder.dimensions)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert vectors[0] @ vectors[3] > 0.8 > 0.4 > vectors[0] @ vectors[4]


def test_weights_are_those_of_the_original(embedder: Embedder) -> None:
    assert embedder.weights_sha256 == "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


def test_known_sentence_pair(embedder: Embedder) -> None:
    """The example of the model's own card on the hub."""
    vectors = embedder.embed(["This is an example sentence", "Each sentence is converted"])
    np.testing.assert_allclose(vectors[0][:3], [0.0676569, 0.0634959, 0.0487131], atol=1e-4)


def test_a_text_alone_and_in_a_batch(embedder: Embedder) -> None:
    together = unused(embedder).embed(TEXTS)
    alone = np.concatenate([embedder.embed([text]) for text in TEXTS])
    np.testing.assert_allclose(alone, together, atol=1e-6)


def test_no_texts(embedder: Embedder) -> None:
    assert embedder.embed([]).shape == (0, 384)


def test_threads_get_their_own_vectors(embedder: Embedder) -> None:
    texts = [[f"question {i} of thread {t}" for i in range(3)] for t in range(8)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(embedder.embed, texts))
    expected = unused(embedder).embed([text for group in texts for text in group])
    np.testing.assert_allclose(np.concatenate(found), expected, atol=1e-6)


def test_second_process_does_not_embed_again(embedder: Embedder, tmp_path: Path) -> None:
    texts = ["stored once", "and read twice"]
    first = Embedder(cache_dir=tmp_path)
    first._encoder = embedder._encoder  # spare the load
    stored = first.embed(texts)
    program = (
        "import sys, numpy as np; from pathlib import Path; from routers.embedder import Embedder\n"
        f"vectors = Embedder(cache_dir=Path({str(tmp_path)!r})).embed({texts!r})\n"
        "assert 'torch' not in sys.modules\n"
        "sys.stdout.buffer.write(vectors.tobytes())"
    )
    read = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True).stdout
    assert read == stored.tobytes()


def test_memory_forgets_the_oldest(embedder: Embedder) -> None:
    small = Embedder(memory_entries=2)
    small._encoder = embedder._encoder
    for text in ("a", "b", "c"):
        small.embed([text])
    assert len(small._memory._vectors) == 2
    np.testing.assert_allclose(small.embed(["a"]), embedder.embed(["a"]), atol=1e-6)


def test_store_is_shared_and_survives_a_second_writer(tmp_path: Path) -> None:
    path = tmp_path / "sub" / "embeddings.sqlite"
    one, two = EmbeddingStore(path, 4), EmbeddingStore(path, 4)
    vectors = {bytes([i]) * 32: np.full(4, i, np.float32) for i in range(200)}
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda store: store.put(vectors), (one, two)))
    found = two.get([*vectors, b"x" * 32])
    assert found.keys() == vectors.keys()
    assert all(np.array_equal(found[key], vectors[key]) for key in vectors)


def test_cache_folder_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ROUTER_CACHE_DIR", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.delenv("ROUTER_CACHE_DIR")
    assert cache_folder() == Path.home() / ".cache" / "router-service"


def test_one_embedder_a_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ROUTER_CACHE_DIR", str(tmp_path))
    assert shared_embedder() is shared_embedder(EmbedderConfig()) is not shared_embedder(EmbedderConfig(max_tokens=9))


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ExpertConfigError, match=r"lacks tokenizer.json, model.safetensors"):
        Embedder(EmbedderConfig(model=str(tmp_path))).embed(["x"])


def test_an_unknown_hub_model_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ExpertConfigError, match="no-such-model-here"):
        EncoderFiles.find(EmbedderConfig(model="nobody/no-such-model-here"))


def test_cls_pooling_and_cut_length_make_other_vectors(embedder: Embedder) -> None:
    text = TEXTS[4]
    cls, cut = Embedder(EmbedderConfig(pooling="cls")), Embedder(EmbedderConfig(max_tokens=8))
    assert abs(cls.embed([text]) - embedder.embed([text])).max() > 0.01
    np.testing.assert_allclose(cut.embed([text]), cut.embed([text[:200]]), atol=1e-6)


def test_importing_routers_imports_neither_torch_nor_ray() -> None:
    program = (
        "import sys, routers.registry, routers.knn, routers.simple, routers.policy, routers.query, routers.strategies\n"
        "sys.exit(bool({'torch', 'ray', 'transformers'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
