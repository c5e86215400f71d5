"""Which backend runs, and what happens where the C++ kernel cannot be built."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from mixtures import error, exact, random_choice, random_stack

from kernels import BackendError, cpu, dispatch, mixed_lora
from kernels.mixture import Mixture


@pytest.fixture
def fresh() -> Iterator[None]:
    """Forget what was logged and built, before and after."""
    for cached in (dispatch._log, cpu.library):
        cached.cache_clear()
    yield
    for cached in (dispatch._log, cpu.library):
        cached.cache_clear()


def mixture(tokens: int, ranks: list[int], dtype: torch.dtype = torch.float32, slots: int = 2) -> Mixture:
    stack = random_stack(ranks, 64, [64], dtype=dtype)
    indices, weights = random_choice(tokens, slots, len(ranks))
    x = torch.randn(tokens, 64, dtype=dtype)
    return Mixture(x, stack.A, stack.B, stack.offsets, stack.scales, indices, weights, None, (64,), max(ranks))


def test_the_backend_is_chosen_by_shape() -> None:
    assert dispatch.choose(mixture(1, [8] * 8), None, gradients=False) == "cpp"
    assert dispatch.choose(mixture(64, [8] * 3), None, gradients=False) == "stacked"
    assert dispatch.choose(mixture(64, [8] * 3), None, gradients=True) == "cpp"
    assert dispatch.choose(mixture(64, [8] * 3, torch.float16), None, gradients=False) == "cpp"
    assert dispatch.choose(mixture(4, [8] * 3, torch.float64), None, gradients=False) == "loop"


def test_without_a_compiler_the_next_choice_runs_and_the_log_says_so(
    fresh: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "")
    assert dispatch.choose(mixture(1, [8] * 8), None, gradients=False) == "loop"
    assert dispatch.choose(mixture(16, [8] * 8), None, gradients=False) == "grouped"
    assert dispatch.choose(mixture(16, [1] * 8 + [64]), None, gradients=False) == "loop"
    assert [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING] == [
        "no C++ compiler found (CXX, c++, g++, clang++): CPU mixtures run without the C++ kernel"
    ]
    with pytest.raises(BackendError, match="did not build"):
        dispatch.choose(mixture(1, [8]), "cpp", gradients=False)


def test_a_compiler_that_fails_is_logged(
    fresh: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\n[ $1 = --version ] && echo 1.0 && exit\necho 'no such flag' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("ROUTER_KERNELS_CACHE", str(tmp_path / "cache"))
    assert cpu.library() is None
    assert "no such flag" in caplog.text


def test_the_environment_forces_a_backend(
    fresh: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("ROUTER_KERNELS_BACKEND", "loop")
    caplog.set_level(logging.INFO, "kernels.dispatch")
    stack = random_stack([4, 4], 16, [16])
    indices, weights = random_choice(3, 2, 2)
    x = torch.randn(3, 16)
    for _ in range(2):
        assert error(mixed_lora(x, stack, indices, weights), exact(x, stack, indices, weights)) < 1e-5
    assert [record.getMessage() for record in caplog.records] == [
        "outputs of LoRA mixtures on cpu in torch.float32: loop (forced)"
    ]
    monkeypatch.setenv("ROUTER_KERNELS_BACKEND", "warp")
    with pytest.raises(BackendError, match="'warp'"):
        mixed_lora(x, stack, indices, weights)
