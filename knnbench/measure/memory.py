"""The peak of this process's resident memory over a stretch of work."""

import sys
from pathlib import Path

__all__ = ["peak_since", "start_peak"]

_STATUS = Path("/proc/self/status")


def start_peak() -> int:
    """Forget the peak so far, where the system allows it, and return the bytes resident now."""
    try:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: resets VmHWM
    except OSError:
        return peak_bytes()
    return _status("VmRSS")


def peak_since(before: int) -> int:
    """Return how far the peak rose above what `start_peak` returned, in bytes."""
    return max(0, peak_bytes() - before)


def peak_bytes() -> int:
    """Return the peak of this process's resident memory in bytes; 0 where the system does not tell."""
    if _STATUS.exists():
        return _status("VmHWM")
    if sys.platform == "win32":
        return 0
    import resource

    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return usage if sys.platform == "darwin" else usage * 1024


def _status(name: str) -> int:
    lines = _STATUS.read_text(encoding="ascii", errors="replace").splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":")), 0)
