"""What belongs to one expert alone: its rows of the gate, its instruction, and how it does on its own examples.

PART/gate.safetensors   the gate of a mixture of this adapter alone
PART/part.json          the rest

Nothing of it depends on another expert, so parts can be made at the same time, on several machines, or years apart.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from experts.mixing import RequestMixture
from experts.mixing.assemble import ADAPTER_FILES
from experts.mixing.install import GATE_FILE
from routers.query import query_from_body
from training.errors import TrainJobError
from training.glider.spec import GateTraining, GliderSpec
from training.glider.writer import write_instruction
from training.manifest import package_versions
from training.mixing.data import Example, read_examples
from training.mixing.spec import MixtureSpec
from training.mixing.train import build_mixture, load_base, train_mixture
from training.work_folder import read_report

PART_FILE = "part.json"
OnProgress = Callable[[str, int, int], None]


class Observed(BaseModel):
    """What the adapter alone made of one example. `right`: its likeliest answer, token by token, is the example's."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    query: str
    right: bool
    input_tokens: int
    output_tokens: int


class Part(BaseModel):
    """One expert. `key` is a hash of all that decides the part; `loss` is that of the vectors' last steps."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    key: str
    instruction: str
    loss: float | None
    observed: tuple[Observed, ...]

    @classmethod
    def read(cls, folder: Path) -> Part:
        """The part in a folder. Raises `TrainJobError`."""
        try:
            return cls.model_validate_json((folder / PART_FILE).read_bytes())
        except (OSError, ValidationError) as error:
            raise TrainJobError(f"{folder} holds no expert's part: {error}") from error


def part_key(spec: GliderSpec, name: str) -> str:
    """A hash of all that decides an expert's part, and of nothing that belongs to another."""
    task, file = spec.file.tasks[name], spec.file
    writer = file.writer.model_dump(mode="json") if file.writer and task.instruction is None else None
    decides = {
        "base": _base_sha256(spec.base) if Path(spec.base).is_dir() else spec.base,
        "adapter": [_sha256(spec.adapter(name) / part) for part in ADAPTER_FILES],
        "data": _sha256(task.data),
        "instruction": task.instruction,
        "writer": writer,
        "gate": spec.gate,
        "steps": spec.steps,
        "training": file.model_dump(mode="json", include=set(GateTraining.model_fields) - {"steps"}),
        "embedder": file.embedder.model_dump(mode="json"),
        "seed": spec.seed,
        "torch": package_versions()["torch"],
    }
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()


@cache
def _base_sha256(folder: str) -> str:
    files = sorted(path for path in Path(folder).iterdir() if path.suffix in (".safetensors", ".json", ".jinja"))
    return hashlib.sha256("".join(path.name + _sha256(path) for path in files).encode()).hexdigest()


def _sha256(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise TrainJobError(f"cannot read {path}: {error}") from error


def make_part(
    spec: GliderSpec, name: str, key: str, folder: Path, *, on_progress: OnProgress = lambda *_: None
) -> Part:
    """Make the part of the expert `name`, whose `part_key` is `key`, in `folder`, unless it is there.

    A killed run goes on from its last checkpoint.
    """
    if (folder / PART_FILE).exists() and (known := Part.read(folder)).key == key:
        return known
    examples = _examples(spec, name)
    work = folder.with_name(f"{folder.name}-{key[:12]}")
    loss = _make_gate(spec, name, examples, work, on_progress)
    instruction = _instruction(spec, name, examples)
    observed = _observe(_run(spec, name, work), name, examples[: spec.file.observed])
    part = Part(key=key, instruction=instruction, loss=loss, observed=observed)
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(work / "mixture" / GATE_FILE, folder / GATE_FILE)
    half = folder / f"{PART_FILE}.part"
    half.write_text(part.model_dump_json(indent=1) + "\n")
    half.replace(folder / PART_FILE)
    shutil.rmtree(work)
    return part


def _examples(spec: GliderSpec, name: str) -> list[Example]:
    return [e.model_copy(update={"adapter": name}) for e in read_examples(spec.file.tasks[name].data)]


def _make_gate(
    spec: GliderSpec, name: str, examples: Sequence[Example], work: Path, on_progress: OnProgress
) -> float | None:
    """The mixture of this adapter alone in WORK/mixture; the last loss, where there was something to train."""
    run = _run(spec, name, work)
    if spec.gate == "arrow":
        run.out.mkdir(parents=True, exist_ok=True)
        build_mixture(run, load_base(run)[0]).save(run.out)
        return None
    work.mkdir(parents=True, exist_ok=True)
    run.data.write_text("".join(e.model_dump_json(exclude_none=True) + "\n" for e in examples), encoding="utf-8")
    if not run.out.exists():
        train_mixture(run, on_progress=lambda _, done, total: on_progress(f"train {name}", done, total))
    losses: list[dict[str, Any]] = read_report(run.out)["loss"]
    return float(losses[-1]["loss"]) if losses else None


def _run(spec: GliderSpec, name: str, work: Path) -> MixtureSpec:
    """The training of the vectors of this adapter alone."""
    file = spec.file
    return MixtureSpec(
        base=spec.base,
        gate=spec.gate,
        options={"k": 1},
        adapters={name: spec.adapter(name)},
        data=work / "examples.jsonl",
        out=work / "mixture",
        steps=max(1, spec.steps),
        batch=file.batch,
        learning_rate=file.learning_rate,
        warmup=min(file.warmup, spec.steps // 2),
        max_tokens=file.max_tokens,
        seed=spec.seed,
        checkpoint_every=50,
    )


def _instruction(spec: GliderSpec, name: str, examples: Sequence[Example]) -> str:
    given = spec.file.tasks[name].instruction
    if given:
        return given
    if spec.file.writer is None:
        raise TrainJobError(f"task {name!r} has no instruction: give one, or a `writer` that writes it from examples")
    return write_instruction(spec.file.writer, examples)


def _observe(run: MixtureSpec, name: str, examples: Sequence[Example]) -> tuple[Observed, ...]:
    """Each example in one pass over question and answer.

    Greedy decoding gives the answer where every token of it is the likeliest after those before it.
    """
    import torch

    model, tokenizer = load_base(run)
    mixture = build_mixture(run, model.eval())
    device = mixture.state.device
    observed = []
    with torch.inference_mode(), mixture.requests([RequestMixture.only(name)]):
        for example in examples:
            chat = list(example.chat)
            told = [*chat, {"role": "assistant", "content": example.answers[0]}]
            prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
            tokens = tokenizer.apply_chat_template(told, return_dict=False)
            ids = torch.tensor([tokens], device=device)
            likeliest = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].argmax(-1)
            right = bool((likeliest == ids[0, len(prompt) :]).all())
            query = query_from_body("chat/completions", {"messages": chat}).text
            lengths = {"input_tokens": len(prompt), "output_tokens": len(tokens) - len(prompt)}
            observed.append(Observed(query=query, right=right, **lengths))
    return tuple(observed)
