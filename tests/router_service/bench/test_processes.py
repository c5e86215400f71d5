"""CPU and memory as /proc counts them."""

from __future__ import annotations

import os
import subprocess
import sys

from router_service.bench.processes import cpu_seconds, descendants, find, pss_bytes, title_of

BUSY = "import sys, time\nwhile time.process_time() < .3: pass\nprint(flush=True); sys.stdin.read()"


def test_a_child_is_found_and_measured() -> None:
    child = subprocess.Popen([sys.executable, "-c", BUSY], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.readline()
    assert child.pid in descendants(os.getpid())
    assert find(os.getpid(), f"{sys.executable} -c import sys") == [child.pid]
    assert 0.25 <= cpu_seconds(child.pid) < 10
    assert 1 << 20 < pss_bytes(child.pid) < 1 << 30
    child.communicate()
    assert (title_of(child.pid), pss_bytes(child.pid)) == ("", 0)
