"""The engine of local experts on the pocket fleet: beside the usual ways, by shape, and with a thousand adapters.

The usual ways are PEFT's mixed batches (`adapter_names`), PEFT's `generate` one request after another, and the static
batching of the base alone by transformers' `generate`.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import resource
import statistics
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from experts.build import build_group
from experts.errors import ExpertError
from experts.expert import ExpertRequest, Part
from experts.fleet import POCKET_FLEET, ExpertGroup, LocalSource, load_fleet
from experts.local import batch, model, sampling, sites
from experts.local.expert import LocalExpert

PARTS: tuple[str, ...] = ("ways", "shapes", "adapters", "load")
_REQUESTS, _ADAPTERS, _TOKENS = 64, 32, 64
_BASE = "pocket-base"
_QUESTIONS = (
    "What is {a} plus {b}?",
    "Sort these numbers: {a}, {b}, {c}",
    "How many metres are {a} kilometres?",
    "Write {a} as a Roman numeral.",
    "Reverse the word number{b}",
    "Which day comes {c} days after 2024-03-11?",
)
OnProgress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Limits:
    """How much is measured. `minutes` of load; `rounds` of each way; `shapes` are batch sizes and prompt lengths.

    `loaded_meanwhile` adapters are registered and asked for while 32 answers of `running_tokens` tokens grow.
    """

    minutes: float = 30.0
    rounds: int = 3
    batches: Sequence[int] = (1, 4, 16, 64)
    prompts: Sequence[int] = (64, 256, 1024, 2048)
    registered: int = 1000
    one_by_one: int = 8
    loaded_meanwhile: int = 96
    running_tokens: int = 256


def measure_engine(
    parts: Sequence[str], limits: Limits, *, out: Path | None = None, on_progress: OnProgress = lambda *_: None
) -> dict[str, Any]:
    """Each of `PARTS` that is asked for; what `out` has of the others is kept, and the whole written there."""
    from kernels.bench import machine

    torch.set_num_threads(1)
    run = {"ways": _ways, "shapes": _shapes, "adapters": _adapters, "load": _load}
    found = json.loads(out.read_text(encoding="utf-8")) if out and out.exists() else {}
    for part in parts:
        found[part] = {**asyncio.run(run[part](limits, on_progress)), "machine": machine()}
        if out:
            out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return found


class _Served:
    """The pocket base on its engine."""

    def __init__(self, *, max_batch: int = _REQUESTS) -> None:
        group = _group(max_batch)
        self.base = Path(group.head.local.model if group.head.local else "")
        self.paths = [Path(entry.adapter.path) for entry in group.adapters if entry.adapter]
        self._experts = build_group(group)
        self.expert = cast("LocalExpert", self._experts[_BASE])
        self.runtime: Any = self.expert._shared.resource

    def path(self, i: int) -> Path:
        """The files of adapter `i`: the fleet's own, over and over."""
        return self.paths[i % len(self.paths)]

    async def load(self, adapters: int) -> list[float]:
        """Register adapters `a0`, `a1` ...; the CPU seconds that each took."""
        seconds = []
        for i in range(adapters):
            started = time.process_time()
            await self.expert.load_adapter(f"a{i}", str(self.path(i)))
            seconds.append(time.process_time() - started)
        return seconds

    async def ask(self, prompt: str | list[int], adapter: int | str | None, *, tokens: int, **body: Any) -> Part:
        """One answer of exactly `tokens` tokens, of the base, adapter `a0`, `a1` ... by number, or one by name."""
        chat = isinstance(prompt, str)
        name = f"a{adapter}" if isinstance(adapter, int) else adapter
        body = {
            "model": _BASE if name is None else f"{_BASE}+{name}",
            **({"messages": [{"role": "user", "content": prompt}]} if chat else {"prompt": prompt}),
            "max_tokens": tokens,
            "temperature": 0,
            "ignore_eos": True,
            **body,
        }
        request = ExpertRequest(
            id="bench", endpoint="chat/completions" if chat else "completions", body=body, timeout_s=3600
        )
        return [part async for part in self.expert.generate(request)][-1]

    async def close(self) -> None:
        for expert in self._experts.values():
            await expert.close()


