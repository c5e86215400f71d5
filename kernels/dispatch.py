"""Which backend runs a mixture, by device, dtype and shape. Forced by argument or by `ROUTER_KERNELS_BACKEND`."""

from __future__ import annotations

import functools
import logging
import os
from typing import Literal, cast, get_args

import torch
from torch import Tensor

from kernels import cpu, grouped
from kernels.errors import BackendError
from kernels.mixture import Mixture

logger = logging.getLogger(__name__)

Backend = Literal["loop", "cpp", "grouped", "stacked", "triton"]
_BACKENDS = get_args(Backend)

# Measured on one thread of a Xeon with AVX-512 and AMX (docs/kernels.md): the dense product over all adapters wins
# while they are at most so many times the k that a token needs.
_DENSE_RATIO = 1.5
_DENSE_RATIO_AMX = 8.0
_DENSE_TOKENS = 32
_LOOP_PAIRS = 8  # below, a few products one after another beat sorting


def forced(backend: str | None) -> Backend | None:
    """The backend that the argument, or else the environment, asks for."""
    name = backend or os.environ.get("ROUTER_KERNELS_BACKEND") or None
    if name is not None and name not in _BACKENDS:
        raise BackendError(f"unknown backend {name!r}: choose one of {', '.join(_BACKENDS)}")
    return cast("Backend | None", name)


def choose(m: Mixture, asked: Backend | None, *, gradients: bool) -> Backend:
    """The backend for a forward pass, or (`gradients`) for a backward pass, which the dense product does not have."""
    chosen = asked if asked is not None and not (gradients and asked == "stacked") else _fastest(m, gradients)
    _check(chosen, m)
    _log("gradients" if gradients else "outputs", chosen, m.x.device.type, m.x.dtype, asked is not None)
    return chosen


def choose_route(logits: Tensor) -> Backend:
    """The backend of a decision: as it is forced where there is such a one, else by device; `loop` is plain tensors."""
    asked, device = forced(None), logits.device.type
    chosen: Backend = "loop"
    if asked != "loop" and device == "cuda" and _triton_found():
        chosen = "triton"
    elif asked != "loop" and device == "cpu" and cpu.library() is not None:
        chosen = "cpp"
    _log("decisions", chosen, device, logits.dtype, asked == chosen)
    return chosen


def is_plain(x: Tensor) -> bool:
    """Whether nothing traces or fakes a call with `x`: then an operator's way through torch's dispatcher, which costs
    more than a small mixture itself, is left out."""
    if torch.compiler.is_compiling() or type(x) is not Tensor:
        return False
    modes = torch._C._len_torch_dispatch_stack() or torch._C._functorch.peek_interpreter_stack()
    return not modes


def _fastest(m: Mixture, gradients: bool) -> Backend:
    if m.x.device.type == "cuda" and m.x.dtype != torch.float64 and _triton_found():
        return "triton"
    if m.x.device.type != "cpu" or m.x.dtype == torch.float64:
        return "loop"
    if not gradients and m.tokens >= _DENSE_TOKENS and m.experts <= _dense_ratio(m.x.dtype) * m.slots:
        return "stacked"
    if cpu.supports(m.x.dtype) and cpu.library() is not None:
        return "cpp"
    padding_is_small = m.experts * m.max_rank <= 2 * m.A.shape[1]
    return "grouped" if m.tokens * m.slots >= _LOOP_PAIRS and padding_is_small and grouped.supports(m) else "loop"


@functools.cache
def _dense_ratio(dtype: torch.dtype) -> float:
    amx = dtype == torch.bfloat16 and torch.cpu._is_amx_tile_supported()
    return _DENSE_RATIO_AMX if amx else _DENSE_RATIO


@functools.cache
def _triton_found() -> bool:
    try:
        import triton  # noqa: F401
    except ImportError:
        logger.warning("triton is not installed: mixtures on GPUs run one adapter after another")
        return False
    return True


def _check(backend: Backend, m: Mixture) -> None:
    device, dtype = m.x.device.type, m.x.dtype
    if backend == "cpp" and (device != "cpu" or not cpu.supports(dtype) or cpu.library() is None):
        raise BackendError(f"the C++ kernel cannot run {dtype} on {device}, or did not build (see the log)")
    if backend == "grouped" and not grouped.supports(m):
        raise BackendError(
            f"grouped_mm wants widths in multiples of 16 bytes and no float64, got {dtype}, {m.widths!r}"
        )
    if backend == "triton" and ((device != "cuda" and not _interpreted()) or dtype == torch.float64):
        raise BackendError(
            f"the Triton kernels run on GPUs (or with TRITON_INTERPRET=1) and not in float64, got {dtype} on {device}"
        )


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _log(what: str, backend: str, device: str, dtype: torch.dtype, was_forced: bool) -> None:
    way = "forced" if was_forced else "chosen by shape"
    logger.info("%s of LoRA mixtures on %s in %s: %s (%s)", what, device, dtype, backend, way)
