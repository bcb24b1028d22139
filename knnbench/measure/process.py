"""A process that does one job, and how it ended if it did not finish it."""

import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from typing import Any, TextIO

from knnbench.threads import pinned_environment

__all__ = ["WorkerEnded", "run_worker", "worker_channel"]


class WorkerEnded(Exception):
    """A worker ended, or was ended, before its last message.

    Attributes
    ----------
    status : str
        ``"crashed"``, ``"out-of-memory"`` or ``"timed-out"``.
    reason : str
    """

    def __init__(self, status: str, reason: str) -> None:
        super().__init__(f"{status}: {reason}")
        self.status = status
        self.reason = reason


def run_worker(module: str, job: dict[str, Any], threads: int, limit_s: float) -> Iterator[dict[str, Any]]:
    """Start a process, give it a job, and yield its messages until it closes its channel.

    Parameters
    ----------
    module : str
        Run as ``python -m module``; it takes the job from `worker_channel`.
    job : dict
        Sent as JSON.
    threads : int
        What every thread pool of the process is held at, set before it loads any library.
    limit_s : float
        Seconds to wait for each message.

    Yields
    ------
    dict

    Raises
    ------
    WorkerEnded
        If the process dies or gives no message in time. However the iterator ends, the process is ended.
    """
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            encoding="utf-8",
            env={**os.environ, **pinned_environment(threads)},
            start_new_session=True,  # Ctrl-C is for the parent to hear, which then ends the worker
        )
        try:
            yield from _messages(process, job, limit_s)
            try:
                code = process.wait(limit_s)
            except subprocess.TimeoutExpired:
                raise WorkerEnded("timed-out", f"the process did not end in {limit_s:.0f} s") from None
            if code != 0:
                errors.seek(0)
                raise _ending(code, errors.read().decode("utf-8", "replace"))
        finally:
            process.kill()  # SIGKILL: native code that hangs hears nothing else
            process.wait()
            if process.stdout is not None:
                process.stdout.close()


def _messages(process: "subprocess.Popen[str]", job: dict[str, Any], limit_s: float) -> Iterator[dict[str, Any]]:
    assert process.stdin is not None
    try:
        json.dump(job, process.stdin)
        process.stdin.close()
    except BrokenPipeError:  # it died at once; its exit code says how
        pass
    lines: queue.Queue[str] = queue.Queue()
    # A thread, because no portable read from a pipe takes a time limit.
    threading.Thread(target=_forward, args=(process.stdout, lines), daemon=True).start()
    while True:
        try:
            line = lines.get(timeout=limit_s)
        except queue.Empty:
            raise WorkerEnded("timed-out", f"no answer in {limit_s:.0f} s") from None
        if not line.endswith("\n"):  # the end, or a line that a dying process cut short
            return
        yield json.loads(line)


def _forward(source: TextIO, lines: "queue.Queue[str]") -> None:
    for line in source:
        lines.put(line)
    lines.put("")


def _ending(code: int, errors: str) -> WorkerEnded:
    how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    last = errors.strip().rpartition("\n")[2]
    # SIGKILL, where nobody here sent it, is what the kernel does when memory runs out.
    status = "out-of-memory" if code < 0 and signal.Signals(-code).name == "SIGKILL" else "crashed"
    return WorkerEnded(status, f"the process ended with {how}{': ' + last if last else ''}")


def worker_channel() -> tuple[dict[str, Any], TextIO]:
    """Return, inside a worker, its job and the stream for its messages, a line of JSON each.

    What libraries print to standard output goes to standard error from here on.
    """
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)
    return json.load(sys.stdin), channel
