"""Gates among adapters that were trained before, each for itself; the adapters stay as they are."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import layer_norm, pad

from experts.mixing.balance import BalanceRule
from experts.mixing.gate import BalancedOptions, Gate, GateOptions, Site
from experts.mixing.selection import Routing, everything, top_k
from kernels import AdapterStack


class MoleOptions(BalancedOptions):
    balance: float = Field(default=1e-2, ge=0, description="factor of the balance loss")


class MoleGate(Gate):
    """MoLE, arXiv 2404.13628: softmax(logits / tau) over all adapters of a block, read off what they all would add.

    The logits are a learned map of the adapters' outputs B_e A_e x, concatenated and divided by their root mean square.
    They are computed in the adapters' ranks, h = A x: the map is pulled through B, and the norm is that of h under
    B B^T; a [T, E, o] tensor is never made. The outputs are those of the block's first adapted layer, for each token.
    """

    method = "mole"
    options_type = MoleOptions
    per_block = True
    learns = "gate"
    gram: Tensor
    scale_of_row: Tensor

    def __init__(self, site: Site, options: MoleOptions) -> None:
        super().__init__(site, options)
        stack, outputs = site.stack, site.stack.B.shape[1]
        self.rule = BalanceRule("product", options.balance)
        self.weight = nn.Parameter(torch.zeros(site.experts, outputs, site.experts, device=stack.A.device))
        self.log_temperature = nn.Parameter(torch.zeros((), device=stack.A.device))
        ranks = torch.tensor(stack.ranks, device=stack.A.device)
        owners = torch.arange(site.experts, device=stack.A.device).repeat_interleave(ranks)
        self._ranks = stack.ranks
        self.register_buffer("scale_of_row", stack.scales[0][owners][:, None].clone(), persistent=False)
        self._matrices = (stack.A, stack.B)  # the layer's own parameters, no part of this module
        scaled = stack.B.detach().float() * self.scale_of_row
        same = owners[:, None] == owners
        self.register_buffer("gram", (scaled @ scaled.T) * same / (site.experts * outputs), persistent=False)

    def score(self, x: Tensor) -> Tensor:
        A, B = self._matrices
        hidden = (x.to(A.dtype) @ A[0].T).float()  # [T, R]
        square = ((hidden @ self.gram) * hidden).sum(1, keepdim=True)
        rows = torch.split(B.float() * self.scale_of_row, list(self._ranks))
        pulled = torch.cat([own @ weight for own, weight in zip(rows, self.weight, strict=True)])  # [R, E]
        logits = (hidden * (square + 1e-12).rsqrt()) @ pulled / math.sqrt(self.gram.shape[0])
        return logits / self.log_temperature.exp()

    def select(self, logits: Tensor) -> Routing:
        return everything(logits)


class ArrowOptions(GateOptions):
    k: int = Field(default=3, ge=1, description="adapters for each token")
    temperature: float = Field(default=1.0, gt=0, description="divides the scores")


class ArrowGate(Gate):
    """Arrow, arXiv 2405.11157: |x . v_e|, v_e the direction that B_e A_e stretches most; softmax over the k largest."""

    method = "arrow"
    options_type = ArrowOptions
    learns = "nothing"
    by_rows = True
    prototypes: Tensor

    def __init__(self, site: Site, options: ArrowOptions) -> None:
        super().__init__(site, options)
        self.k, self.temperature = min(options.k, site.experts), options.temperature
        self.register_buffer("prototypes", prototypes(site.stack))

    def score(self, x: Tensor) -> Tensor:
        return (x.float() @ self.prototypes.float().T).abs() / self.temperature

    def select(self, logits: Tensor) -> Routing:
        return top_k(logits, self.k, renormalise=True)


def prototypes(stack: AdapterStack) -> Tensor:
    """[E, d] float32: the first right singular vector of each B_e A_e, exact, from matrices no larger than the rank."""
    return torch.stack([_top_direction(stack.adapter(e)[0]) for e in range(stack.experts)])


def _top_direction(adapter: Sequence[Tensor]) -> Tensor:
    A, B = (matrix.detach().float() for matrix in adapter)
    q, r = torch.linalg.qr(A.T)  # A = r^T q^T, so B A = (B r^T) q^T
    _, vectors = torch.linalg.eigh((r @ B.T) @ (B @ r.T))
    top: Tensor = q @ vectors[:, -1]
    return top


class PhatgooseOptions(GateOptions):
    k: int = Field(default=2, ge=1, description="adapters for each token")


class PhatgooseGate(Gate):
    """PHATGOOSE, arXiv 2402.05859: LN(x) . LN(v_e) / sqrt(d), softmax, the two largest.

    Each v_e is trained alone, after its adapter and with all else frozen, to let sigmoid(x . v_e) of it through.
    """

    method = "phatgoose"
    options_type = PhatgooseOptions
    learns = "gate"
    learns_alone = True
    by_rows = True

    def __init__(self, site: Site, options: PhatgooseOptions) -> None:
        super().__init__(site, options)
        self.k = min(options.k, site.experts)
        self.vectors = nn.Parameter(torch.zeros(site.experts, site.features, device=site.stack.A.device))

    def score(self, x: Tensor) -> Tensor:
        d = x.shape[1]
        return layer_norm(x.float(), [d]) @ layer_norm(self.vectors.float(), [d]).T / math.sqrt(d)

    def select(self, logits: Tensor) -> Routing:
        return top_k(logits, self.k, renormalise=True, floor=1e-6)

    def solo(self, x: Tensor, indices: Tensor) -> Tensor:
        own = pad(self.vectors.float(), (0, 0, 0, 1))[indices.long()]  # the last row, of index -1, is zero
        return torch.einsum("td,tkd->tk", x.float(), own).sigmoid()


class GliderGate(PhatgooseGate):
    """GLIDER, arXiv 2410.07172: PHATGOOSE's gate, steered by each request's bias (`glider_bias`)."""

    method = "glider"


def glider_bias(
    similarity: Tensor, *, threshold: float | Tensor = 0.8, sure: float = 100.0, unsure: float = 3.0
) -> Tensor:
    """The bias [B, E] of a batch of requests from the cosines [B, E] of instructions: alpha * s_glob.

    alpha is `unsure`, and `sure` more for a request of which some cosine passes `threshold`, which may be
    each adapter's own [E].
    """
    certain = (similarity > threshold).any(1, keepdim=True).to(similarity.dtype)
    return (sure * certain + unsure) * similarity
