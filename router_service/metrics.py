"""Prometheus metrics. Children are bound once per combination of labels, so that counting costs about a microsecond."""

from __future__ import annotations

from contextlib import suppress
from functools import cache
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

if TYPE_CHECKING:
    from experts.expert import Work
    from router_service.core.trace import CallRecord, Trace

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_RATES = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000)
_BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_SHARES = (0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)


class Metrics:
    """One service's metrics in a registry of their own. Labels never hold what a caller may choose freely."""

    content_type = "text/plain; version=0.0.4; charset=utf-8"

    def __init__(self) -> None:
        registry = self._registry = CollectorRegistry()
        requests = Counter(
            "router_requests", "Requests answered.", ("route", "policy", "expert", "status"), registry=registry
        )
        calls = Counter("router_expert_calls", "Calls of experts.", ("expert", "outcome"), registry=registry)
        tokens = Counter("router_tokens", "Tokens of experts' calls.", ("expert", "direction"), registry=registry)
        cost = Counter("router_cost_usd", "What experts' calls cost, in USD.", ("expert",), registry=registry)
        cache_hits = Counter("router_cache", "Look-ups in the answer cache.", ("result",), registry=registry)
        total = Histogram(
            "router_request_seconds", "Whole answers.", ("route", "policy"), registry=registry, buckets=_SECONDS
        )
        first = Histogram(
            "router_first_part_seconds",
            "Until a stream's first part.",
            ("policy",),
            registry=registry,
            buckets=_SECONDS,
        )
        decision = Histogram(
            "router_decision_seconds", "Estimating and choosing.", ("policy",), registry=registry, buckets=_SECONDS
        )
        call_seconds = Histogram(
            "router_expert_call_seconds", "Calls of experts.", ("expert",), registry=registry, buckets=_SECONDS
        )
        expert_up = Gauge("router_expert_up", "Whether the expert is healthy.", ("expert",), registry=registry)
        self.in_flight = Gauge("router_in_flight", "Requests under way.", registry=registry)
        self.redis_up = Gauge("router_redis_up", "Whether Redis can be reached.", registry=registry)
        self.spool_depth = Gauge("router_ledger_spool_entries", "Entries that wait on disk.", registry=registry)
        loads = Counter("router_router_loads", "Routers loaded.", ("router", "outcome"), registry=registry)
        queue = Histogram(
            "router_engine_queue_seconds",
            "Until an engine of our own began with an answer.",
            ("expert",),
            registry=registry,
            buckets=_SECONDS,
        )
        first_token = Histogram(
            "router_engine_first_token_seconds",
            "Until an engine's first token.",
            ("expert",),
            registry=registry,
            buckets=_SECONDS,
        )
        speed = Histogram(
            "router_engine_tokens_per_second",
            "Of one answer, after its first token.",
            ("expert",),
            registry=registry,
            buckets=_RATES,
        )
        batch = Histogram(
            "router_engine_batch_size", "Answers that grew together.", ("expert",), registry=registry, buckets=_BATCHES
        )
        cache_use = Histogram(
            "router_engine_cache_use_ratio",
            "Share of the key-value cache's memory in use, as an answer began.",
            ("expert",),
            registry=registry,
            buckets=_SHARES,
        )
        adapters = Counter(
            "router_engine_adapters",
            "Adapters of answers, by whether they were on the device.",
            ("expert", "result"),
            registry=registry,
        )
        self._engine = [cache(one.labels) for one in (queue, first_token, speed, batch, cache_use)]
        self._adapters = cache(adapters.labels)
        self._requests = cache(requests.labels)
        self._calls = cache(calls.labels)
        self._tokens = cache(tokens.labels)
        self._cost = cache(cost.labels)
        self._cache = cache(cache_hits.labels)
        self._total = cache(total.labels)
        self._first = cache(first.labels)
        self._decision = cache(decision.labels)
        self._call_seconds = cache(call_seconds.labels)
        self._up = expert_up
        self._expert_up = cache(expert_up.labels)
        self._loads = cache(loads.labels)

    def count_answer(self, trace: Trace) -> None:
        """Count one request that called experts or could have."""
        policy = trace.policy or ""
        self._requests(trace.endpoint, policy, trace.expert or "", str(trace.status)).inc()
        self._total(trace.endpoint, policy).observe(trace.latency_s)
        if trace.cache != "off":
            self._cache(trace.cache).inc()
        if trace.decision_s is not None:
            self._decision(policy).observe(trace.decision_s)
        if trace.stream and trace.first_part_s is not None:
            self._first(policy).observe(trace.first_part_s)

    def count_call(self, call: CallRecord) -> None:
        """Count one call of an expert."""
        self._calls(call.expert, call.outcome).inc()
        self._call_seconds(call.expert).observe(call.latency_s)
        self._tokens(call.expert, "input").inc(call.usage.input_tokens)
        self._tokens(call.expert, "output").inc(call.usage.output_tokens)
        self._cost(call.expert).inc(call.cost_usd)

    def count_work(self, expert: str, work: Work) -> None:
        """Count how an engine of our own came by one answer."""
        values = (work.queue_s, work.first_token_s, work.tokens_per_s, work.batch_size, work.cache_use)
        for histogram, value in zip(self._engine, values, strict=True):
            if value is not None:
                histogram(expert).observe(value)
        self._adapters(expert, "hit").inc(work.adapter_hits)
        self._adapters(expert, "load").inc(work.adapter_loads)

    def count_other(self, route: str, status: int) -> None:
        """Count a request that no expert answers: lists, feedback, errors before a route was found."""
        self._requests(route, "", "", str(status)).inc()

    def count_load(self, router: str, *, ok: bool) -> None:
        """Count one attempt to load a router."""
        self._loads(router, "ok" if ok else "error").inc()

    def forget_expert(self, expert: str) -> None:
        """No more say of an expert whether it is healthy: it is there no more."""
        self._expert_up.cache_clear()
        with suppress(KeyError):
            self._up.remove(expert)

    def set_expert_up(self, expert: str, up: bool) -> None:
        """Note whether an expert is healthy."""
        self._expert_up(expert).set(up)

    def render(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self._registry)
