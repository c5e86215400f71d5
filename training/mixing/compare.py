"""What each gate is worth on the pocket skills: `python -m training.mixing.compare`.

Every method trains by the same number of steps on the same questions of all skills and answers the same held-out ones.
Its learning rate is that of `RATES` that did best on validation questions, which are neither trained on nor held out.
Beside the gates stand what they must beat: one LoRA of equal total rank (PEFT's own), equal weights for all adapters,
random adapters, and the right adapter, known beforehand. Results are written as they come; the same command goes on
with what is missing, and puts the table into docs/mixing.md.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from experts.mixing import Mixture, RequestMixture, install_mixture, load_mixture, read_adapters
from experts.mixing.post_hoc import glider_bias
from training.errors import TrainJobError
from training.mixing.data import Example, dataset, read_examples
from training.mixing.spec import MixtureSpec
from training.mixing.train import adamw, load_base, sft_config, train_mixture
from training.pocket.fleet import FLEET
from training.pocket.generate import respond
from training.pocket.grading import is_right, sample
from training.pocket.questions import Question
from training.pocket.skills import SKILLS
from training.pocket.tokens import encode_pairs
from training.work_folder import read_report

logger = logging.getLogger(__name__)

RESULTS, DOCUMENT = Path("docs/results/mixing.json"), Path("docs/mixing.md")
_BEGIN, _END = "<!-- accuracy -->", "<!-- end -->"
WORK = Path.home() / ".cache" / "router-service" / "mixing"
COMMAND = "python -m training.mixing.compare"
STEPS, BATCH, QUESTIONS, SEEDS = 80, 32, 330, 3
RATES = (2e-4, 5e-4, 1e-3, 2e-3)
GATE_RATE = 2.5  # a gate's own learning rate, times that of the adapters
CHOICE_STEPS, CHOICE_QUESTIONS, CHOICE_SEED = 24, 500, 100
_ROWS = 110  # questions answered at once

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
JOINT: Mapping[str, Mapping[str, Any]] = {  # all of total rank 64 in each layer (mola: on the mean of the layers)
    "mixlora": {"experts": 8, "rank": 8},
    "mola": {"experts": (4, 7, 9, 12), "rank": 8},
    "dynmole": {"experts": 8, "rank": 8},
    "llava_mole": {"experts": 8, "rank": 8},
    "dynamic": {"experts": 8, "rank": 8},
    "smora": {"experts": 1, "rank": 64},
    "flylora": {"experts": 1, "rank": 64},
}
GATE_ALONE = ("mole", "phatgoose")
LORA = {"lora": 64, "lora of all specialists' rank": 16 * len(SKILLS)}
TRAINED = (*LORA, *GATE_ALONE, *JOINT)
METHODS = ("base", "right adapter", "uniform", "random", "arrow", *TRAINED, "glider")
ADAPTERS = {name: FLEET / "adapters" / name for name in SKILLS}


class Comparison:
    """One seed's runs."""

    def __init__(self, seed: int, work: Path) -> None:
        self.seed, self.work = seed, work / str(seed)
        self.questions = list(sample(seed, QUESTIONS, "one", "held_out"))
        self.data, lines = self.work / "train.jsonl", "".join(self._training_lines())
        if self.data.exists() and self.data.read_text() != lines:
            raise TrainJobError(f"{self.data} holds other questions: name another --work")
        self.work.mkdir(parents=True, exist_ok=True)
        self.data.write_text(lines)

    def run(self, method: str, rate: float | None) -> dict[str, Any]:
        """Accuracy of a method, those that are trained at the learning rate `rate`."""
        if rate is not None:
            return self.glider(rate) if method == "glider" else self.trained(method, rate)
        untrained: dict[str, Callable[[], dict[str, Any]]] = {
            "base": lambda: self.static({}),
            "right adapter": self.right,
            "uniform": lambda: self.static({name: 1 / len(SKILLS) for name in SKILLS}),
            "random": self.random,
            "arrow": lambda: self.measure(self.specialists("arrow")),
        }
        return untrained[method]()

    def spec(self, method: str, rate: float, steps: int = STEPS) -> MixtureSpec:
        """How a method is trained. Plain LoRA is no gate, but has the rest of it."""
        gate = "mixlora" if method in LORA else method
        own: dict[str, Any] = {"adapters": ADAPTERS} if gate in GATE_ALONE else {"targets": PROJECTIONS, **JOINT[gate]}
        return MixtureSpec(
            base=str(FLEET / "base"),
            gate=gate,
            data=self.data,
            out=self.work / f"{method}, {steps} steps at {rate:g}",
            steps=steps,
            batch=BATCH,
            learning_rate=rate,
            gate_learning_rate=GATE_RATE * rate,
            seed=self.seed,
            checkpoint_every=25,
            **own,
        )

    def trained(self, method: str, rate: float) -> dict[str, Any]:
        """Accuracy on the held-out questions."""
        model, facts = self.learn(method, self.spec(method, rate))
        return self._accuracy(lambda queries, _: _answers(model, _tokenizer(), queries)) | facts

    def validated(self, method: str, rate: float) -> float:
        """The share of validation questions that a shorter training gets right."""
        model, _ = self.learn(method, self.spec(method, rate, CHOICE_STEPS))
        return right_token_by_token(model, list(sample(self.seed, CHOICE_QUESTIONS, "one", "observed")))

    def learn(self, method: str, spec: MixtureSpec) -> tuple[Any, dict[str, Any]]:
        """The trained model and what is to be said of its training."""
        if method in LORA:
            return self._lora(LORA[method], spec)
        report = _report_of(spec)
        kept = ("seconds_per_step", "learned_parameters", "gates")
        facts = {"learning_rate": spec.learning_rate} | {name: report[name] for name in kept}
        return load_mixture(load_base(spec)[0], spec.out).model.eval(), facts

    def specialists(self, gate: str, options: Mapping[str, Any] | None = None) -> Mixture:
        """The shipped specialists under a gate."""
        model, _ = load_base(self.spec("phatgoose", RATES[0]))
        return install_mixture(model, read_adapters(ADAPTERS, model), gate, options)

    def static(self, weights: Mapping[str, float]) -> dict[str, Any]:
        return self.measure(self.specialists("static", {"weights": dict(weights)}))

    def right(self) -> dict[str, Any]:
        return self.measure(self.specialists("static"), lambda q: RequestMixture.only(q.skills[0]))

    def random(self) -> dict[str, Any]:
        """Two adapters drawn anew for each token and layer, with random weights."""
        mixture = self.specialists("arrow", {"k": 2})
        generator = torch.Generator().manual_seed(self.seed)
        for gate in mixture.gates.values():
            gate.score = lambda x: torch.randn(len(x), len(SKILLS), generator=generator)  # type: ignore[method-assign]
        return self.measure(mixture)

    def glider(self, rate: float) -> dict[str, Any]:
        """PHATGOOSE's gates, with the likeness of each question to the adapters' descriptions as bias."""
        from routers.embedder import shared_embedder

        mixture, spec = self.specialists("glider"), self.spec("phatgoose", rate)
        _report_of(spec)
        trained = load_mixture(load_base(spec)[0], spec.out)
        for name, gate in mixture.gates.items():
            gate.load_state_dict(trained.gates[name].state_dict())
        embedder = shared_embedder()
        descriptions = embedder.embed([skill.description for skill in SKILLS.values()])
        vectors = embedder.embed([question.query for question in self.questions])
        bias = glider_bias(torch.from_numpy(vectors @ descriptions.T)).tolist()
        own = {q.id: dict(zip(SKILLS, row, strict=True)) for q, row in zip(self.questions, bias, strict=True)}
        return self.measure(mixture, lambda q: RequestMixture(bias=own[q.id])) | {"learning_rate": rate}

    def _lora(self, rank: int, spec: MixtureSpec) -> tuple[Any, dict[str, Any]]:
        """PEFT's plain LoRA on all skills, by the same trainer."""
        from peft import LoraConfig, get_peft_model
        from trl import SFTTrainer

        model, tokenizer = load_base(spec)
        torch.manual_seed(self.seed)
        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(PROJECTIONS), task_type="CAUSAL_LM")
        model = get_peft_model(model, config)
        learned = [p for p in model.parameters() if p.requires_grad]
        trainer = SFTTrainer(
            model=model,
            args=sft_config(spec, spec.out, on_cpu=True),
            train_dataset=dataset(read_examples(self.data), (), alone=False),
            processing_class=tokenizer,
            optimizers=(adamw([{"params": learned, "lr": spec.learning_rate}]), None),
        )
        seconds = trainer.train().metrics["train_runtime"] / spec.steps
        facts = {"seconds_per_step": seconds, "learned_parameters": sum(p.numel() for p in learned)}
        return model.eval(), {"learning_rate": spec.learning_rate} | facts

    def measure(self, mixture: Mixture, wish: Callable[[Question], RequestMixture] | None = None) -> dict[str, Any]:
        """Accuracy of a mixture, each question with the request that `wish` makes of it."""
        model, tokenizer = mixture.model.eval(), _tokenizer()

        def answer(queries: Sequence[str], part: Sequence[Question]) -> list[str]:
            if wish is None:
                return _answers(model, tokenizer, queries)
            with mixture.requests([wish(question) for question in part]):
                return _answers(model, tokenizer, queries)

        return self._accuracy(answer)

    def _accuracy(self, answer: Callable[[Sequence[str], Sequence[Question]], list[str]]) -> dict[str, Any]:
        right: dict[str, list[bool]] = {}
        ordered = sorted(self.questions, key=lambda question: len(question.query))
        for start in range(0, len(ordered), _ROWS):
            part = ordered[start : start + _ROWS]
            for question, text in zip(part, answer([q.query for q in part], part), strict=True):
                right.setdefault(question.skills[0], []).append(is_right(question.skills, question.answer, text))
        every = [verdict for verdicts in right.values() for verdict in verdicts]
        return {"accuracy": fmean(every), "skills": {name: fmean(right[name]) for name in sorted(right)}}

    def _training_lines(self) -> Iterator[str]:
        for q in sample(1000 + self.seed, STEPS * BATCH, "one", "train"):
            yield Example(query=q.query, answer=q.answer, adapter=q.skills[0]).model_dump_json(exclude_none=True) + "\n"


