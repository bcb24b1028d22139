"""The process that measures ceilings.

Started by `knnbench.measure.ceilings` with its threads pinned; it is sent the names of probes and sends back a rate,
or the reason why there is none, for each of them in their order.
"""

import importlib
import json
import math
from typing import Any

from knnbench.backends import backend_status
from knnbench.measure.ceilings import PROBES, Probe
from knnbench.measure.contention import CpuMeter
from knnbench.measure.process import worker_channel

__all__ = ["main", "run_probe"]


def main() -> None:
    """Do the job that the parent sent."""
    job, channel = worker_channel()
    for name in job["probes"]:
        print(json.dumps(run_probe(PROBES[name], job["threads"], job["seconds"])), file=channel)


def run_probe(probe: Probe, threads: int, seconds: float) -> dict[str, Any]:
    """Return ``{"rate": ..., "contention": ...}``, or ``{"reason": ...}`` if the probe cannot run here."""
    if probe.device == "cuda":
        status = backend_status("cupy")
        if not status.ok:
            return {"reason": status.reason + (f". To use it: {status.install}" if status.install else "")}
    module, _, function = probe.target.partition(":")
    meter = CpuMeter(threads)
    try:
        call = getattr(importlib.import_module(module), function)
        with meter:
            rate = float(call(threads, seconds))
    except Exception as error:  # whatever a library raises is the reason
        return {"reason": " ".join(f"{type(error).__name__}: {error}".split())}
    # JSON has no infinity, and a rate of 0 would be divided by.
    if not 0 < rate < math.inf:
        return {"reason": f"the probe gave {rate}"}
    return {"rate": rate, "contention": meter.contention}


if __name__ == "__main__":
    main()
