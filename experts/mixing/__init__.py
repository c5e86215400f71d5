"""Mixing LoRA adapters inside one model, per token and per layer: one layer, one kernel, a gate for each method.

state.py     what the requests of the coming forward pass ask for: the seam between an engine and the layers
layer.py     `MixedLoraLinear`, and `RankLoraLinear` for the methods whose experts are single ranks
gate.py      what a gate is
gates.py     the methods that learn a router together with their adapters, and those that are given their weights
post_hoc.py  the methods that route among adapters that are there already: mole, arrow, phatgoose, glider
rank_gates.py  smora and flylora, whose experts are ranks
selection.py from scores to a decision
load.py      how much of each adapter one request's tokens got
balance.py   what a forward pass says of its gates, and the losses made of it
adapters.py  adapters as matrices for each layer: read, made, written in PEFT's format
assemble.py  one mixture of adapters whose gates were made apart
install.py   `install_mixture`, `load_mixture` and the `Mixture` that takes itself out again

docs/mixing.md says how to use it.
"""

from experts.mixing.adapters import LayerAdapter, new_adapters, read_adapters
from experts.mixing.assemble import assemble_mixture
from experts.mixing.install import GATES, Mixture, fresh_adapters, install_mixture, load_mixture
from experts.mixing.load import GateLoad
from experts.mixing.state import MixingState, RequestMixture

__all__ = [
    "GATES",
    "GateLoad",
    "LayerAdapter",
    "MixingState",
    "Mixture",
    "RequestMixture",
    "assemble_mixture",
    "fresh_adapters",
    "install_mixture",
    "load_mixture",
    "new_adapters",
    "read_adapters",
]