def _group(max_batch: int) -> ExpertGroup:
    group = next(group for group in load_fleet(POCKET_FLEET).groups if group.name == _BASE)
    change = {"max_batch": max_batch, "max_queue": 4096, "max_adapters": _ADAPTERS}
    local = cast("LocalSource", group.head.local).model_copy(update=change)
    return group.model_copy(update={"head": group.head.model_copy(update={"local": local})})


def _questions(n: int) -> list[str]:
    rng = random.Random(0)
    numbers = ({"a": rng.randrange(1000), "b": rng.randrange(100), "c": rng.randrange(50)} for _ in range(n))
    return [_QUESTIONS[i % len(_QUESTIONS)].format(**one) for i, one in enumerate(numbers)]


@dataclass(frozen=True, slots=True)
class _Took:
    """Seconds by the clock, and of this process's CPU, which a busy machine changes less."""

    wall: float
    cpu: float


@contextmanager
def _timing(into: list[_Took]) -> Iterator[None]:
    wall, cpu = time.perf_counter(), time.process_time()
    yield
    into.append(_Took(time.perf_counter() - wall, time.process_time() - cpu))


async def _ways(limits: Limits, on_progress: OnProgress) -> dict[str, Any]:
    """64 requests over 32 adapters, in turns: ours, ours on the base alone, and the usual ways."""
    served, questions = _Served(), _questions(_REQUESTS)
    await served.load(_ADAPTERS)
    usual = _Usual(served, questions)

    async def ours(mixed: bool) -> None:
        wanted = (i % _ADAPTERS if mixed else None for i in range(_REQUESTS))
        await asyncio.gather(*(served.ask(q, a, tokens=_TOKENS) for q, a in zip(questions, wanted, strict=True)))

    await ours(True)
    usual.static(2)
    took: dict[str, list[_Took]] = {}
    for i in range(limits.rounds):
        on_progress("ways", i, limits.rounds)
        with _timing(took.setdefault("static_base", [])):
            usual.static(_TOKENS)
        with _timing(took.setdefault("ours", [])):
            await ours(True)
        with _timing(took.setdefault("ours_base_alone", [])):
            await ours(False)
        with _timing(took.setdefault("peft_mixed", [])):
            usual.mixed(_TOKENS)
        with _timing(took.setdefault("peft_one_by_one", [])):
            usual.one_by_one(limits.one_by_one, _TOKENS)
    same = {
        "greedy": await _same(served, questions),
        "seeded": await _same(served, questions, temperature=1.0, top_p=0.9),
    }
    await served.close()
    tokens = dict.fromkeys(took, _REQUESTS * _TOKENS) | {"peft_one_by_one": limits.one_by_one * _TOKENS}
    wall = {way: tokens[way] / statistics.median(one.wall for one in each) for way, each in took.items()}
    cpu = {way: tokens[way] / statistics.median(one.cpu for one in each) for way, each in took.items()}
    return {
        "requests": _REQUESTS,
        "adapters": _ADAPTERS,
        "tokens_each": _TOKENS,
        "rounds": limits.rounds,
        "one_by_one_requests": limits.one_by_one,
        "tokens_per_s": {way: round(speed) for way, speed in wall.items()},
        "tokens_per_cpu_s": {way: round(speed) for way, speed in cpu.items()},
        "ours_over": {way: round(wall["ours"] / speed, 2) for way, speed in wall.items() if way != "ours"},
        "ours_over_by_cpu": {way: round(cpu["ours"] / speed, 2) for way, speed in cpu.items() if way != "ours"},
        "answers_as_alone": same,
    }


