"""A process that works for this one, and how it ended if it did not finish."""

import contextlib
import ctypes
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

__all__ = ["Worker", "WorkerEnded", "run_worker", "worker_channel", "worker_requests"]

# Of Linux, <linux/prctl.h>.
PR_SET_PDEATHSIG = 1


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


class Worker:
    """A process that answers requests, a line of JSON each.

    Parameters
    ----------
    module : str
        Run as ``python -m module``; it takes its first request from `worker_channel`, others from
        `worker_requests`.
    threads : int
        What every thread pool of the process is held at, set before it loads any library.
    """

    def __init__(self, module: str, threads: int) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  closed by `close`
        self._process = subprocess.Popen(
            [sys.executable, "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            encoding="utf-8",
            env={**os.environ, **pinned_environment(threads)},
            start_new_session=True,  # Ctrl-C is for the parent to hear, which then ends the worker
        )
        self._lines: queue.Queue[str] = queue.Queue()
        # A thread, because no portable read from a pipe takes a time limit.
        threading.Thread(target=_forward, args=(self._process.stdout, self._lines), daemon=True).start()

    def send(self, request: dict[str, Any]) -> None:
        """Send a request."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it died; `receive` says how
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()

    def receive(self, limit_s: float) -> dict[str, Any] | None:
        """Return the next answer, or None when the worker has ended and said that all was well.

        Raises
        ------
        WorkerEnded
            If it ends otherwise, or there is no answer in `limit_s` seconds.
        """
        try:
            line = self._lines.get(timeout=limit_s)
        except queue.Empty:
            raise WorkerEnded("timed-out", f"no answer in {limit_s:.0f} s") from None
        if line.endswith("\n"):  # otherwise the end, or a line that a dying process cut short
            answer: dict[str, Any] = json.loads(line)
            return answer
        try:
            code = self._process.wait(limit_s)
        except subprocess.TimeoutExpired:
            raise WorkerEnded("timed-out", f"the process did not end in {limit_s:.0f} s") from None
        if code != 0:
            self._errors.seek(0)
            raise _ending(code, self._errors.read().decode("utf-8", "replace"))
        return None

    def ask(self, request: dict[str, Any], limit_s: float) -> dict[str, Any]:
        """Send a request and return the answer; `WorkerEnded` if there is none."""
        self.send(request)
        answer = self.receive(limit_s)
        if answer is None:  # a library that ends the process and calls that success
            raise WorkerEnded("crashed", "the process ended before its answer")
        return answer

    def close(self) -> None:
        """End the process."""
        self._process.kill()  # SIGKILL: native code that hangs hears nothing else
        self._process.wait()
        for stream in (self._process.stdout, self._errors):
            if stream is not None:
                stream.close()
        with contextlib.suppress(BrokenPipeError):
            if self._process.stdin is not None:
                self._process.stdin.close()


def run_worker(module: str, job: dict[str, Any], threads: int, limit_s: float) -> Iterator[dict[str, Any]]:
    """Start a `Worker`, give it one job, and yield its messages until it ends.

    Parameters
    ----------
    module, threads
        As of `Worker`.
    job : dict
        Sent as JSON.
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
    worker = Worker(module, threads)
    try:
        worker.send(job)
        while (message := worker.receive(limit_s)) is not None:
            yield message
    finally:
        worker.close()


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
    """Return, inside a worker, its first request and the stream for its answers, a line of JSON each.

    What libraries print to standard output goes to standard error from here on.
    """
    _die_with_parent()
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)
    return json.loads(sys.stdin.readline()), channel


def worker_requests() -> Iterator[dict[str, Any]]:
    """Yield, inside a worker, each further request, until the parent closes its end."""
    for line in sys.stdin:
        yield json.loads(line)


def _die_with_parent() -> None:
    """Ask the kernel to end this process with its parent, which could be killed while native code hangs here."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