def _report_of(spec: MixtureSpec) -> dict[str, Any]:
    """The report of a training, which is run where it has not been before. Raises `TrainJobError`."""
    if not spec.out.exists():
        return train_mixture(spec, on_progress=_log_progress)
    report = read_report(spec.out)
    if report["spec"] != spec.model_dump(mode="json"):
        raise TrainJobError(f"{spec.out} was trained by another configuration: name another --work")
    return report


def _tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(FLEET / "base")


@torch.inference_mode()
def right_token_by_token(model: Any, questions: Sequence[Question]) -> float:
    """The share of answers each of whose tokens is the most likely one after those before it."""
    pairs = [(q.query, q.answer) for q in sorted(questions, key=lambda question: len(question.query))]
    encoded = list(encode_pairs(_tokenizer(), pairs))
    right = 0
    for start in range(0, len(encoded), _ROWS):
        rows = encoded[start : start + _ROWS]
        tokens = torch.nn.utils.rnn.pad_sequence([torch.tensor(ids) for ids, _ in rows], batch_first=True)
        likely = model(tokens, attention_mask=_until(tokens, [len(ids) for ids, _ in rows])).logits.argmax(-1)
        for row, next_one, (ids, prompt) in zip(tokens, likely, rows, strict=True):
            right += bool((row[prompt : len(ids)] == next_one[prompt - 1 : len(ids) - 1]).all())
    return right / len(encoded)