async def _same(served: _Served, questions: Sequence[str], **sampling: Any) -> str:
    """How many of the answers in one batch are the same as each alone."""

    def asked(i: int) -> Coroutine[Any, Any, Part]:
        return served.ask(questions[i], i % _ADAPTERS, tokens=_TOKENS, seed=i, **sampling)

    together = await asyncio.gather(*map(asked, range(len(questions))))
    alone = [await asked(i) for i in range(len(questions))]
    text = [[json.loads(part.data)["choices"][0]["message"] for part in parts] for parts in (together, alone)]
    return f"{sum(one == other for one, other in zip(*text, strict=True))} of {len(questions)}"


class _Usual:
    """The same requests by transformers' `generate`, of the base and of PEFT's model of it."""

    def __init__(self, served: _Served, questions: Sequence[str]) -> None:
        from peft import PeftModel
        from transformers import AutoModelForCausalLM, AutoTokenizer

        def base() -> Any:
            return AutoModelForCausalLM.from_pretrained(served.base, dtype=torch.float32).eval()

        self._base = base()
        self._peft = PeftModel.from_pretrained(base(), served.path(0), adapter_name="a0").eval()
        for i in range(1, _ADAPTERS):
            self._peft.load_adapter(served.path(i), f"a{i}")
        self._tokenizer = AutoTokenizer.from_pretrained(served.base, padding_side="left")
        chats = [[{"role": "user", "content": question}] for question in questions]
        self._texts = [
            self._tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in chats
        ]

    def static(self, tokens: int) -> None:
        """One batch of the base alone."""
        self._generate(self._base, self._texts, tokens)

    def mixed(self, tokens: int) -> None:
        """One batch in which each row has its own adapter."""
        names = [f"a{i % _ADAPTERS}" for i in range(len(self._texts))]
        self._generate(self._peft, self._texts, tokens, adapter_names=names)

    def one_by_one(self, requests: int, tokens: int) -> None:
        """So many requests one after another, each with its adapter made the active one."""
        for i in range(requests):
            self._peft.set_adapter(f"a{i % _ADAPTERS}")
            self._generate(self._peft, self._texts[i : i + 1], tokens)

    @torch.inference_mode()
    def _generate(self, model: Any, texts: Sequence[str], tokens: int, **more: Any) -> None:
        options = {"padding": True, "return_tensors": "pt", "return_token_type_ids": False}
        inputs = self._tokenizer(list(texts), add_special_tokens=False, **options)
        model.generate(**inputs, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0, **more)


