"""A run's configuration file: YAML or JSON, checked against a schema, with what the command line says on top."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from training.errors import TrainJobError

S = TypeVar("S", bound=BaseModel)


def read_config(path: Path, schema: type[S], overrides: Mapping[str, object]) -> S:
    """What the file at `path` says; `overrides` that are not None come first. Raises `TrainJobError`."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise TrainJobError(f"cannot read {path}: {error}") from error
    if not isinstance(content, dict):
        raise TrainJobError(f"{path} must hold a mapping, not {type(content).__name__}")
    given = {name: value for name, value in overrides.items() if value is not None}
    try:
        return schema.model_validate(content | given)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise TrainJobError(f"{path}: {where + ': ' if where else ''}{first['msg']}") from error
