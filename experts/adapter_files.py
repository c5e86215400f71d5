"""Where the files of adapters and saved mixtures come from: a folder, an fsspec URL (s3://...), the hub."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from experts.errors import ExpertConfigError
from experts.mixing.install import GATE_FILE

ENCODER_FILE = "encoder.json"
"""Beside the files of an adapter on an encoder: the fingerprint of the encoder that it was trained on."""

_PEFT_FILES = ("adapter_config.json", "adapter_model.safetensors")
_FILES = (*_PEFT_FILES, ENCODER_FILE, GATE_FILE, *(f"adapters/*/{name}" for name in _PEFT_FILES))


@contextmanager
def local_copy(path: str, revision: str | None) -> Iterator[Path]:
    """The folder of an adapter or a saved mixture: itself, or a copy of what an fsspec URL or the hub has.

    `revision` is a branch, tag or commit of the hub's, and of nothing else. Raises `ExpertConfigError`.
    """
    if revision is not None and ("://" in path or Path(path).is_absolute()):
        raise ExpertConfigError(f"revision {revision!r} is for a name on the hub, which {path!r} is not")
    if "://" in path:
        with TemporaryDirectory(prefix="adapter-") as folder:
            _fetch(path, Path(folder))
            yield Path(folder)
    elif Path(path).is_absolute():
        if not Path(path).is_dir():
            raise ExpertConfigError(f"there is no folder {path!r}")
        yield Path(path)
    else:
        yield _from_hub(path, revision)


def _fetch(url: str, folder: Path) -> None:
    import fsspec

    try:
        files, root = fsspec.url_to_fs(url)
        found = [file for pattern in _FILES for file in files.glob(f"{root}/{pattern}")]
        for file in found:
            target = folder / str(file).removeprefix(root).lstrip("/")
            target.parent.mkdir(parents=True, exist_ok=True)
            files.get_file(file, str(target))
    except Exception as error:  # every file system has errors of its own
        raise ExpertConfigError(f"{url!r} cannot be read: {error}") from error
    if not found:
        raise ExpertConfigError(f"there is no adapter at {url!r}")


def _from_hub(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=[*_FILES]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise ExpertConfigError(f"it cannot be had from the hub: {error}") from error