class _Clock:
    """Seconds spent in functions, from the outside."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def reset(self) -> None:
        self.seconds = {}

    @contextmanager
    def watching(self, **functions: tuple[Any, str]) -> Iterator[None]:
        """Within, note the time in `owner.name` under each key."""
        originals = [(owner, name, getattr(owner, name)) for owner, name in functions.values()]
        for key, (owner, name) in functions.items():
            setattr(owner, name, self._timed(key, getattr(owner, name)))
        try:
            yield
        finally:
            for owner, name, original in originals:
                setattr(owner, name, original)

    def _timed(self, key: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds[key] = self.seconds.get(key, 0.0) + time.perf_counter() - started

        return timed


async def _shapes(limits: Limits, on_progress: OnProgress) -> dict[str, Any]:
    """Speed by batch size and prompt length, each row with its own adapter, and where the time goes.

    `base` is the model's own forward pass, `mixing` the adapters in it, `sampling` the choice of tokens, `python` all
    that the engine does besides.
    """
    served, clock, rows = _Served(), _Clock(), []
    await served.load(_ADAPTERS)
    await served.ask([10] * 64, 0, tokens=4)  # kernels load when they are first used
    rng, tokens = random.Random(0), 32
    shapes = list(itertools.product(limits.prompts, limits.batches))
    with clock.watching(
        forward=(model.LocalModel, "forward"), mixing=(sites, "mixed_lora"), sampling=(sampling.BatchSampler, "choose")
    ):
        for i, (length, size) in enumerate(shapes):
            on_progress("shapes", i, len(shapes))
            prompts = [[rng.randrange(10, 500) for _ in range(length)] for _ in range(size)]
            clock.reset()
            asked = (served.ask(p, j % _ADAPTERS, tokens=tokens) for j, p in enumerate(prompts))
            started = time.perf_counter()
            parts = await asyncio.gather(*asked)
            wall = time.perf_counter() - started
            works = [part.work for part in parts if part.work]
            spent = clock.seconds
            shares = {
                "base": spent["forward"] - spent["mixing"],
                "mixing": spent["mixing"],
                "sampling": spent["sampling"],
                "python": wall - spent["forward"] - spent["sampling"],
            }
            rows.append(
                {
                    "batch": size,
                    "prompt": length,
                    "tokens_per_s": round(size * tokens / wall, 1),
                    "prompt_and_new_tokens_per_s": round(size * (tokens + length) / wall),
                    "first_token_ms": round(1e3 * statistics.median(work.first_token_s for work in works), 1),
                    "tokens_per_s_of_one": round(statistics.median(work.tokens_per_s or 0.0 for work in works), 1),
                    "share": {name: round(seconds / wall, 3) for name, seconds in shares.items()},
                }
            )
    await served.close()
    return {"tokens_each": tokens, "adapters": _ADAPTERS, "rows": rows}


class _Gaps:
    """The times between two steps of a running batch: what came between them, and for how long the answers stood."""

    def __init__(self, pool: Any) -> None:
        self.steps: list[float] = []
        self.gaps: list[tuple[float, int, float]] = []  # seconds; copies to the device in them, and their seconds
        self._pool = pool
        self._ended: tuple[float, int, float] | None = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Within, note steps and gaps."""
        original = batch.Batch.step

        def step(of: batch.Batch) -> None:
            started = time.perf_counter()
            if self._ended is not None:
                ended, loads, load_s = self._ended
                self.gaps.append((started - ended, self._pool.loads - loads, self._pool.load_s - load_s))
            original(of)
            self._ended = (time.perf_counter(), self._pool.loads, self._pool.load_s)
            self.steps.append(self._ended[0] - started)

        batch.Batch.step = step  # type: ignore[method-assign,assignment]
        try:
            yield
        finally:
            batch.Batch.step = original  # type: ignore[method-assign]

    def described(self) -> dict[str, Any]:
        """In milliseconds, beside the steps: gaps with copies and all others, and the copies alone."""
        step = statistics.median(self.steps)
        copying = [gap for gap in self.gaps if gap[1]]
        others = [gap for gap in self.gaps if not gap[1]]
        worst, worst_copying = max(gap[0] for gap in copying), max(gap[2] for gap in copying)
        return {
            "steps": len(self.steps),
            "step_ms_at_batch_32": round(1e3 * step, 2),
            "most_copies_between_steps": max(gap[1] for gap in copying),
            "worst_copying_between_steps_ms": round(1e3 * worst_copying, 2),
            "worst_copying_in_steps": round(worst_copying / step, 2),
            "worst_gap_with_copies_ms": round(1e3 * worst, 2),
            "median_gap_with_copies_ms": round(1e3 * statistics.median(gap[0] for gap in copying), 2),
            "worst_gap_without_copies_ms": round(1e3 * max(gap[0] for gap in others), 2),
        }


