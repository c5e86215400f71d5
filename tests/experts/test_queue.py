"""Who is next in an engine's queue."""

from __future__ import annotations

import asyncio
from collections import Counter

from experts.local.mixture import Mixture
from experts.local.queue import FairQueue
from experts.local.request import SamplingDefaults, parse_completion
from experts.local.row import Job

GENERATION = parse_completion({"prompt": "x"}, SamplingDefaults())


def job(tenant: str, adapter: str = "a") -> Job:
    loop = asyncio.get_running_loop()
    mixture = Mixture(adapter)
    return Job(prompts=[[1]], generation=GENERATION, mixture=mixture, max_tokens=[9], loop=loop, tenant=tenant)


def served(queue: FairQueue, jobs: int, tokens: int = 100) -> list[tuple[str, str]]:
    """The flows of the next jobs, each of which is served so many tokens."""
    flows = []
    for _ in range(jobs):
        one = queue.pop(lambda _: True)
        assert one is not None
        queue.charge(one.flow, tokens)
        flows.append(one.flow)
    return flows


async def test_one_flow_is_served_in_order() -> None:
    queue, jobs = FairQueue(), [job("t") for _ in range(5)]
    for one in jobs:
        queue.push(one)
    assert [queue.pop(lambda _: True) for _ in range(6)] == [*jobs, None]
    assert not len(queue)


async def test_tenants_share_evenly_however_much_and_under_how_many_adapters_they_ask() -> None:
    queue = FairQueue()
    for i in range(40):
        queue.push(job("many", f"a{i}"))
    for _ in range(10):
        queue.push(job("few"))
    assert Counter(tenant for tenant, _ in served(queue, 20)) == {"many": 10, "few": 10}


async def test_adapters_of_a_tenant_share_evenly() -> None:
    queue = FairQueue()
    for _ in range(30):
        queue.push(job("t", "hot"))
    for _ in range(5):
        queue.push(job("t", "cold"))
    assert Counter(adapter for _, adapter in served(queue, 10)) == {"hot": 5, "cold": 5}


async def test_shares_are_of_tokens_and_not_of_requests() -> None:
    queue = FairQueue()
    for _ in range(20):
        queue.push(job("long"))
        queue.push(job("short"))
    order = []
    for _ in range(22):
        one = queue.pop(lambda _: True)
        assert one is not None
        queue.charge(one.flow, 100 if one.tenant == "long" else 10)
        order.append(one.tenant)
    assert 1 <= order.count("long") <= 3


async def test_who_comes_back_from_a_pause_has_saved_nothing_up() -> None:
    queue = FairQueue()
    queue.push(job("idle"))
    served(queue, 1)
    for _ in range(30):
        queue.push(job("busy"))
    served(queue, 20)
    for _ in range(10):
        queue.push(job("idle"))
    assert Counter(tenant for tenant, _ in served(queue, 10)) == {"busy": 5, "idle": 5}


async def test_what_does_not_fit_is_overtaken_but_not_for_ever() -> None:
    queue = FairQueue()
    queue.push(big := job("t", "big"))
    passed = 0
    for _ in range(100):
        queue.push(job("t", "small"))
        if (one := queue.pop(lambda one: one is not big)) is not None:
            queue.charge(one.flow, 1)
            passed += 1
    assert passed == 32
    assert queue.pop(lambda _: True) is big
    assert queue.pop(lambda _: True) is not None


async def test_whoever_has_most_waiting_makes_room() -> None:
    queue = FairQueue()
    jobs = [job("many", f"a{i % 2}") for i in range(5)]
    for one in jobs:
        queue.push(one)
    assert queue.displaced_by("few") in jobs[3:]
    assert queue.displaced_by("many") is None
    newest = jobs[4]
    queue.remove(newest)
    assert len(queue) == 4
    assert newest not in list(queue)


async def test_a_job_that_nobody_waits_for_is_handed_out_whether_it_fits_or_not() -> None:
    queue = FairQueue()
    queue.push(one := job("t"))
    one.cancelled = True
    assert queue.pop(lambda _: False) is one
    queue.push(one)
    queue.push(other := job("t"))
    queue.drop_cancelled()
    assert list(queue) == [other]
