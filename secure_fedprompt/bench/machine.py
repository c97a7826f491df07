"""What a figure was measured on, what else the machine did, and how figures are summarised."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import resource
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PACKAGES = (
    "numpy", "cryptography", "tenseal", "torch", "open_clip_torch", "opacus", "pyzmq", "msgspec",
)  # fmt: skip


def describe() -> dict[str, Any]:
    """Processor, cores, memory, Python and the versions that matter."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = [x for x in info.read_text().splitlines() if x.startswith("model name")]
        model = lines[0].partition(":")[2].strip() if lines else model
    pages = (
        os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 0
    )
    return {
        "processor": model,
        "cores": os.cpu_count(),
        "memory_gib": round(pages / 2**30, 1),
        "python": platform.python_version(),
        **{name: version for name in PACKAGES if (version := _version(name))},
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def short(content: object) -> str:
    """A name for something that JSON can hold: equal content, equal name."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def code_of(*folders: Path) -> str:
    """A name for the Python files below these folders, behind links to folders as well."""
    made = hashlib.sha256()
    for folder in folders:
        for place, inner, files in os.walk(folder, followlinks=True):
            inner.sort()
            for name in sorted(files):
                if name.endswith(".py"):
                    made.update(Path(place, name).read_bytes())
    return made.hexdigest()[:12]


def spread(values: Sequence[float]) -> dict[str, float]:
    """Minimum, median and maximum."""
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


class Others:
    """Cores that everybody else kept busy while we measured."""

    def __init__(self) -> None:
        self._begin = self._now()

    def share(self) -> float | None:
        """Of one core, on average since this was made; None where the system does not say."""
        (clock, busy, own), (was, busy_then, own_then) = self._now(), self._begin
        if busy is None or busy_then is None or clock <= was:
            return None
        return round(max(0.0, (busy - busy_then) - (own - own_then)) / (clock - was), 2)

    @staticmethod
    def _now() -> tuple[float, float | None, float]:
        stat, own = Path("/proc/stat"), 0.0
        for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN):
            used = resource.getrusage(who)
            own += used.ru_utime + used.ru_stime
        if not stat.exists():
            return 0.0, None, own
        words = stat.read_text().partition("\n")[0].split()[1:]
        user, nice, system, _, _, irq, soft, *_ = map(int, words)
        clock = float(Path("/proc/uptime").read_text().split()[0])
        return clock, (user + nice + system + irq + soft) / os.sysconf("SC_CLK_TCK"), own
