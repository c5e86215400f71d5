"""The Triton kernels without a GPU: under the interpreter, and compiled ahead for three generations of NVIDIA GPUs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import triton
from triton.backends.compiler import GPUTarget

from kernels import gpu, gpu_route

POINTERS = {
    "x": "*bf16", "matrix": "*bf16", "base": "*bf16", "y": "*bf16", "grad": "*bf16",
    "hidden": "*fp32", "scales": "*fp32", "weights": "*fp32", "logits": "*fp32", "bias": "*fp32", "scores": "*fp32",
    "spans": "*i32", "offsets": "*i32", "segments": "*i32", "indices": "*i32", "order": "*i64",
}  # fmt: skip
KERNELS: dict[str, tuple[Any, dict[str, object]]] = {
    "shrink": (gpu._shrink, {"BLOCK_T": 16, "BLOCK_K": 64, "BLOCK_R": 16, "SLOTS": 2, "EXACT": False}),
    "expand": (
        gpu._expand,
        {"SUM": 1, "HAS_BASE": True, "BLOCK_T": 64, "BLOCK_C": 128, "BLOCK_R": 16, "SLOTS": 2, "EXACT": False},
    ),
    "outer": (gpu._outer, {"BLOCK_P": 16, "BLOCK_C": 128, "BLOCK_R": 16, "EXACT": False}),
    "route": (
        gpu_route._route,
        {"HAS_BIAS": True, "SIGMOID": False, "RENORMALISE": True, "BLOCK_E": 64, "SLOTS": 2},
    ),
}


@pytest.mark.parametrize("architecture", [80, 90, 100])
@pytest.mark.parametrize("name", KERNELS)
def test_compiles_ahead(name: str, architecture: int) -> None:
    kernel, constants = KERNELS[name]
    signature = {a: "constexpr" if a in constants else POINTERS.get(a, "i32") for a in kernel.arg_names}
    places = {(kernel.arg_names.index(a),): value for a, value in constants.items()}
    source = triton.compiler.ASTSource(fn=kernel, signature=signature, constexprs=places)
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32))
    assert len(compiled.asm["cubin"]) > 0
    assert f".target sm_{architecture}" in compiled.asm["ptx"]
    assert compiled.metadata.shared <= 160 * 1024
    assert name == "route" or "mma" in compiled.asm["ptx"], "no tensor cores"
    assert "atom" not in compiled.asm["ptx"]


@pytest.mark.slow
def test_under_the_interpreter() -> None:
    here = Path(__file__).parent
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(here / "interpreted_gpu.py")],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        cwd=here.parents[1],
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert result.returncode == 0, result.stdout + result.stderr
