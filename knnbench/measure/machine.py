"""What machine this is, as far as it decides how fast a kernel runs."""

import functools
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

from knnbench.threads import available_cpus

__all__ = ["describe_machine", "last_level_cache", "loaded_libraries", "machine_identity", "source_commit"]

# CPU features that choose a kernel.
FEATURES = ("avx2", "fma", "avx512f", "avx512bw", "avx512_vnni", "avx_vnni", "amx_int8", "amx_bf16", "asimd", "sve")

# Libraries whose version can change what is measured, by the names of their modules.
LIBRARIES = ("numpy", "scipy", "numba", "llvmlite", "numba_cuda", "cupy", "torch", "sklearn", "faiss")

CPU0 = "/sys/devices/system/cpu/cpu0"

# What nvidia-smi is asked, by the names in a record.
GPU_FACTS = {
    "name": "name",
    "memory": "memory.total",
    "driver": "driver_version",
    "clock": "clocks.sm",
    "clock_max": "clocks.max.sm",
    "clock_memory": "clocks.mem",
    "power_limit": "power.limit",
}


@functools.cache
def describe_machine() -> dict[str, Any]:
    """Return the facts of this machine.

    Returns
    -------
    dict
        ``cpu`` (model), ``features`` (those of `FEATURES` it has), ``cpus`` (in the affinity mask), ``clock_mhz``
        (as the kernel shows it now), ``clock_max_mhz`` and ``governor`` (where the kernel shows them),
        ``cache_bytes`` (the last level of the first CPU), ``memory_bytes``, ``os``, ``arch``, ``python``, ``gpus``
        (for each its name, memory, driver, clocks and power limit, in nvidia-smi's units).
    """
    cpuinfo = _read("/proc/cpuinfo")
    lines = dict(line.split(":", 1) for line in cpuinfo.splitlines() if ":" in line)
    facts = {key.strip(): value.strip() for key, value in lines.items()}
    flags = set((facts.get("flags") or facts.get("Features") or "").split())
    return {
        "cpu": facts.get("model name") or platform.processor() or platform.machine(),
        "features": [name for name in FEATURES if name in flags],
        "cpus": available_cpus(),
        "clock_mhz": _number(facts.get("cpu MHz", "")),
        "clock_max_mhz": _number(_read(f"{CPU0}/cpufreq/cpuinfo_max_freq"), 1e-3),
        "governor": _read(f"{CPU0}/cpufreq/scaling_governor").strip(),
        "cache_bytes": last_level_cache(),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else None,
        "os": platform.platform(),
        "arch": platform.machine(),
        "python": platform.python_version(),
        "gpus": _gpus(),
    }


def machine_identity(facts: dict[str, Any]) -> dict[str, Any]:
    """Return the facts of `describe_machine` that tell machines apart; the others vary on one, as clocks do.

    Examples
    --------
    >>> first, later = ({"cpu": "EPYC", "cpus": 2, "clock_mhz": clock, "gpus": []} for clock in (2400.0, 3100.0))
    >>> machine_identity(first) == machine_identity(later)
    True
    """
    names = [gpu.get("name") for gpu in facts.get("gpus") or []]
    return {**{name: facts.get(name) for name in ("cpu", "features", "cpus")}, "gpus": names}


@functools.cache
def source_commit() -> tuple[str, bool]:
    """Return the commit of knnbench's sources, and whether they differ from it; empty if not in a checkout."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return "", False
    name = _output("git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*").strip()
    return name.removesuffix("-dirty"), name.endswith("-dirty")


def last_level_cache() -> int | None:
    """Return the bytes of the last-level cache of the first CPU; None where the kernel does not show it."""
    sizes = [_read(str(path)).strip() for path in Path(CPU0, "cache").glob("index*/size")]
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    return max((int(size[:-1]) * units[size[-1]] for size in sizes if size[-1:] in units), default=None)


def _gpus() -> list[dict[str, str]]:
    query = _output("nvidia-smi", f"--query-gpu={','.join(GPU_FACTS.values())}", "--format=csv,noheader")
    return [dict(zip(GPU_FACTS, line.split(", "), strict=False)) for line in query.splitlines() if line]


def _number(text: str, scale: float = 1.0) -> float | None:
    try:
        return float(text) * scale
    except ValueError:
        return None


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


def loaded_libraries() -> tuple[dict[str, str], list[dict[str, Any]]]:
    """Return the versions of the numerical libraries in this process, and its thread pools: name, version, threads."""
    import threadpoolctl

    modules = {name: sys.modules[name] for name in LIBRARIES if name in sys.modules}
    pools = [
        {"name": pool["internal_api"], "version": pool["version"], "threads": pool["num_threads"]}
        for pool in threadpoolctl.threadpool_info()
    ]
    return {name: str(getattr(module, "__version__", "")) for name, module in modules.items()}, pools