async def _adapters(limits: Limits, on_progress: OnProgress) -> dict[str, Any]:
    """What registering the 10th and the last adapter costs, and for how long loading stops a running batch.

    32 answers grow while others, eight at a time, are registered, copied to the device and asked for one token.
    """
    served = _Served()
    on_progress("adapters", 0, 2)
    seconds = await served.load(limits.registered)
    on_progress("adapters", 1, 2)
    pool = served.runtime.model.pool
    loads, load_s = pool.loads, pool.load_s
    gaps = _Gaps(pool)

    async def load_and_ask(i: int) -> None:
        await served.expert.load_adapter(f"new{i}", str(served.path(i)))
        await served.ask("12 + 30", f"new{i}", tokens=1)

    async def newcomers() -> None:
        for first in range(0, limits.loaded_meanwhile, 8):
            await asyncio.gather(*map(load_and_ask, range(first, min(first + 8, limits.loaded_meanwhile))))

    with gaps.watching():
        running = (served.ask(q, i % 8, tokens=limits.running_tokens) for i, q in enumerate(_questions(32)))
        await asyncio.gather(newcomers(), *running)
    copies = pool.loads - loads
    result = {
        "registered": limits.registered,
        "register_cpu_ms": {
            "10th": round(1e3 * statistics.median(seconds[5:15]), 2),
            f"{limits.registered}th": round(1e3 * statistics.median(seconds[-10:]), 2),
        },
        "loaded_meanwhile": limits.loaded_meanwhile,
        "copies_to_the_device": copies,
        "copy_ms": round(1e3 * (pool.load_s - load_s) / copies, 3),
        **gaps.described(),
    }
    await served.close()
    return result


async def _load(limits: Limits, on_progress: OnProgress) -> dict[str, Any]:
    """Closed-loop clients that ask for adapters by Zipf's law, for so many minutes."""
    served = _Served()
    await served.load(limits.registered)
    pool = served.runtime.model.pool
    rng = random.Random(1)
    weights = [1 / (i + 1) for i in range(limits.registered)]
    failed: list[str] = []
    counts = {"answers": 0, "tokens": 0}
    waits: list[float] = []
    started = time.monotonic()
    ends = started + 60 * limits.minutes

    async def client() -> None:
        while time.monotonic() < ends:
            [adapter] = rng.choices(range(limits.registered), weights)
            try:
                question = rng.choice(_QUESTIONS).format(a=rng.randrange(1000), b=rng.randrange(100), c=7)
                part = await served.ask(question, adapter, tokens=rng.randrange(8, 48))
            except ExpertError as error:
                failed.append(str(error))
                continue
            counts["answers"] += 1
            counts["tokens"] += part.usage.output_tokens if part.usage else 0
            if part.work and part.work.queue_s is not None:
                waits.append(part.work.queue_s)

    memory: list[float] = []

    async def watch() -> None:
        while (left := ends - time.monotonic()) > 0:
            memory.append(_resident_mib())
            on_progress("load: minutes", int((time.monotonic() - started) / 60), int(limits.minutes))
            await asyncio.sleep(min(left, 10))

    await asyncio.gather(watch(), *(client() for _ in range(_REQUESTS)))
    wall = time.monotonic() - started
    hits, loads = pool.hits, pool.loads
    result = {
        "registered": limits.registered,
        "resident": pool.slots,
        "popularity": "Zipf, exponent 1",
        "clients": _REQUESTS,
        "minutes": round(wall / 60, 1),
        "answers": counts["answers"],
        "failed": len(failed),
        "tokens_per_s": round(counts["tokens"] / wall),
        "hit_rate": round(hits / (hits + loads), 3),
        "copy_ms": round(1e3 * pool.load_s / loads, 3),
        "queue_ms": {"median": round(1e3 * statistics.median(waits), 1), "p99": round(1e3 * _quantile(waits, 0.99), 1)},
        "memory_mib": [round(memory[int(i * (len(memory) - 1) / 8)]) for i in range(9)],
        "adapters_mib": round(sum(a.bytes for a in served.runtime.registry._adapters.values()) / 2**20),
    }
    await served.close()
    return result


def _quantile(values: Sequence[float], q: float) -> float:
    return sorted(values)[min(len(values) - 1, int(q * len(values)))]


def _resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize() / 2**20
