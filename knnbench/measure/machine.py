"""What machine this is, as far as it decides how fast a kernel runs."""

import functools
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

from knnbench.threads import available_cpus

__all__ = ["describe_machine", "source_commit"]

# CPU features that choose a kernel.
FEATURES = ("avx2", "fma", "avx512f", "avx512bw", "avx512_vnni", "avx_vnni", "amx_int8", "amx_bf16", "asimd", "sve")


@functools.cache
def describe_machine() -> dict[str, Any]:
    """Return the facts of this machine.

    Returns
    -------
    dict
        ``cpu`` (model), ``features`` (those of `FEATURES` it has), ``cpus`` (in the affinity mask), ``memory_bytes``,
        ``os``, ``arch``, ``python``, ``gpus`` (name, memory and driver of each).
    """
    cpuinfo = _read("/proc/cpuinfo")
    lines = dict(line.split(":", 1) for line in cpuinfo.splitlines() if ":" in line)
    facts = {key.strip(): value.strip() for key, value in lines.items()}
    flags = set((facts.get("flags") or facts.get("Features") or "").split())
    return {
        "cpu": facts.get("model name") or platform.processor() or platform.machine(),
        "features": [name for name in FEATURES if name in flags],
        "cpus": available_cpus(),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else None,
        "os": platform.platform(),
        "arch": platform.machine(),
        "python": platform.python_version(),
        "gpus": _gpus(),
    }


@functools.cache
def source_commit() -> str:
    """Return the commit of knnbench's sources, with ``-dirty`` if they differ from it; empty if not in a checkout."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return ""
    return _output("git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*").strip()


def _gpus() -> list[dict[str, str]]:
    query = _output("nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader")
    names = ("name", "memory", "driver")
    return [dict(zip(names, line.split(", "), strict=False)) for line in query.splitlines() if line]


def _output(*command: str) -> str:
    """Return what a command prints; empty if there is no such command or it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
