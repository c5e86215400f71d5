"""Sentence embeddings for every router: one model per process, cached by content.

By default sentence-transformers/all-MiniLM-L6-v2: 384 dimensions, mean pooling over the unmasked tokens, L2-normalised,
cut at 256 tokens. Any other encoder that transformers' `AutoModel` loads from safetensors works by configuration.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from experts.embedding.encoder import EmbedderConfig, Encoder, EncoderFiles
from experts.fleet import DEFAULT_MODEL
from routers.contracts import FloatArray
from routers.embedding_store import EmbeddingStore

__all__ = ["DEFAULT_MODEL", "Embedder", "EmbedderConfig", "cache_folder", "shared_embedder"]

# A text is cut to this many characters a token before it is tokenized. Prose has about 4, so only runs of blanks or of
# unbroken symbols notice, and a megabyte of prompt costs no more than its beginning.
_CHARS_PER_TOKEN_AT_MOST = 64
# What is computed between two writes to the file: an interrupted run keeps what it had.
_TEXTS_PER_WRITE = 512


def cache_folder() -> Path:
    """Where caches lie: `ROUTER_CACHE_DIR`, by default ~/.cache/router-service."""
    return Path(os.environ.get("ROUTER_CACHE_DIR") or "~/.cache/router-service").expanduser()


def shared_embedder(config: EmbedderConfig | None = None) -> Embedder:
    """The process's one embedder for `config`, with its file in `cache_folder()`."""
    wanted = config or EmbedderConfig()
    with _shared_lock:
        if wanted not in _shared:
            _shared[wanted] = Embedder(wanted, cache_dir=cache_folder())
        return _shared[wanted]


class Embedder:
    """Turns texts into unit vectors, float32 [B, D]. Thread safe; the model is loaded at the first text not cached.

    A text's vector is the same alone and in a batch up to float rounding (1e-6 on each value): padding is masked in
    attention and in pooling. Vectors are kept in memory (the last `memory_entries`) and, unless `cache_dir` is None, in
    a file there, under the SHA-256 of text, configuration and weights. Calls from several threads that wait for the
    model at the same time are computed as one batch.
    """

    def __init__(
        self, config: EmbedderConfig | None = None, *, cache_dir: Path | None = None, memory_entries: int = 32_768
    ) -> None:
        self.config = config or EmbedderConfig()
        self._cache_dir = cache_dir
        self._memory = _Memory(memory_entries)
        self._load_lock = threading.Lock()
        self._files: EncoderFiles | None = None
        self._store: EmbeddingStore | None = None
        self._encoder: Encoder | None = None
        self._model_lock = threading.Lock()
        self._waiting: list[_Job] = []

    def embed(self, texts: Sequence[str]) -> FloatArray:
        """Embed `texts`: float32 [len(texts), D], each row of length 1."""
        files = self._find_files()
        cut = [_encodable(text[: self.config.max_tokens * _CHARS_PER_TOKEN_AT_MOST]) for text in texts]
        keys = [hashlib.sha256(files.fingerprint + text).digest() for text in cut]
        vectors = self._memory.get(keys)
        if len(vectors) < len(keys):
            missing = {key: text.decode() for key, text in zip(keys, cut, strict=True) if key not in vectors}
            vectors |= self._stored(missing)
            vectors |= self._computed({key: text for key, text in missing.items() if key not in vectors})
        return np.stack([vectors[key] for key in keys]) if keys else np.zeros((0, files.dimensions), np.float32)

    @property
    def dimensions(self) -> int:
        """D, the length of a vector."""
        return self._find_files().dimensions

    @property
    def weights_sha256(self) -> str:
        """SHA-256 of the model's weights: two embedders that agree in it and in `config` give the same vectors."""
        return self._find_files().weights_sha256

    def warm_up(self) -> None:
        """Load the model now rather than at the first text."""
        self._encode(["warm up"])

    def _find_files(self) -> EncoderFiles:
        if self._files is None:
            with self._load_lock:
                if self._files is None:
                    files = EncoderFiles.find(self.config)
                    if self._cache_dir is not None:
                        self._store = EmbeddingStore(self._cache_dir / "embeddings.sqlite", files.dimensions)
                    self._files = files
        return self._files

    def _stored(self, missing: Mapping[bytes, str]) -> dict[bytes, FloatArray]:
        found = self._store.get(list(missing)) if self._store else {}
        self._memory.put(found)
        return found

    def _computed(self, missing: Mapping[bytes, str]) -> dict[bytes, FloatArray]:
        computed: dict[bytes, FloatArray] = {}
        keys = sorted(missing, key=lambda key: len(missing[key]))
        for start in range(0, len(keys), _TEXTS_PER_WRITE):
            some = keys[start : start + _TEXTS_PER_WRITE]
            fresh = dict(zip(some, self._encode([missing[key] for key in some]), strict=True))
            self._memory.put(fresh)
            if self._store:
                self._store.put(fresh)
            computed |= fresh
        return computed

    def _encode(self, texts: Sequence[str]) -> FloatArray:
        """Whichever thread gets the model computes what every waiting thread asked for."""
        job = _Job(texts)
        self._waiting.append(job)
        try:
            with self._model_lock:
                if not job.done:
                    self._encode_jobs(list(self._waiting))
        finally:
            self._waiting.remove(job)
        return job.vectors

    def _encode_jobs(self, jobs: Sequence[_Job]) -> None:
        if self._encoder is None:
            self._encoder = Encoder(self._find_files(), self.config)
        open_jobs = [job for job in jobs if not job.done]
        vectors = self._encoder.encode([text for job in open_jobs for text in job.texts])
        ends = np.cumsum([len(job.texts) for job in open_jobs])
        for job, part in zip(open_jobs, np.split(vectors, ends[:-1]), strict=True):
            job.vectors, job.done = part, True


_shared: dict[EmbedderConfig, Embedder] = {}
_shared_lock = threading.Lock()


class _Job:
    """Texts that a thread wants embedded, and the answer once it is there."""

    def __init__(self, texts: Sequence[str]) -> None:
        self.texts = texts
        self.vectors: FloatArray = np.zeros((0, 0), np.float32)
        self.done = False


class _Memory:
    """The vectors last used, by key; the oldest go first."""

    def __init__(self, entries: int) -> None:
        self._entries = entries
        self._vectors: OrderedDict[bytes, FloatArray] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, keys: Iterable[bytes]) -> dict[bytes, FloatArray]:
        with self._lock:
            found = {key: self._vectors[key] for key in keys if key in self._vectors}
            for key in found:
                self._vectors.move_to_end(key)
        return found

    def put(self, vectors: Mapping[bytes, FloatArray]) -> None:
        with self._lock:
            self._vectors.update(vectors)
            while len(self._vectors) > self._entries:
                self._vectors.popitem(last=False)


def _encodable(text: str) -> bytes:
    """As UTF-8; half a surrogate pair, which JSON can carry and UTF-8 cannot, becomes a question mark."""
    return text.encode("utf-8", "replace")
