"""SFTTrainer for a mixture: auxiliary losses over the global batch, loss-free biases, reports of load and entropy."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PrinterCallback, TrainerCallback
from trl import SFTConfig, SFTTrainer

from experts.mixing import Mixture, RequestMixture
from experts.mixing.balance import Record, add_records, auxiliary_loss, report
from training.mixing.data import ADAPTER, Collator
from training.mixing.train import adamw

OnStep = Callable[[int, int], None]


class MixtureTrainer(SFTTrainer):  # type: ignore[misc]
    """Trains what the mixture's method learns.

    The loads that a balance loss is made of are summed over all processes and over the micro-batches of the step so
    far: what a micro-batch's loss lacks is the load of those that come after it.
    """

    def __init__(
        self,
        mixture: Mixture,
        *,
        args: SFTConfig,
        on_step: OnStep = lambda *_: None,
        gate_learning_rate: float | None = None,
        **rest: Any,
    ) -> None:
        self.mixture = mixture
        self.learned = mixture.prepare_training()
        self.gate_learning_rate = gate_learning_rate or args.learning_rate
        self.balance: list[float] = []
        self._step: list[Record] = []  # of this step so far, over all processes
        self._recent: list[Record] = []  # of the steps since the last report
        super().__init__(model=mixture.model, args=args, callbacks=[_AfterStep(self, on_step)], **rest)
        self.remove_callback(PrinterCallback)  # what a command prints is the report alone
        self.data_collator: Any = Collator(self.data_collator)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW, with a learning rate of its own for the gates."""
        gates = {id(p) for gate in self.mixture.gates.values() for p in gate.parameters()}
        sides = ([p for p in self.learned if id(p) in gates], [p for p in self.learned if id(p) not in gates])
        rates = (self.gate_learning_rate, self.args.learning_rate)
        groups = [{"params": side, "lr": rate} for side, rate in zip(sides, rates, strict=True) if side]
        optimizer: torch.optim.Optimizer = adamw(groups)
        self.optimizer = optimizer
        return optimizer

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The answers' cross-entropy and the method's auxiliary loss."""
        adapters = inputs.pop(ADAPTER, None)
        with self._alone(adapters), self.mixture.recording() as records:
            computed = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            loss, *outputs = computed if return_outputs else (computed,)
            loss = loss + self._auxiliary(list(records), num_items_in_batch is not None)
        return (loss, *outputs) if return_outputs else loss

    @torch.no_grad()
    def record_decisions(self, batches: int = 8) -> None:
        """Let the gates decide for some training batches, for a report on gates that do not while they learn."""
        self.model.eval()
        for batch in itertools.islice(self.get_train_dataloader(), batches):
            inputs = {name: value for name, value in batch.items() if name not in (ADAPTER, "labels")}
            with self.mixture.recording() as records:
                self.model(**inputs)
                own = [self._over_processes(record) for record in records]
            self._recent = add_records(self._recent, own) if self._recent else own

    def latest_report(self) -> dict[str, dict[str, object]]:
        """Load and entropy of each gate over the steps since it was asked for last."""
        lines = report(self._recent, self.mixture.rule.tsallis) if self._recent else {}
        self._recent = []
        return lines

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """With the mean auxiliary loss since the last time."""
        if self.balance:
            logs["auxiliary_loss"] = sum(self.balance) / len(self.balance)
            self.balance.clear()
        super().log(logs, *args, **kwargs)

    @contextlib.contextmanager
    def _alone(self, adapters: Tensor | None) -> Any:
        """Each row with its own adapter alone, let through by its own gate."""
        if adapters is None:
            yield
            return
        names = self.mixture.adapters
        state = self.mixture.state
        with self.mixture.requests([RequestMixture.only(names[e]) for e in adapters.tolist()]):
            state.solo = True
            try:
                yield
            finally:
                state.solo = False

    def _auxiliary(self, records: Sequence[Record], loss_is_a_sum: bool) -> Tensor | float:
        if not records or not self.model.training:
            return 0.0
        own = [self._over_processes(record) for record in records]
        self._step = add_records(self._step, own) if self._step else own
        loss = auxiliary_loss(records, self.mixture.rule, self._step)
        if loss is None:
            return 0.0
        self.balance.append(float(loss.detach()))
        return loss / self.current_gradient_accumulation_steps if loss_is_a_sum else loss

    def _over_processes(self, record: Record) -> Record:
        r = record.detach()
        sums = {
            name: self.accelerator.reduce(getattr(r, name).clone(), "sum")
            for name in ("load", "importance", "entropy", "tokens")
        }
        return replace(r, **sums)

    def after_step(self) -> None:
        """Loss-free biases move; the step's records go to the report."""
        for record in self._step:
            self.mixture.gates[record.site].rebalance(record.load)
        if self._step:
            self._recent = add_records(self._recent, self._step) if self._recent else self._step
        self._step = []


class _AfterStep(TrainerCallback):  # type: ignore[misc]
    def __init__(self, trainer: MixtureTrainer, on_step: OnStep) -> None:
        self._trainer, self._on_step = trainer, on_step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._trainer.after_step()
        self._on_step(state.global_step, state.max_steps)
