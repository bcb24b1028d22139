"""Memory of a search."""

import ctypes
import threading
from typing import Any

from . import common


class PeakMemory:
    """Most memory of the process; a backend's own share is the difference from its baseline."""

    version = "1"
    timeout = 120
    param_names = ("backend", "workload")
    params = (common.BACKENDS, ["tall"])

    def setup(self, backend: str, workload: str) -> None:
        """Import, prepare, and compile on two queries: all that is not the search."""
        self.answer: Any = None
        self.search = common.prepared_search(backend, "euclidean", "float32", common.WORKLOADS[workload])

    def peakmem_baseline(self, backend: str, workload: str) -> None:
        """Do nothing: the peak is that of `setup`."""

    def peakmem_knn(self, backend: str, workload: str) -> Any:
        """Return the neighbours."""
        self.answer = self.search.knn()
        return self.answer

    def teardown(self, backend: str, workload: str) -> None:
        """Check the answer, once the peak has been read."""
        if getattr(self, "answer", None) is not None:
            common.check_neighbors(*self.answer, self.search.data, "euclidean")


class DeviceMemory:
    """Most memory of the device during a search, beyond what it held before; n/a on a CPU."""

    version = "1"
    timeout = 120
    param_names = ("backend", "workload")
    params = (common.CUDA_BACKENDS, ["tall"])
    unit = "bytes"

    def setup(self, backend: str, workload: str) -> None:
        """Prepare, and compile on two queries: all that is not the search."""
        self.search = common.prepared_search(backend, "euclidean", "float32", common.WORKLOADS[workload])
        self.peak = DevicePeak()

    def track_device_bytes(self, backend: str, workload: str) -> int:
        """Return the rise of the peak."""
        with self.peak:
            answer = self.search.knn()
        common.check_neighbors(*answer, self.search.data, "euclidean")
        return self.peak.bytes


class _Memory(ctypes.Structure):
    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


class DevicePeak:
    """Look at the memory in use on the GPUs, by the driver's own library, until the block ends.

    Attributes
    ----------
    bytes : int
        The most seen, beyond what was in use at first. Other processes' memory counts too.
    """

    bytes = 0

    def __init__(self) -> None:
        try:
            self._nvml = ctypes.CDLL("libnvidia-ml.so.1")
        except OSError as error:
            raise NotImplementedError(f"the driver does not tell how much memory is in use: {error}") from error

    def __enter__(self) -> "DevicePeak":
        self._nvml.nvmlInit_v2()
        self._before = self._used()
        self._over = threading.Event()
        self._watcher = threading.Thread(target=self._watch)
        self._watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._watcher.join()
        self._nvml.nvmlShutdown()

    def _watch(self) -> None:
        done = False
        while not done:
            done = self._over.wait(0.0005)
            self.bytes = max(self.bytes, self._used() - self._before)

    def _used(self) -> int:
        count, total = ctypes.c_uint(), 0
        self._nvml.nvmlDeviceGetCount_v2(ctypes.byref(count))
        for index in range(count.value):
            device, memory = ctypes.c_void_p(), _Memory()
            self._nvml.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(device))
            self._nvml.nvmlDeviceGetMemoryInfo(device, ctypes.byref(memory))
            total += memory.used
        return total
