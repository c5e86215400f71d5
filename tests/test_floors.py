"""The floors: a package imports only from those below it, and heavy libraries are imported only where they are used."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = ["kernels", "experts", "routers", "training", "router_service"]


def imported_packages(source: Path) -> set[str]:
    """The top-level names of every import in a file, wherever it stands."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("floor", FLOORS)
def test_a_floor_imports_only_from_floors_below(floor: str) -> None:
    above = set(FLOORS[FLOORS.index(floor) + 1 :])
    offenders = {
        str(path.relative_to(ROOT)): sorted(imported_packages(path) & above)
        for path in (ROOT / floor).rglob("*.py")
        if imported_packages(path) & above
    }
    assert not offenders


@pytest.mark.parametrize(
    ("floor", "unknown"),
    [("experts", {"ray", "redis"}), ("routers", {"ray", "redis"}), ("kernels", {"ray", "redis", "transformers"})],
)
def test_a_floor_never_knows(floor: str, unknown: set[str]) -> None:
    offenders = {
        str(path.relative_to(ROOT)): sorted(imported_packages(path) & unknown)
        for path in (ROOT / floor).rglob("*.py")
        if imported_packages(path) & unknown
    }
    assert not offenders


@pytest.mark.parametrize("package", ["routers", "experts", "routers.policy", "routers.registry", "router_service.cli"])
def test_import_is_light(package: str) -> None:
    heavy = {"torch", "ray", "transformers", "peft", "redis", "trl"}
    code = f"import sys, {package}; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"
