"""A run from its configuration to the trained policy, through TRL's `GRPOTrainer`.

GRPO (arXiv 2402.03300): several conversations for each question, each one's advantage being its reward less the mean of
its group, over their standard deviation. The experts' tokens are masked from the loss.

`out` holds the policy and `report.json` with the curves. What is half done lies in `OUT.part`: checkpoints that the
same command goes on from, TensorBoard's event files in `curves`, sampled conversations in `samples.jsonl`. One rename
makes it `out`.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from random import Random
from statistics import fmean
from typing import Any

from experts.cards import ExpertCard
from routers.strategies.router_r1.protocol import Message, opening
from training.errors import TrainJobError
from training.manifest import package_versions
from training.pocket.skills.words import made_up
from training.router_r1.environment import Environment, Renamed
from training.router_r1.questions import Asked, pocket_questions, table_questions
from training.router_r1.rewards import Outcome, Rewards
from training.router_r1.rollout import Episode, Limits, roll_out
from training.router_r1.spec import PocketSource, RouterR1Spec
from training.work_folder import REPORT_FILE, last_checkpoint

OnProgress = Callable[[str, int, int], None]
SAMPLES_FILE, CURVES = "samples.jsonl", "curves"
_WINDOW_FILE = "costs.json"
_MISSING, _RENAMED = 0.2, 0.4  # of the experts, where fleets vary


def train_policy(
    spec: RouterR1Spec, *, resume: bool = True, on_progress: OnProgress = lambda *_: None
) -> dict[str, Any]:
    """Train and save a policy; returns its report.

    Raises `TrainJobError` for a configuration, data or folder that will not do, before training starts.
    """
    if spec.out.exists():
        raise TrainJobError(f"{spec.out} is there already: name a new folder")
    cards = fleet_cards(spec)
    questions = read_questions(spec, train=True)
    model, tokenizer = load_policy(spec)
    part = _work_folder(spec, resume)
    environment = make_environment(spec)
    try:
        run = Run(spec, tokenizer, questions, cards, environment, part)
        trainer = _trainer(spec, model, tokenizer, run, part, on_progress)
        checkpoint = last_checkpoint(part)
        if checkpoint:
            run.resume(checkpoint)
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    finally:
        environment.close()
    report = {
        "spec": spec.model_dump(mode="json"),
        "seconds": _last(trainer.state.log_history, "train_runtime"),
        "curves": curves(trainer.state.log_history),
        "packages": package_versions(),
    }
    _save(trainer, tokenizer, part, report)
    spec.out.parent.mkdir(parents=True, exist_ok=True)
    (part / "policy").replace(spec.out)
    shutil.rmtree(part)
    return report


def fleet_cards(spec: RouterR1Spec) -> list[ExpertCard]:
    """The cards that the policy is shown. Raises `TrainJobError` for a fleet that will not do."""
    from experts.fleet import load_fleet

    cards = [card for card in load_fleet(spec.fleet).cards if card.routed and card.kind != "embedding"]
    if lost := sorted(set(spec.without) - {card.name for card in cards}):
        raise TrainJobError(f"without: the fleet has no expert {lost[0]!r}")
    kept = [card for card in cards if card.name not in spec.without]
    if not kept:
        raise TrainJobError(f"{spec.fleet} leaves the policy no expert to ask")
    return kept


def read_questions(spec: RouterR1Spec, *, train: bool) -> list[Asked]:
    """The spec's questions for training, or those for tests. Raises `TrainJobError`."""
    source = spec.questions
    if isinstance(source, PocketSource):
        return pocket_questions(spec.seed, source.one, source.two, "train" if train else "held_out", source.without)
    return [asked for table in source.tables for asked in table_questions(table, source.metric, train=train)]


def make_environment(spec: RouterR1Spec) -> Environment:
    """Who replies. Raises `ExpertConfigError` for a fleet that cannot be built, `TrainJobError`."""
    experts = None
    if spec.environment == "live":
        from experts.build import build_experts
        from experts.fleet import load_fleet

        shown = {card.name for card in fleet_cards(spec)}
        experts = {name: expert for name, expert in build_experts(load_fleet(spec.fleet)).items() if name in shown}
    elif spec.recorded and not spec.recorded.exists():
        raise TrainJobError(f"there are no recorded replies in {spec.recorded}")
    return Environment(
        experts,
        spec.recorded,
        concurrency=spec.concurrency,
        timeout_s=spec.call_timeout_s,
        reply_tokens=spec.reply_tokens,
    )


def limits_of(spec: RouterR1Spec) -> Limits:
    """The bounds of the spec's rollouts."""
    return Limits(
        completion_tokens=spec.completion_tokens,
        turn_tokens=spec.turn_tokens,
        reply_chars=spec.reply_chars,
        max_calls=spec.max_calls,
        temperature=spec.temperature,
    )


