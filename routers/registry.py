"""Routers by name, from the entry-point group `router_service.routers`, so that another package can add one."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from routers.artefact import read_header
from routers.base import FittedRouter, RouterConfig
from routers.embedder import Embedder
from routers.errors import RouterConfigError

GROUP = "router_service.routers"

AnyRouter = FittedRouter[Any]


@cache
def _known() -> Mapping[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=GROUP)}


def router_names() -> list[str]:
    """Every known router's name, sorted."""
    return sorted(_known())


def router_class(name: str) -> type[AnyRouter]:
    """The class of the router `name`. Raises `RouterConfigError`, which lists the known ones."""
    point = _known().get(name)
    if point is None:
        raise RouterConfigError(f"no router is named {name!r}; known are {', '.join(router_names()) or 'none'}")
    try:
        found = point.load()
    except (ImportError, AttributeError) as error:
        raise RouterConfigError(f"router {name!r} ({point.value}) cannot be imported: {error}") from error
    if not (isinstance(found, type) and issubclass(found, FittedRouter)):
        raise RouterConfigError(f"router {name!r} ({point.value}) is no subclass of routers.base.FittedRouter")
    return found


def create_router(
    name: str, options: Mapping[str, Any] | None = None, *, embedder: Embedder | None = None
) -> AnyRouter:
    """A router to be fitted. `options` are those of its configuration class."""
    found = router_class(name)
    try:
        config: RouterConfig = found.config_type.model_validate(dict(options or {}))
    except ValidationError as error:
        raise RouterConfigError(f"router {name!r}: {error}") from error
    return found(config, embedder=embedder)


def load_router(folder: Path, *, embedder: Embedder | None = None) -> AnyRouter:
    """The fitted router that was saved into `folder`, of whichever name."""
    return router_class(read_header(folder)["router"]).load(folder, embedder=embedder)