def _until(tokens: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
    """[rows, tokens], 1 before each row's length."""
    return (torch.arange(tokens.shape[1]) < torch.tensor(lengths)[:, None]).long()


def _answers(model: Any, tokenizer: Any, queries: Sequence[str]) -> list[str]:
    """In the order of the queries, which must be by length: `respond` then keeps the rows in place."""
    return [response.text for response in respond(model, tokenizer, queries)]


def table(results: Mapping[str, Any]) -> str:
    """Accuracy of every method as Markdown: mean, and each seed."""
    lines = ["| method | learning rate | accuracy | by seed |", "|---|---|---|---|"]
    for method, own in results["accuracy"].items():
        seeds = ", ".join(f"{value:.1%}" for value in own["seeds"].values())
        rate = "" if own["learning_rate"] is None else f"{own['learning_rate']:g}"
        lines.append(f"| {method} | {rate} | {own['mean']:.1%} | {seeds} |")
    return "\n".join(lines)


def with_table(document: str, text: str) -> str:
    """The document with `text` between its markers."""
    before, rest = document.split(_BEGIN, 1)
    return f"{before}{_BEGIN}\n{text}\n{_END}{rest.split(_END, 1)[1]}"


def _log_progress(step: str, done: int, total: int) -> None:
    if done % 25 == 0:
        logger.info("%s %d/%d", step, done, total)


def run(seeds: int, results: Path, work: Path, only: Sequence[str] = ()) -> dict[str, Any]:
    """Run what is missing, method by method; the results file after each run."""
    kept: dict[str, Any] = json.loads(results.read_text()) if results.exists() else {}
    validation: dict[str, dict[str, float]] = kept.get("validation", {})
    runs: dict[str, dict[str, Any]] = kept.get("runs", {})
    choosing, comparisons = Comparison(CHOICE_SEED, work), [Comparison(seed, work) for seed in range(seeds)]
    for method in only or METHODS:
        trained = "phatgoose" if method == "glider" else method  # whose gates glider has
        for rate in RATES if trained in TRAINED else ():
            own = validation.setdefault(trained, {})
            if f"{rate:g}" not in own:
                own[f"{rate:g}"] = choosing.validated(trained, rate)
                logger.info("%s at %g: %.3f on validation", trained, rate, own[f"{rate:g}"])
                _write(_results(validation, runs), results)
        wanted = chosen(validation).get(method)
        runs[method] = {seed: r for seed, r in runs.get(method, {}).items() if r.get("learning_rate") == wanted}
        for comparison in comparisons:
            if str(comparison.seed) not in runs[method]:
                outcome = runs[method][str(comparison.seed)] = comparison.run(method, wanted)
                logger.info("%s, seed %d: %.3f", method, comparison.seed, outcome["accuracy"])
                _write(_results(validation, runs), results)
    return _results(validation, runs)


def chosen(validation: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """The best learning rate of each method, the smaller of equals; glider has the gates of phatgoose."""
    rates = {method: float(max(own, key=lambda rate: (own[rate], -float(rate)))) for method, own in validation.items()}
    return rates | ({"glider": rates["phatgoose"]} if "phatgoose" in rates else {})


def _write(kept: Mapping[str, Any], results: Path) -> None:
    """Readable, with a line for each method's runs."""
    head = json.dumps({name: value for name, value in kept.items() if name != "runs"}, indent=1)
    lines = ",\n".join(f"{json.dumps(method)}: {json.dumps(own)}" for method, own in kept["runs"].items())
    results.parent.mkdir(parents=True, exist_ok=True)
    results.write_text(f'{head[:-2]},\n "runs": {{\n{lines}\n }}\n}}\n')


def _results(validation: Mapping[str, Mapping[str, float]], runs: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    summary = {
        method: {
            "learning_rate": next(iter(own.values())).get("learning_rate"),
            "mean": round(fmean(run["accuracy"] for run in own.values()), 4),
            "seeds": {seed: round(run["accuracy"], 4) for seed, run in own.items()},
        }
        for method in METHODS
        if (own := runs.get(method))
    }
    setting = {"steps": STEPS, "batch": BATCH, "questions": QUESTIONS, "torch": torch.__version__}
    choice = {"steps": CHOICE_STEPS, "questions": CHOICE_QUESTIONS, "seed": CHOICE_SEED, "gate_rate": GATE_RATE}
    return {
        "command": COMMAND,
        "setting": setting | {"choice": choice},
        "validation": validation,
        "accuracy": summary,
        "runs": runs,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the comparison."""
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__)
    parser.add_argument("methods", nargs="*", help="by default all")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--work", type=Path, default=WORK)
    args = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    results = run(args.seeds, args.results, args.work, args.methods)
    sys.stdout.write(table(results) + "\n")
    if args.results == RESULTS:
        DOCUMENT.write_text(with_table(DOCUMENT.read_text("utf-8"), table(results)), "utf-8")


if __name__ == "__main__":
    main()