def load_policy(spec: RouterR1Spec) -> tuple[Any, Any]:
    """The policy model and its tokenizer. Raises `TrainJobError`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    device = ("cuda" if torch.cuda.is_available() else "cpu") if spec.device == "auto" else spec.device
    try:
        dtype = getattr(torch, spec.dtype)
        model = AutoModelForCausalLM.from_pretrained(spec.policy, dtype=dtype, use_safetensors=True)
        tokenizer = AutoTokenizer.from_pretrained(spec.policy)
    except (OSError, ValueError) as error:
        raise TrainJobError(f"the policy {spec.policy!r} cannot be loaded: {error}") from error
    if tokenizer.chat_template is None:
        raise TrainJobError(f"the tokenizer of {spec.policy!r} has no chat template")
    return model.to(device), tokenizer


class Run:
    """What TRL's trainer calls back: the rollouts, their rewards, and what is logged of them."""

    def __init__(
        self,
        spec: RouterR1Spec,
        tokenizer: Any,
        questions: Sequence[Asked],
        cards: Sequence[ExpertCard],
        environment: Environment,
        folder: Path,
    ) -> None:
        self._spec, self._tokenizer, self._environment, self._folder = spec, tokenizer, environment, folder
        self._questions = list(questions)
        self._cards = list(cards)
        self._rewards = Rewards(spec.cost_weight, format_reward=spec.format_reward)
        self._meant: dict[str, str] = {}
        self._orders = [self._order(question) for question in questions]
        self._listed = {_key(self._opening(number)): cards for number, cards in enumerate(self._orders)}

    def dataset(self) -> Any:
        """A row for each question: its opening and its number."""
        from datasets import Dataset

        return Dataset.from_list(
            [{"prompt": self._opening(number), "number": number} for number in range(len(self._questions))]
        )

    def roll_out(self, prompts: Sequence[Any], trainer: Any) -> dict[str, Any]:
        """TRL's `rollout_func`: one conversation for each prompt, which come repeated already."""
        import torch

        model = trainer.accelerator.unwrap_model(trainer.model)
        generator = torch.Generator(device=model.device)
        generator.manual_seed(hash((self._spec.seed, trainer.state.global_step)) % 2**31)
        training = model.training
        model.eval()
        try:
            conversations = [(prompt, self._listed[_key(prompt)]) for prompt in prompts]
            environment = Renamed(self._environment, self._meant)
            episodes = roll_out(model, self._tokenizer, conversations, environment, limits_of(self._spec), generator)
        finally:
            model.train(training)
        return {
            "prompt_ids": [one.prompt for one in episodes],
            "completion_ids": [one.completion for one in episodes],
            "logprobs": [one.logprobs for one in episodes],
            "env_mask": [one.own for one in episodes],
            "episode": episodes,
        }

    def reward(
        self,
        prompts: Sequence[Any],
        *,
        number: Sequence[int],
        episode: Sequence[Episode],
        trainer_state: Any,
        log_metric: Callable[[str, float], None],
        **_: Any,
    ) -> list[float]:
        """TRL's reward function."""
        outcomes = [outcome_of(one, self._questions[place]) for one, place in zip(episode, number, strict=True)]
        rewards = self._rewards(outcomes)
        for name, value in summary(episode, outcomes).items():
            log_metric(name, value)
        if trainer_state.global_step % self._spec.log_samples_every == 0:
            self._log_samples(trainer_state.global_step, number, episode, rewards)
        return rewards

    def checkpoint(self, folder: Path) -> None:
        """Put what a resumed run needs beside TRL's checkpoint."""
        (folder / _WINDOW_FILE).write_text(json.dumps(list(self._rewards.window)))

    def resume(self, folder: Path) -> None:
        """Go on from a checkpoint."""
        path = folder / _WINDOW_FILE
        if path.exists():
            self._rewards.window.extend(json.loads(path.read_text()))

    def _opening(self, number: int) -> list[Message]:
        return opening(self._orders[number], self._questions[number].text, self._spec.instructions)

    def _order(self, question: Asked) -> list[ExpertCard]:
        """The cards as this question shows them: an order, and where wanted names and gaps, that are its own."""
        cards, rng = list(self._cards), Random(f"{self._spec.seed}:{question.id}")
        if self._spec.shuffle:
            rng.shuffle(cards)
        if not self._spec.vary:
            return cards
        kept = [card for card in cards if rng.random() >= _MISSING] or cards
        return [self._renamed(card, rng) if rng.random() < _RENAMED else card for card in kept]

    def _renamed(self, card: ExpertCard, rng: Random) -> ExpertCard:
        """The card under a name that no other has."""
        while (name := made_up(rng, rng.randint(4, 7))) in self._meant:
            pass
        self._meant[name] = card.name
        return card.model_copy(update={"name": name})

    def _log_samples(
        self, step: int, number: Sequence[int], episodes: Sequence[Episode], rewards: Sequence[float]
    ) -> None:
        with (self._folder / SAMPLES_FILE).open("a", encoding="utf-8") as file:
            for place, one, reward in list(zip(number, episodes, rewards, strict=True))[:: max(1, len(rewards) // 4)]:
                line = {"step": step, "question": self._questions[place].text, "reward": reward, **described(one)}
                file.write(json.dumps(line) + "\n")


def _key(messages: Sequence[Message]) -> tuple[str, ...]:
    return tuple(message["content"] for message in messages)


def outcome_of(episode: Episode, question: Asked) -> Outcome:
    """How a conversation about a question ended."""
    quality = 0.0 if episode.answer is None else question.grade(episode.answer)
    return Outcome(quality, episode.cost, episode.broken)


def summary(episodes: Sequence[Episode], outcomes: Sequence[Outcome]) -> dict[str, float]:
    """What the curves show beside the reward."""
    return {
        "router_r1/right": fmean(outcome.quality for outcome in outcomes),
        "router_r1/calls": fmean(len(one.searches) for one in episodes),
        "router_r1/cost": fmean(outcome.cost for outcome in outcomes),
        "router_r1/broken": fmean(outcome.broken is not None for outcome in outcomes),
    }


def described(episode: Episode) -> dict[str, Any]:
    """A conversation for people to read."""
    return {
        "turns": episode.turns,
        "searches": [asdict(search) for search in episode.searches],
        "replies": episode.replies,
        "answer": episode.answer,
        "broken": episode.broken,
    }


def curves(history: Sequence[Mapping[str, Any]]) -> list[dict[str, float]]:
    """Step by step: reward, right, calls, cost, broken."""
    names = {"reward": "reward", "reward_std": "reward_std", "entropy": "entropy"}
    names |= {f"router_r1/{name}": name for name in ("right", "calls", "cost", "broken")}
    return [
        {"step": line["step"], **{short: round(float(line[name]), 6) for name, short in names.items() if name in line}}
        for line in history
        if "reward" in line
    ]


def grpo_config(spec: RouterR1Spec, folder: Path, *, on_cpu: bool) -> Any:
    """The spec as TRL's trainer takes it. Raises `TrainJobError`."""
    from trl import GRPOConfig

    processes = int(os.environ.get("WORLD_SIZE", "1"))
    batch = spec.questions_per_step * spec.rollouts
    if batch % processes:
        raise TrainJobError(f"questions_per_step * rollouts = {batch} must be a multiple of the {processes} processes")
    own = batch // processes
    micro = min(spec.micro_batch or own, own)
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"  # `rollout_func` is experimental, and its version pinned
    return GRPOConfig(
        output_dir=str(folder / "checkpoints"),
        max_steps=spec.steps,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=own // micro,
        num_generations=spec.rollouts,
        max_completion_length=spec.completion_tokens,
        temperature=spec.temperature,
        learning_rate=spec.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=spec.warmup,
        beta=0.0,
        bf16=spec.dtype == "bfloat16" and not on_cpu,
        activation_checkpointing=spec.activation_checkpointing,
        use_cpu=on_cpu,
        dataloader_pin_memory=not on_cpu,
        save_steps=spec.checkpoint_every,
        save_total_limit=1,
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        seed=spec.seed,
    )


def _trainer(spec: RouterR1Spec, model: Any, tokenizer: Any, run: Run, part: Path, on: OnProgress) -> Any:
    from tensorboardX import SummaryWriter
    from transformers import TrainerCallback
    from transformers.integrations import TensorBoardCallback
    from trl import GRPOTrainer

    class _AfterStep(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            on("train", state.global_step, state.max_steps)

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            run.checkpoint(Path(args.output_dir) / f"checkpoint-{state.global_step}")

    return GRPOTrainer(
        model=model,
        reward_funcs=[run.reward],
        args=grpo_config(spec, part, on_cpu=model.device.type == "cpu"),
        train_dataset=run.dataset(),
        processing_class=tokenizer,
        rollout_func=run.roll_out,
        callbacks=[_AfterStep(), TensorBoardCallback(SummaryWriter(str(part / CURVES)))],
    )


def _save(trainer: Any, tokenizer: Any, part: Path, report: Mapping[str, Any]) -> None:
    """The policy in bfloat16 with its tokenizer, the report, the curves and the samples."""
    import torch

    folder = part / "policy"
    model = trainer.accelerator.unwrap_model(trainer.model).to(torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / REPORT_FILE).write_text(json.dumps(report, indent=2) + "\n")
    for name in (SAMPLES_FILE, CURVES):
        if (part / name).exists():
            shutil.move(part / name, folder / name)


def _last(history: Sequence[Mapping[str, Any]], name: str) -> float:
    return float(next((line[name] for line in reversed(history) if name in line), float("nan")))


def _work_folder(spec: RouterR1Spec, resume: bool) -> Path:
    """`OUT.part`, that of the same spec where it is there already and wanted."""
    part, described_as = spec.out.with_name(spec.out.name + ".part"), spec.model_dump_json()
    mark = part / "spec.json"
    if part.exists() and (not resume or not mark.exists()):
        shutil.rmtree(part)
    if part.exists() and mark.read_text() != described_as:
        raise TrainJobError(f"{part} is of a run with another configuration: go on with that, or use --no-resume")
    part.mkdir(parents=True, exist_ok=True)
    mark.write_text(described_as)
    return part
