"""A run from its configuration to the saved mixture.

`out` holds the mixture (`experts.mixing.load_mixture` reads it) and `report.json`. What is half done lies in
`OUT.part`, with checkpoints that the same command goes on from; one rename makes it `out`.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from experts.mixing import Mixture, fresh_adapters, install_mixture, read_adapters
from training.errors import TrainJobError
from training.manifest import package_versions
from training.mixing.data import dataset, read_examples
from training.mixing.spec import MixtureSpec
from training.work_folder import REPORT_FILE, last_checkpoint, steps_of

OnProgress = Callable[[str, int, int], None]


def train_mixture(
    spec: MixtureSpec, *, resume: bool = True, on_progress: OnProgress = lambda *_: None
) -> dict[str, Any]:
    """Train and save a mixture; returns its report. Under `torchrun` the processes share each step's batch.

    Raises `TrainJobError` for a configuration, data or folder that will not do, `MixingError` for adapters or options
    that do not fit, both before training starts.
    """
    if spec.out.exists():
        raise TrainJobError(f"{spec.out} is there already: name a new folder")
    examples = read_examples(spec.data)
    model, tokenizer = load_base(spec)
    mixture = build_mixture(spec, model)
    if mixture.gate.learns == "nothing":
        raise TrainJobError(f"gate {spec.gate!r} has nothing to learn: install it as it is")
    rows = dataset(examples, mixture.adapters, alone=mixture.gate.learns_alone)
    part = spec.out.with_name(spec.out.name + ".part")
    args = sft_config(spec, part / "checkpoints", on_cpu=mixture.state.device.type == "cpu")
    with args.main_process_first(local=False):  # the others find the folder made
        _make_work_folder(part, spec, resume=resume or args.process_index > 0)
    trainer = _trainer(spec, mixture, tokenizer, rows, args, on_progress)
    checkpoint = last_checkpoint(part)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if mixture.gate.learns_alone:  # nothing was decided by the gates so far
        trainer.record_decisions()
    written = _report(spec, trainer, len(examples), spec.steps - steps_of(checkpoint))
    trainer.accelerator.wait_for_everyone()
    if trainer.is_world_process_zero():
        _save(mixture, written, part, spec.out)
    trainer.accelerator.wait_for_everyone()
    return written


def _save(mixture: Mixture, report: dict[str, Any], part: Path, out: Path) -> None:
    mixture.save(part / "mixture")
    (part / "mixture" / REPORT_FILE).write_text(json.dumps(report, indent=2) + "\n")
    out.parent.mkdir(parents=True, exist_ok=True)
    (part / "mixture").replace(out)
    shutil.rmtree(part)


def build_mixture(spec: MixtureSpec, model: Any) -> Mixture:
    """The spec's mixture, in `model`."""
    if spec.adapters:
        adapters = read_adapters(spec.adapters, model)
    else:
        adapters = fresh_adapters(
            model,
            spec.gate,
            spec.options,
            experts=spec.experts,
            rank=spec.rank,
            targets=spec.targets,
            seed=spec.seed,
        )
    import torch

    torch.manual_seed(spec.seed)  # of the gates' first weights
    return install_mixture(model, adapters, spec.gate, spec.options)


def load_base(spec: MixtureSpec) -> tuple[Any, Any]:
    """The base model, in float32, and its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    device = ("cuda" if torch.cuda.is_available() else "cpu") if spec.device == "auto" else spec.device
    try:
        model = AutoModelForCausalLM.from_pretrained(spec.base, dtype=torch.float32, use_safetensors=True)
        tokenizer = AutoTokenizer.from_pretrained(spec.base)
    except (OSError, ValueError) as error:
        raise TrainJobError(f"the base {spec.base!r} cannot be loaded: {error}") from error
    if tokenizer.chat_template is None:
        raise TrainJobError(f"the tokenizer of {spec.base!r} has no chat template")
    return model.to(device), tokenizer


def sft_config(spec: MixtureSpec, folder: Path, *, on_cpu: bool) -> Any:
    """The spec as TRL's trainer takes it; checkpoints go to `folder`."""
    from trl import SFTConfig

    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if spec.batch % processes:
        raise TrainJobError(f"batch {spec.batch} must be a multiple of the {processes} processes")
    own = spec.batch // processes
    micro = min(spec.micro_batch or own, own)
    return SFTConfig(
        output_dir=str(folder),
        max_steps=spec.steps,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=own // micro,
        learning_rate=spec.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=spec.warmup,
        max_length=spec.max_tokens,
        completion_only_loss=True,
        remove_unused_columns=False,
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=on_cpu,
        dataloader_pin_memory=not on_cpu,
        save_steps=spec.checkpoint_every,
        save_total_limit=1,
        logging_steps=max(1, spec.steps // 20),
        report_to="none",
        disable_tqdm=True,
        seed=spec.seed,
    )


def adamw(groups: Any) -> Any:
    """The optimizer of all runs."""
    import torch

    return torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.0)


def _trainer(spec: MixtureSpec, mixture: Mixture, tokenizer: Any, rows: Any, args: Any, on: OnProgress) -> Any:
    from training.mixing.trainer import MixtureTrainer

    return MixtureTrainer(
        mixture,
        args=args,
        train_dataset=rows,
        processing_class=tokenizer,
        gate_learning_rate=spec.gate_learning_rate,
        on_step=lambda done, total: on("train", done, total),
    )


def _report(spec: MixtureSpec, trainer: Any, examples: int, steps: int) -> dict[str, Any]:
    """`steps` are those that this run made, after those of a checkpoint."""
    history = [line for line in trainer.state.log_history if "loss" in line]
    return {
        "spec": spec.model_dump(mode="json"),
        "examples": examples,
        "learned_parameters": sum(p.numel() for p in trainer.learned),
        "seconds_per_step": _last(trainer.state.log_history, "train_runtime") / max(steps, 1),
        "loss": [
            {"step": line["step"], "loss": line["loss"], "auxiliary": line.get("auxiliary_loss")} for line in history
        ],
        "gates": trainer.latest_report(),
        "packages": package_versions(),
    }


def _last(history: list[dict[str, Any]], name: str) -> float:
    return float(next((line[name] for line in reversed(history) if name in line), float("nan")))


def _make_work_folder(part: Path, spec: MixtureSpec, *, resume: bool) -> None:
    """Make `OUT.part`, or go on with that of the same spec where it is there already and wanted."""
    mark, described = part / "spec.json", spec.model_dump_json()
    if part.exists() and (not resume or not mark.exists()):
        shutil.rmtree(part)
    if part.exists() and mark.read_text() != described:
        raise TrainJobError(f"{part} is of a run with another configuration: go on with that, or use --no-resume")
    part.mkdir(parents=True, exist_ok=True)
    mark.write_text(described)
