"""CPU time and memory of processes and their descendants, from Linux' /proc."""

from __future__ import annotations

import os
from collections import defaultdict
from contextlib import suppress
from pathlib import Path

_PROC = Path("/proc")
_TICKS = os.sysconf("SC_CLK_TCK")


def descendants(root: int) -> list[int]:
    """`root` and every process that descends from it."""
    children: dict[int, list[int]] = defaultdict(list)
    for folder in _PROC.glob("[0-9]*"):
        with suppress(OSError):
            children[int(_fields(int(folder.name))[1])].append(int(folder.name))
    found = [root]
    for process in found:  # grows while it is walked
        found += children[process]
    return found


def find(root: int, title: str) -> list[int]:
    """The descendants of `root` whose command line begins with `title`."""
    return [process for process in descendants(root) if title_of(process).startswith(title)]


def title_of(process: int) -> str:
    """The command line, empty if the process is gone."""
    try:
        return (_PROC / str(process) / "cmdline").read_text().replace("\0", " ").strip()
    except OSError:
        return ""


def cpu_seconds(process: int) -> float:
    """User and system time that a process has used."""
    fields = _fields(process)
    return (int(fields[11]) + int(fields[12])) / _TICKS


def pss_bytes(process: int) -> int:
    """Proportional set size: resident memory, where what is shared counts by its share. 0 if the process is gone."""
    try:
        lines = (_PROC / str(process) / "smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:"))


def _fields(process: int) -> list[str]:
    """The fields of /proc/PID/stat from the third one (the state) on; the second may contain anything."""
    return (_PROC / str(process) / "stat").read_text().rsplit(")", 1)[1].split()
