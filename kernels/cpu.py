"""CPU backend: `cpu_mixed.cpp`, compiled with `cpu_route.cpp` on first use and kept in a cache folder.

It has a plain C interface, so that it builds in seconds, whatever torch's build. `ROUTER_KERNELS_CACHE` names the
folder (default `~/.cache/router-service/kernels`), `CXX` the compiler. Where none is found, `library` says so once and
is None.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from kernels.mixture import Gradients, Mixture, Wanted, check_mixture

logger = logging.getLogger(__name__)

_SOURCES = tuple(Path(__file__).with_name(name) for name in ("cpu_mixed.cpp", "cpu_route.cpp"))
_INCLUDED = Path(__file__).with_name("cpu_attention.cpp")  # by the first of them
_FLAGS = ("-O3", "-march=native", "-std=c++17", "-fPIC", "-shared", "-Wno-psabi")
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_POINTERS = ("x", "A", "B", "base", "offsets", "scales", "indices", "weights", "widths")
_RESULTS = ("h", "y", "dy", "dx", "dA", "dB", "dw")
_SIZES = (
    "tokens",
    "slots",
    "experts",
    "slices",
    "rows",
    "dim",
    "width",
    "max_rank",
    "dtype",
    "adapter_dtype",
    "threads",
)


class _Mixture(ctypes.Structure):
    """`struct Mixture` of cpu_mixed.cpp."""

    _fields_ = tuple((name, ctypes.c_void_p) for name in _POINTERS + _RESULTS) + tuple(
        (name, ctypes.c_int64) for name in _SIZES
    )


def supports(dtype: torch.dtype) -> bool:
    """Whether the extension knows this dtype."""
    return dtype in _DTYPES


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled extension, or None where it cannot be built."""
    compiler = os.environ.get("CXX") or next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if compiler is None:
        logger.warning("no C++ compiler found (CXX, c++, g++, clang++): CPU mixtures run without the C++ kernel")
        return None
    try:
        return ctypes.CDLL(str(_built(compiler)))
    except (OSError, subprocess.SubprocessError) as error:
        detail = error.stderr.strip()[-500:] if isinstance(error, subprocess.CalledProcessError) else str(error)
        logger.warning("the C++ kernel did not build, CPU mixtures run without it: %s", detail)
        return None


def _built(compiler: str) -> Path:
    """The extension's file, compiled if need be; safe when several processes do it at once."""
    folder = Path(os.environ.get("ROUTER_KERNELS_CACHE", "~/.cache/router-service/kernels")).expanduser()
    target = folder / f"mixed-{_fingerprint(compiler)}.so"
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            output = Path(scratch) / target.name
            _compile(compiler, output)
            output.replace(target)
        logger.info("built the C++ kernel with %s: %s", compiler, target)
    return target


def _compile(compiler: str, output: Path) -> None:
    command = [compiler, *_FLAGS, *map(str, _SOURCES), "-o", str(output)]
    try:
        _run([*command, "-fopenmp"])
    except subprocess.CalledProcessError:  # a compiler without OpenMP: one thread
        _run(command)


def _run(command: list[str]) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=300).stdout


def _fingerprint(compiler: str) -> str:
    """Of all that the machine code depends on: source, flags, compiler, processor."""
    cpu = Path("/proc/cpuinfo")
    flags = (
        next((line for line in cpu.read_text().splitlines() if line.startswith("flags")), "") if cpu.exists() else ""
    )
    parts = (
        *(source.read_text() for source in (*_SOURCES, _INCLUDED)),
        *_FLAGS,
        _run([compiler, "--version"]),
        platform.machine(),
        flags,
    )
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def forward(m: Mixture, save: bool) -> tuple[Tensor, Tensor]:
    """y of a mixture, and h where `save` asks for it."""
    h = m.empty_hidden()
    y = m.x.new_empty(m.tokens, m.B.shape[1])
    if _call("mixed_forward", m, h=h, y=y):
        check_mixture(m.indices, m.weights, m.experts)
    return y, h


def backward(m: Mixture, dy: Tensor, h: Tensor, wanted: Wanted) -> Gradients:
    """Gradients of a mixture, from that of y and the forward pass's h."""
    dx = torch.empty_like(m.x, memory_format=torch.contiguous_format) if wanted.x else None
    dA = torch.empty_like(m.A, memory_format=torch.contiguous_format) if wanted.A else None
    dB = torch.empty_like(m.B, memory_format=torch.contiguous_format) if wanted.B else None
    dw = torch.empty_like(m.weights, memory_format=torch.contiguous_format) if wanted.weights else None
    _call("mixed_backward", m, h=h.contiguous(), dy=dy.contiguous(), dx=dx, dA=dA, dB=dB, dw=dw)
    return Gradients(dx, dA, dB, dw)


def _call(function: str, m: Mixture, **results: Tensor | None) -> int:
    """Status of the C function: 1 where an index or weight is none that it can take."""
    native = library()
    if native is None:
        raise RuntimeError("the C++ kernel is not available; choose the backend by kernels.dispatch")
    given = (
        m.x.contiguous(),
        m.A.contiguous(),
        m.B.contiguous(),
        None if m.base is None else m.base.contiguous(),
        m.offsets,
        m.scales.contiguous(),
        m.indices.to(torch.int32).contiguous(),
        m.weights.contiguous(),
    )
    widths = (ctypes.c_int64 * m.slices)(*m.widths)
    rows, dim = m.A.shape[1:]
    call = _Mixture(
        *(None if t is None else t.data_ptr() for t in given),
        ctypes.addressof(widths),
        *(None if (t := results.get(name)) is None else t.data_ptr() for name in _RESULTS),
        *(m.tokens, m.slots, m.experts, m.slices, rows, dim, m.B.shape[1], m.max_rank),
        *(_DTYPES[m.x.dtype], _DTYPES[m.A.dtype], torch.get_num_threads()),
    )
    return int(getattr(native, function)(ctypes.byref(call)))
