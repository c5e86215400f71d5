"""Who is up, while experts go."""

from __future__ import annotations

from router_service.core.health import HealthMonitor
from router_service.metrics import Metrics
from tests.router_service.fakes import FakeExpert


class Leaving(FakeExpert):
    """An expert that takes those in `leave` out of the fleet when it is asked."""

    def __init__(self, name: str, experts: dict[str, FakeExpert], leave: str) -> None:
        super().__init__(name)
        self.experts, self.leave = experts, leave

    async def healthy(self) -> bool:
        self.experts.pop(self.leave, None)
        return True


async def test_an_expert_may_go_while_they_are_asked() -> None:
    experts: dict[str, FakeExpert] = {}
    experts |= {"first": Leaving("first", experts, "second"), "second": FakeExpert("second")}
    monitor = HealthMonitor(experts, Metrics())
    await monitor.look(list(experts))
    assert monitor.seen == {"first"}
    assert monitor.looked


async def test_one_that_is_gone_has_no_metric() -> None:
    metrics = Metrics()
    experts = {name: FakeExpert(name) for name in ("one", "other")}
    monitor = HealthMonitor(experts, metrics)
    for _ in range(2):  # it may come back
        await monitor.look(experts)
        assert b'router_expert_up{expert="one"} 1.0' in metrics.render()
        monitor.forget("one")
        monitor.forget("never-was")
        assert b'router_expert_up{expert="one"}' not in metrics.render()
        assert b'router_expert_up{expert="other"} 1.0' in metrics.render()
