"""Floor 1: kernels that mix many LoRA adapters per token, on CPUs and GPUs.

`mixed_lora` over an `AdapterStack` is the one operator; `route` makes the decision that it takes; `project_ranks` and
`expand_ranks` mix the ranks of a single adapter. docs/kernels.md says which backend runs when, and how fast.
"""

from kernels.align import Alignment, align
from kernels.attention import attend_past, can_attend
from kernels.errors import BackendError, KernelError, MixtureError
from kernels.mixed import mixed_lora
from kernels.mixture import check_mixture
from kernels.rankwise import expand_ranks, project_ranks
from kernels.route import route
from kernels.stack import AdapterStack

__all__ = [
    "AdapterStack",
    "Alignment",
    "BackendError",
    "KernelError",
    "MixtureError",
    "align",
    "attend_past",
    "can_attend",
    "check_mixture",
    "expand_ranks",
    "mixed_lora",
    "project_ranks",
    "route",
]
