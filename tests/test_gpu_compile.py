"""All CUDA kernels, compiled to machine code for devices that are not there.

`tests/compile_cuda.py` does it in a process of its own, once; here its findings are judged.
"""

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from knnbench.dtypes import COMPUTED
from knnbench.kernels.cuda_source import EXPRESSIONS

from .conftest import REQUIRED

SCRIPT = Path(__file__).with_name("compile_cuda.py")

# What the script needs of the extra gpu-check, but for libraries that these bring.
PACKAGES = ("numba-cuda", "cuda-bindings", "nvidia-nvjitlink", "nvidia-cuda-cuobjdump", "nvidia-cuda-nvdisasm")

ARCHITECTURES = {80, 90, 100}

# A multiprocessor has 65,536 registers, so two blocks of 256 threads find room on it.
MOST_REGISTERS = 128


def is_absent(package):
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return True
    return False


def run(cache, *arguments):
    """Run the script with its kernels kept in a directory, and return what it prints."""
    environment = {name: value for name, value in os.environ.items() if name != "NUMBA_ENABLE_CUDASIM"}
    environment["KNNBENCH_CACHE"] = str(cache)
    command = [sys.executable, str(SCRIPT), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def found(cache):
    absent = [package for package in PACKAGES if is_absent(package)]
    if absent:
        (pytest.fail if "gpu-check" in REQUIRED else pytest.skip)(f"not installed: {', '.join(absent)}")
    return run(cache)


def faults(records):
    """Return the records of kernels that do not fit their registers, or compute in double precision unasked."""
    return [
        record
        for record in records
        if record["local_bytes"]
        or record["registers"] > MOST_REGISTERS
        or (record["doubles"] and not record["may_use_double"])
    ]


def test_every_numba_kernel_is_there(found):
    tiles = [record for record in found["numba"] if record["kernel"] == "tile"]
    assert {record["architecture"] for record in found["numba"]} == ARCHITECTURES
    # Metrics share kernels; a tile is listed under the first that starts it.
    sums = {"uint8": {"int32", "int64"}, "float32": {"float32"}, "float64": {"float64"}}
    for dtype in COMPUTED:
        for architecture in ARCHITECTURES:
            same = [r for r in tiles if r["dtype"] == dtype and r["architecture"] == architecture]
            assert {record["accumulator"] for record in same} == sums[dtype]
            assert {record["metric"] for record in same} >= {"euclidean", "cityblock", "chebyshev", "cosine"}
    others = {record["kernel"] for record in found["numba"]} - {"tile"}
    assert len(others) >= 8


def test_no_numba_kernel_has_a_fault(found):
    assert not faults(found["numba"])


def test_float32_is_computed_in_float32_and_integers_in_integers(found):
    for record in found["numba"]:
        if record["kernel"] in ("tile", "update_lists", "sort_lists"):
            is_float64 = "float64, 2" in record["signature"]
            is_rounded = record["dtype"] == "uint8" and "Array(float32" in record["signature"]
            assert bool(record["doubles"]) == (is_float64 or is_rounded), record


def test_every_source_is_there(found):
    got = {(r["architecture"], r["kernel"], r["accumulate"], r["dtype"], r["accumulator"]) for r in found["source"]}
    forms = [("uint8", "int32"), ("uint8", "int64"), ("float32", "float32"), ("float64", "float64")]
    assert got == {
        (architecture, kernel, function.__name__, dtype, accumulator)
        for architecture in ARCHITECTURES
        for kernel in ("accumulate_block", "accumulate_pairs")
        for function in EXPRESSIONS
        for dtype, accumulator in forms
    }


def test_no_source_has_a_fault(found):
    assert not faults({**record, "may_use_double": record["dtype"] == "float64"} for record in found["source"])


def test_planted_faults_are_found(found):
    planted = [{**record, "may_use_double": False} for record in found["planted"]]
    assert len(planted) == 2 * len(ARCHITECTURES)
    assert faults(planted) == planted
    assert all(bool(record["doubles"]) == (record["fault"] == "literal") for record in planted)
    assert all(bool(record["local_bytes"]) == (record["fault"] == "spill") for record in planted)
    too_many = {"local_bytes": 0, "registers": MOST_REGISTERS + 1, "doubles": [], "may_use_double": False}
    assert faults([too_many])


def test_compiled_kernels_are_kept_on_disk(found, cache):
    again = run(cache, "cache")["cache"]
    first = found["cache"]
    assert (first["hits"], first["misses"]) == (0, len(first["code"]))
    assert (again["hits"], again["misses"]) == (len(first["code"]), 0)
    assert again["code"] == first["code"]
    assert len(set(first["code"])) > len(first["code"]) // 2
