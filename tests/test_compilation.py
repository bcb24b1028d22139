"""Machine code that is kept on disk: found by every process, and never taken for another kernel's."""

import json
import os
import subprocess
import sys
from types import FunctionType

import numpy as np
import pytest

from knnbench import knn
from knnbench.kernels.compilation import compile_cached, described

# Kernels that are alike but for a number that a function closes over, as those of two metrics are. That function is
# long enough to be called.
SCRIPT = """
import json
import sys

import numpy as np
from numba.core import types
from numba.extending import intrinsic, register_jitable
from knnbench.kernels.compilation import compile_cached

@intrinsic
def doubled(typing_context, value):
    return types.int64(types.int64), lambda context, builder, signature, args: builder.add(args[0], args[0])

def kernel_of(number):
    @register_jitable
    def part(values, i, j):
        while i < j and values[i] != 99:
            if values[i] > values[j]:
                values[i], values[j] = values[j], values[i]
            values[(i * j) % len(values)] += doubled(number)
            i, j = (i + 1, j) if values[j] % 3 else (i, j - 1)
        while i >= 0 and values[i] % 7:
            values[i] = values[i] * number % 1000
            i -= 1
        return values[(i + j) % len(values)]

    @compile_cached(nogil=True)
    def kernel(values):
        total = 0
        for i in range(len(values)):
            total += part(values, i, len(values) - 1) + part(values, 0, i)
            total += part(values, i // 2, len(values) - 2) * part(values, 1, i)
        return total

    return kernel

kernels = {number: kernel_of(int(number)) for number in sys.argv[1:]}
answers = [int(kernel(np.arange(9))) for kernel in kernels.values()]
print(json.dumps([answers, [sum(kernel.stats.cache_hits.values()) for kernel in kernels.values()]]))
"""


@pytest.fixture
def answers_and_hits(tmp_path):
    """Return a function that runs kernels in a new process: their answers, and which came from the disk."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)

    def run(*numbers):
        environment = {**os.environ, "KNNBENCH_CACHE": str(tmp_path)}
        done = subprocess.run([sys.executable, script, *numbers], env=environment, check=True, stdout=-1, timeout=300)
        return json.loads(done.stdout)

    return run


def test_kernels_of_other_processes_are_found_and_told_apart(answers_and_hits):
    ((one,), *hits), ((two,), *more) = answers_and_hits("1"), answers_and_hits("2")
    assert one != two
    assert hits == more == [[0]]
    assert answers_and_hits("1", "2") == [[one, two], [1, 1]]
    (second, first, third), hits = answers_and_hits("2", "1", "3")
    assert [second, first] == [two, one]
    assert third not in (one, two)
    assert hits == [1, 1, 0]


def test_kernels_of_a_search_are_found_by_another_process():
    code = """
import numpy as np
from knnbench import knn
from knnbench.kernels import cpu_tiles
for dtype in (np.uint8, np.float32):
    rows = np.arange(40, dtype=dtype).reshape(10, 4)
    knn(rows, rows, 2, "cityblock", backend="numba")
kernels = [kernel for found in cpu_tiles._chosen.values() for kernel in (found.knn, found.order)]
print(*(sum(kernel.stats.cache_hits.values()) for kernel in kernels))
print(*(sum(kernel.stats.cache_misses.values()) for kernel in kernels))
"""
    for dtype in (np.uint8, np.float32):
        rows = np.arange(40, dtype=dtype).reshape(10, 4)
        knn(rows, rows, 2, "cityblock", backend="numba")
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=300)
    assert done.stdout.split() == ["1"] * 4 + ["0"] * 4


def with_global(value):
    function = eval("lambda: LIMIT", {"LIMIT": value, "__name__": "kernels"})
    assert isinstance(function, FunctionType)
    return function


def test_what_a_function_closes_over_and_names_is_part_of_its_description():
    def closing_over(value):
        return lambda: value

    assert described(closing_over(1)) == described(closing_over(1)) != described(closing_over(2))
    assert described(closing_over(closing_over(1))) != described(closing_over(closing_over(2)))
    assert described(with_global(1)) == described(with_global(1)) != described(with_global(2))


def test_what_has_no_description_is_no_part_of_a_kernel():
    anything = object()
    with pytest.raises(TypeError, match="closes over <object"):
        compile_cached()(lambda: anything)
