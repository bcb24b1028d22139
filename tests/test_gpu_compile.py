"""All CUDA kernels, compiled to machine code for devices that are not there.

`tests/compile_cuda.py` does it in processes of its own, once; here its findings are judged.
"""

import importlib.metadata
import json
import os
import re
import sys
from collections import Counter
from pathlib import Path

import pytest

from knnbench.dtypes import COMPUTED
from knnbench.kernels.cuda_search import FEW_TILE, TENSOR_TILE, TILES, WAYS
from knnbench.kernels.cuda_source import EXPRESSIONS

from .conftest import REQUIRED
from .shares import ROOT, outputs

SCRIPT = Path(__file__).with_name("compile_cuda.py")

# What the script needs of the extra gpu-check, but for libraries that these bring.
PACKAGES = ("numba-cuda", "cuda-bindings", "nvidia-nvjitlink", "nvidia-cuda-cuobjdump", "nvidia-cuda-nvdisasm")

# The quick tests are of two that differ in their loops. The third has the loops of the second.
ARCHITECTURES = ["80,90", pytest.param("100", marks=pytest.mark.slow)]

# Of a multiprocessor: two blocks are to find room on it, and blocks have as many threads if nothing else is said.
REGISTERS = 65_536
THREADS = 256

# The instructions of a pair and a word in the inner loop of a tile, by the data and the metric that starts the kernel
# first, and whether they are all that there is to it: some architectures take the larger of two values in several.
INNER = {
    "uint8": {
        "euclidean": ({"IDP.4A.U8.U8": 1}, True),
        "cityblock": ({"VABSDIFF4.U8.ACC": 1}, True),
        "chebyshev": ({"VABSDIFF4.U8": 1}, False),
        "cosine": ({"IDP.4A.U8.U8": 1}, True),
    },
    "float32": {
        "euclidean": ({"FADD": 1, "FFMA": 1}, True),
        "cityblock": ({"FADD": 2}, True),
        "chebyshev": ({"FADD": 1, "FMNMX": 1}, True),
        "cosine": ({"FADD": 1, "FFMA": 1}, True),
    },
    "float64": {
        "euclidean": ({"DADD": 1, "DFMA": 1}, True),
        "cityblock": ({"DADD": 2}, True),
        "chebyshev": ({"DADD": 1}, False),
        "cosine": ({"DADD": 1, "DFMA": 1}, True),
    },
}

# A turn of that loop takes two words of all pairs of a thread; what else it may have is eight loads, the addresses of
# these, its counter and its end.
WORDS, LOADS, OTHERS = 2, 8, 24

# 64-bit products, by their names in machine code.
WIDE_PRODUCTS = ("IMAD.WIDE", "IMAD.HI")


def is_absent(package):
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return True
    return False


def run(cache, *parts):
    """Run the script for each of the parts, side by side, with kernels kept in a directory; return what they print."""
    environment = {name: value for name, value in os.environ.items() if name != "NUMBA_ENABLE_CUDASIM"}
    environment |= {"KNNBENCH_CACHE": str(cache), "PYTHONPATH": str(ROOT)}
    printed = outputs([[sys.executable, str(SCRIPT), *part] for part in parts], [environment] * len(parts))
    return {name: records for text in printed for name, records in json.loads(text).items()}


@pytest.fixture(scope="module", params=ARCHITECTURES)
def found(request, tmp_path_factory):
    absent = [package for package in PACKAGES if is_absent(package)]
    if absent:
        (pytest.fail if "gpu-check" in REQUIRED else pytest.skip)(f"not installed: {', '.join(absent)}")
    directory = tmp_path_factory.mktemp("cache")
    records = run(directory, ("numba", request.param), ("sources", request.param))
    return records | {"directory": directory, "architectures": {int(name) for name in request.param.split(",")}}


