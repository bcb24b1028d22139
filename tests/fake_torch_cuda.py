"""A CUDA device for PyTorch that is not there: its tensors are the CPU's, and its streams do at once what is asked.

A plugin of pytest (``-p tests.fake_torch_cuda``) for a process of its own, in which $KNNBENCH_HIDDEN names what a build
of torch may lack. It shows that the backend computes right with torch's own operations; that they do the same on a
device, only a device can show.
"""

import contextlib
import os
import time
import types

import torch
from torch.overrides import TorchFunctionMode


class OnTheCpu(TorchFunctionMode):
    """Takes the device out of every call, and page-locked memory, which only CUDA has."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        def moved(value):
            is_cuda = (isinstance(value, str) and value == "cuda") or getattr(value, "type", None) == "cuda"
            return "cpu" if is_cuda else value

        given = {name: moved(value) for name, value in (kwargs or {}).items() if name != "pin_memory"}
        return function(*map(moved, args), **given)


class Event:
    def __init__(self, enable_timing=False):
        pass

    def record(self, stream=None):
        self.time_s = time.perf_counter()

    def synchronize(self):
        assert self.time_s

    def elapsed_time(self, end):
        return 1e3 * (end.time_s - self.time_s)


class Stream:
    cuda_stream = 0

    def wait_stream(self, stream):
        assert isinstance(stream, Stream)

    def record_event(self):
        event = Event()
        event.record()
        return event

    def synchronize(self):
        pass


def interface(tensor):
    """Return what a tensor on a device presents itself by."""
    return {**tensor.numpy().__array_interface__, "version": 2}


def install():
    """Take the place of CUDA in this process."""
    current = Stream()
    vars(torch.cuda).update(
        is_available=lambda: True,
        current_device=lambda: 0,
        Stream=Stream,
        Event=Event,
        current_stream=lambda: current,
        stream=lambda stream: contextlib.nullcontext(),
        empty_cache=lambda: None,
        reset_peak_memory_stats=lambda: None,
        memory_allocated=lambda: 0,
        max_memory_allocated=lambda: 0,
    )
    torch.Tensor.__cuda_array_interface__ = property(interface)
    torch.Tensor.is_pinned = types.MethodType(lambda tensor: False, torch.Tensor)
    if hidden := os.environ.get("KNNBENCH_HIDDEN"):
        delattr(torch, hidden)
    OnTheCpu().__enter__()


def pytest_configure(config):
    install()
