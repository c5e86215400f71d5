"""The members of the pocket fleet: names, descriptions, places, active parameters and prices."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from training.pocket.skills import SKILLS

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

FLEET = Path(__file__).resolve().parents[2] / "experts" / "pocket"
"""Where the shipped weights are."""

BASE, GENERALIST, POLICY = "base", "generalist", "policy"
USD_PER_MILLION_PARAMETERS = 0.1
"""USD per million input tokens that each million of active parameters costs."""
OUTPUT_PRICE_FACTOR = 4

_BYTES_PER_WEIGHT = 2


@dataclass(frozen=True)
class Member:
    """One expert of the fleet; ``part`` is ``base``, ``generalist`` or a skill."""

    part: str
    folder: Path = FLEET

    @property
    def name(self) -> str:
        return f"pocket-{self.part}"

    @property
    def description(self) -> str:
        if self.part in SKILLS:
            return SKILLS[self.part].description
        if self.part == GENERALIST:
            return (
                "A larger model that knows a little of every skill: arithmetic, units, dates, text, data, logic, facts."
            )
        return "A small base model that copies, spells, counts and looks up; the specialists adapt it."

    @property
    def model_folder(self) -> Path:
        return self.folder / (GENERALIST if self.part == GENERALIST else BASE)

    @property
    def adapter_folder(self) -> Path | None:
        return self.folder / "adapters" / self.part if self.part in SKILLS else None

    @cached_property
    def active_parameters(self) -> int:
        """How many weights take part in an answer, from the sizes of the bfloat16 files."""
        size = (self.model_folder / "model.safetensors").stat().st_size
        if self.adapter_folder is not None:
            size += (self.adapter_folder / "adapter_model.safetensors").stat().st_size
        return size // _BYTES_PER_WEIGHT

    @property
    def input_price(self) -> float:
        """USD per million input tokens."""
        return round(self.active_parameters / 1e6 * USD_PER_MILLION_PARAMETERS, 2)

    @property
    def output_price(self) -> float:
        """USD per million output tokens."""
        return round(self.input_price * OUTPUT_PRICE_FACTOR, 2)

    def cost(self, input_tokens: int, output_tokens: int) -> float:
        """USD for one answer."""
        return (input_tokens * self.input_price + output_tokens * self.output_price) / 1e6

    def load(self) -> "LlamaForCausalLM":
        """The expert's model, its adapter merged."""
        from training.pocket.model import load_model

        return load_model(self.model_folder, self.adapter_folder)


def members(folder: Path = FLEET) -> list[Member]:
    """Every expert of the fleet: the base, the specialists, the generalist."""
    return [Member(part, folder) for part in (BASE, *SKILLS, GENERALIST)]