def faults(records):
    """Return the records of kernels that do not fit their registers, or compute in double precision unasked."""
    return [
        record
        for record in records
        if record["local_bytes"]
        or record["registers"] > record.get("most_registers", REGISTERS // (2 * record.get("threads", THREADS)))
        or (record["doubles"] and not record["may_use_double"])
    ]


def is_tile(record):
    return record["kernel"] in ("search", "distance_tile")


def flaws(record):
    """Return what is not as it should be in the inner loop of a tile kernel."""
    inner, expected = record["inner"], INNER[record["dtype"]]
    instructions, is_all = expected["euclidean" if record["metric"] == "sqeuclidean" else record["metric"]]
    # Sums of 64 bits leave registers for fewer pairs, and take three instructions on bytes.
    is_wide = record["accumulator"] in ("int64", "float64") and record["metric"] != "chebyshev"
    is_wide |= record["accumulator"] == "float64"
    pairs = 16 if is_wide else 64
    rest = sum(inner.values()) - sum(inner.get(name, 0) for name in instructions) - inner.get("LDS.128", 0)
    most = OTHERS + (2 * WORDS * pairs if record["accumulator"] == "int64" else 0)
    return [
        *(name for name, count in instructions.items() if inner.get(name, 0) != WORDS * pairs * count),
        *(name for name in inner if name.startswith(WIDE_PRODUCTS)),
        *(["LDS.128"] if inner.get("LDS.128", 0) > LOADS or "LDS.128" not in inner else []),
        *(["LDG.E.128"] if record["vector_loads"] < 4 else []),
        *(["others"] if is_all and rest > most else []),
    ]


def test_inner_loops_are_arithmetic(found):
    tiles = [record for record in found["numba"] if is_tile(record)]
    assert len(tiles) > 20 * len(found["architectures"])
    assert {(r["metric"], r["dtype"], r["architecture"]): flaws(r) for r in tiles if flaws(r)} == {}


def test_every_numba_kernel_is_there(found):
    tiles = [record for record in found["numba"] if is_tile(record)]
    assert {record["architecture"] for record in found["numba"]} == found["architectures"]
    # Metrics share kernels; a tile is listed under the first that starts it.
    sums = {"uint8": {"int32", "int64"}, "float32": {"float32"}, "float64": {"float64"}}
    for dtype in COMPUTED:
        for architecture in found["architectures"]:
            same = [r for r in tiles if r["dtype"] == dtype and r["architecture"] == architecture]
            assert {record["accumulator"] for record in same} == sums[dtype]
            assert {record["metric"] for record in same} >= {"euclidean", "cityblock", "chebyshev", "cosine"}
    others = {record["kernel"] for record in found["numba"] if not is_tile(record)}
    assert others == {"convert", "find_rows", "finish_all", "losses", "order_lists", "squared_norms", "unit_rows"}


def test_no_numba_kernel_has_a_fault(found):
    assert not faults(found["numba"])


def test_float32_is_computed_in_float32_and_integers_in_integers(found):
    for record in found["numba"]:
        if is_tile(record) or record["kernel"] == "order_lists":
            is_float64 = "float64, 2" in record["signature"]
            is_rounded = record["dtype"] == "uint8" and "Array(float32" in record["signature"]
            assert bool(record["doubles"]) == (is_float64 or is_rounded), record


def test_every_source_is_there(found):
    got = {(r["architecture"], r["kernel"], r["accumulate"], r["dtype"], r["accumulator"]) for r in found["source"]}
    forms = [("uint8", "int32"), ("uint8", "int64"), ("float32", "float32"), ("float64", "float64")]
    assert got == {
        (architecture, kernel, function.__name__, dtype, accumulator)
        for architecture in found["architectures"]
        for kernel in ("accumulate_block", "accumulate_pairs")
        for function in EXPRESSIONS
        for dtype, accumulator in forms
    }


def test_no_source_has_a_fault(found):
    assert not faults({**record, "may_use_double": record["dtype"] == "float64"} for record in found["source"])


def test_planted_faults_are_found(found):
    planted = [{**record, "may_use_double": False} for record in found["planted"]]
    assert len(planted) == 3 * len(found["architectures"])
    assert all(faults([record]) for record in planted if record["fault"] != "singly")
    assert all(flaws(record) for record in planted if record["fault"] != "literal")
    assert all(bool(record["doubles"]) == (record["fault"] == "literal") for record in planted)
    assert all(record["local_bytes"] for record in planted if record["fault"] == "spill")
    too_many = {"local_bytes": 0, "registers": REGISTERS // (2 * THREADS) + 1, "doubles": [], "may_use_double": False}
    assert faults([too_many])


def test_compiled_kernels_are_kept_on_disk(found):
    again = run(found["directory"], ("cache",))["cache"]
    first = found["cache"]
    assert (first["hits"], first["misses"]) == (0, len(first["code"]))
    assert (again["hits"], again["misses"]) == (len(first["code"]), 0)
    assert again["code"] == first["code"]
    assert len(set(first["code"])) > len(first["code"]) // 2


# What the inner loop of the fused search consists of, by the function that accumulates and the dtype: instructions, and
# how many of them a value and word, or a multiplication, takes. Compute capability 8.0 compares bytes in five.
LOOPS = {
    ("squares_from_dot", "uint8"): {"IMMA.16832.U8.U8": 1},
    ("dot_itself", "uint8"): {"IMMA.16832.U8.U8": 1},
    ("halves", "float32"): {"HMMA.16816.F32": 1},
    ("add_absolute", "uint8"): {"VABSDIFF4.U8.ACC": 1},
    ("keep_largest", "uint8"): {"VABSDIFF4.U8": 1, "VIMNMX3.U16x2": 1, "IMAD.SHL.U32": 1},
    ("squares_from_dot", "float32"): {"FFMA.FTZ": 1},
    ("add_absolute", "float32"): {"FADD.FTZ": 2},
    ("add_square", "float32"): {"FADD.FTZ": 1, "FFMA.FTZ": 1},
    ("keep_largest", "float32"): {"FADD.FTZ": 1, "FMNMX.FTZ": 1},
    ("add_absolute", "float64"): {"DADD": 2},
    ("add_square", "float64"): {"DADD": 1, "DFMA": 1},
    ("keep_largest", "float64"): {"DADD": 2, "DSETP": 1, "FSEL": 2},
}
OLDER_LOOPS = {
    ("keep_largest", "uint8"): {"VABSDIFF4.U8": 1, "LOP3.LUT": 1, "PRMT": 1, "HMNMX2": 2},
}
TENSOR = {"IMMA.16832.U8.U8", "HMMA.16816.F32"}
# Of three numbers where the hardware does it in one.
SYNONYMS = {"FMNMX3.FTZ": ("FMNMX.FTZ", 2), "DSETP.GT.AND": ("DSETP", 1), "DSETP.GEU.AND": ("DSETP", 1)}

# What else may be in an inner loop, addresses, the count and the jump: so many instructions, or this share.
LARGEST_REST, LARGEST_SHARE = 28, 0.15
LARGEST_LINEAR_REST = 6
ELSEWHERE = re.compile(r"U?IMAD\.(WIDE|HI)|LDL|STL|LDG\.|STG")


def loop_faults(records):
    """Return what is wrong with the inner loops of the fused search, as it is run for many queries."""
    wrong = []
    for record in records:
        if record["kernel"] != "search" or record["per_thread"] == list(FEW_TILE.per_thread):
            continue
        key = record["function"], record["dtype"]
        loop_of = LOOPS | OLDER_LOOPS if record["architecture"] < 90 else LOOPS
        needed = loop_of[key]
        down, across = record["per_thread"]
        words = {"uint8": 4, "float32": 4, "float64": 2}[record["dtype"]]
        is_tensor = not TENSOR.isdisjoint(needed)
        n = down // 2 * across // 2 if is_tensor else down * across * words
        loads = ("LDSM.16.M88.4", down // 2 + across // 4) if is_tensor else ("LDS.128", down + across)
        loops = [loop for loop in map(spelt, record["loops"]) if all(loop.get(name, 0) >= n for name in needed)]
        if len(loops) != (TENSOR_TILE.slice_bytes // 32 if is_tensor else 1):
            wrong.append((record, "number of loops"))
        if sum(loop.get(loads[0], 0) for loop in loops) != len(loops) * loads[1]:
            wrong.append((record, "loads"))
        for loop in loops:
            rest = sum(loop.values()) - loop.get(loads[0], 0) - n * sum(needed.values())
            most = max(LARGEST_REST, LARGEST_SHARE * sum(loop.values()))
            if any(loop[name] < n * times for name, times in needed.items()) or not 0 <= rest <= most:
                wrong.append((record, f"{rest} other instructions"))
            if any(map(ELSEWHERE.match, loop)):
                wrong.append((record, "wide multiplications or memory"))
    return wrong


def spelt(loop):
    counts = Counter()
    for name, count in loop.items():
        other, times = SYNONYMS.get(name, (name, 1))
        counts[other] += count * times
    return counts


def searches_of(found):
    return [record for record in found["search"] if record["kernel"] == "search"]


def test_every_search_is_there(found):
    got = {(r["architecture"], r["function"], r["dtype"], r["copy_bytes"]) for r in searches_of(found)}
    ways = {
        (function.__name__, dtype)
        for function, is_integer in WAYS
        for dtype in (["uint8"] if is_integer else ["float32", "float64"])
    } - {("squares_from_dot", "float64")}
    assert LOOPS.keys() == ways | {("halves", "float32")}
    assert got == {
        (architecture, *way, copy_bytes)
        for architecture in found["architectures"]
        for way in ways
        for copy_bytes in (16, 8 if way[1] == "float64" else 4)
    } | {(architecture, "halves", "float32", 16) for architecture in found["architectures"]}
    tiles = {tuple(r["per_thread"]) for r in searches_of(found)}
    assert tiles == {tile.per_thread for tile in (*TILES.values(), TENSOR_TILE, FEW_TILE)}
    merges = [record for record in found["search"] if record["kernel"] == "merge"]
    assert len(merges) == len(searches_of(found))


def may_use_double(record):
    """Return whether cosines, which rank in float64, or rows or norms are of double precision."""
    return record["dtype"] == "float64" or record.get("function") == "dot_itself"


def test_no_search_has_a_fault(found):
    assert not faults({**record, "may_use_double": may_use_double(record)} for record in found["search"])
    # Cosines are computed in double precision as they are listed, not in the inner loop.
    assert all(not any(name.startswith("D") for name in loop) for r in searches_of(found)
               if r["dtype"] == "uint8" for loop in r["loops"])  # fmt: skip


def test_inner_loops_are_what_they_should_be(found):
    assert not loop_faults(found["search"])


def test_groups_are_one_instruction_after_the_other(found):
    records = [record for record in found["groups"] if record["kernel"] == "search"]
    kinds = {"uint8": "IGMMA.64x256x32.U8.U8", "float32": "HGMMA.64x256x16.F32"}
    assert {record["dtype"] for record in records} == kinds.keys()
    assert not faults({**record, "may_use_double": False} for record in records)
    for record in records:
        # Four of a slice, and one of a loop over what is left of a row.
        assert record["instructions"][kinds[record["dtype"]]] == 5
        # A product that does nothing stands where the compiler could not end a group with a real one: after the loop.
        assert record["instructions"]["HGMMA.64x8x16.F16"] == 1
        assert record["instructions"]["UBLKCP.S.G"] > 0
        assert not any(name.startswith("LDGSTS") for name in record["instructions"])


def test_no_kernel_of_rows_has_a_fault(found):
    names = {"halve", "merge", "pack_rows", "recompute", "scan_rows", "squared_norms", "unit_rows"}
    assert {record["kernel"] for record in found["rows"]} == names
    assert not faults({**record, "may_use_double": record["dtype"] == "float64"} for record in found["rows"])


def test_tiles_come_by_copies_of_16_bytes(found):
    for record in searches_of(found):
        copies = {name: n for name, n in record["instructions"].items() if name.startswith("LDGSTS")}
        assert any(".128" in name for name in copies) == (record["copy_bytes"] == 16), copies


@pytest.mark.parametrize("fault", ["literal", "spill", "intrinsic", "wide"])
def test_planted_faults_of_searches_are_found(fault, found):
    planted = [record for record in found["faulty"] if (record["fault"], record["kernel"]) == (fault, "search")]
    assert {record["architecture"] for record in planted} == found["architectures"]
    of_kernels = faults({**record, "may_use_double": may_use_double(record)} for record in planted)
    of_loops = [record for record in planted if loop_faults([record])]
    assert {"literal": of_kernels, "spill": of_kernels}.get(fault, of_loops) == [
        {**record, "may_use_double": False} if fault in ("literal", "spill") else record for record in planted
    ]


def linear_faults(records):
    """Return what is wrong with the losses of linear models: their inner loops, and how samples and weights come."""
    wrong = []
    for record in records:
        samples, columns = record["per_thread"]
        is_double, is_bytes = record["dtype"] == "float64", record["dtype"] == "uint8"
        add, features = ("DFMA", 2) if is_double else ("FFMA.FTZ", 4)
        values = samples * features
        loops = [loop for loop in record["loops"] if 2 * loop.get(add, 0) >= values * columns]
        needed = {add: values * columns, "LDS.128": columns}
        if is_bytes:
            needed |= {"PRMT": values, "FADD.FTZ": values}
        if len(loops) != (4 if is_bytes else 1):
            wrong.append((record, "number of loops"))
        for loop in loops:
            rest = sum(loop.values()) - sum(needed.values())
            if any(loop.get(name, 0) != n for name, n in needed.items()) or rest > LARGEST_LINEAR_REST:
                wrong.append((record, f"{rest} other instructions"))
        copies = [name for name in record["instructions"] if name.startswith("LDGSTS")]
        if copies != ["LDGSTS.E.BYPASS.128"]:
            wrong.append((record, f"copies {copies}"))
    return wrong


def test_losses_of_linear_models_are_multiply_adds(found):
    got = Counter((record["architecture"], record["dtype"], *record["per_thread"]) for record in found["linear"])
    shapes = {("uint8", 4, 10), ("uint8", 4, 6), ("float32", 4, 10), ("float64", 4, 10)}
    assert got == Counter((architecture, *shape) for architecture in found["architectures"] for shape in shapes)
    # Exponentials and sums are of double precision.
    assert not faults({**record, "may_use_double": True} for record in found["linear"])
    assert not linear_faults(found["linear"])


@pytest.mark.parametrize("fault", ["constant", "spill", "literal"])
def test_planted_faults_of_losses_are_found(fault, found):
    planted = [record for record in found["faulty_linear"] if record["fault"] == fault]
    assert {record["architecture"] for record in planted} == found["architectures"]
    for record in planted:
        assert faults([{**record, "may_use_double": True}]) if fault == "spill" else linear_faults([record])
