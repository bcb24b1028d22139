"""The CUDA C++ source and the CuPy backend, without a GPU and without CuPy.

The source is compiled as C++ (`tests.cuda_emulator`), and the backend runs on a stand-in for CuPy's arrays
(`tests.fake_cupy`). Whether it compiles for devices, `tests/test_gpu_compile.py` says.
"""

import ast
import importlib.metadata
import subprocess
import sys

import numpy as np
import pytest

from knnbench.dtypes import COMPUTED
from knnbench.kernels import cuda_row_source
from knnbench.kernels.cuda_row_source import ROWS_A_BLOCK, halve_source, norms_source, scan_source, unit_source
from knnbench.kernels.cuda_source import EXPRESSIONS, PAIR_THREADS, THREADS, TILE, direct_source
from knnbench.metrics import METRICS, Space, unit_rows

from . import cuda_emulator
from ._checks import assert_distances_close, assert_identical, direct_error
from .conftest import REQUIRED
from .shares import ROOT, run_cases

# A metric for each expression, on all dtypes.
DIRECT = {metric.integer.accumulate: metric for metric in METRICS.values() if metric.integer.step}


def skip(reason):
    (pytest.fail if "gpu-check" in REQUIRED else pytest.skip)(reason)


@pytest.fixture
def compiled():
    if cuda_emulator.compiler() is None:
        skip("there is no C++ compiler to test the source with")
    return cuda_emulator.compiled


def test_every_direct_form_has_its_expression():
    forms = [form for metric in METRICS.values() for form in (metric.floating, metric.integer)]
    assert EXPRESSIONS.keys() == {form.accumulate for form in forms if form.step} == DIRECT.keys()


@pytest.mark.parametrize("module", ["cuda_source", "cuda_row_source", "cuda_linear_source", "cuda_search"])
def test_the_source_needs_no_library(module):
    code = f"import sys; sys.modules['cupy'] = sys.modules['numba'] = None; import knnbench.kernels.{module}"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def accumulated(space, queries, corpus):
    """Return the values by the metric's own scalar functions, in Python's numbers."""
    form, zeros = space.form, [0] * space.n_features
    return np.array(
        [[form.reduce(map(form.accumulate, zeros, q, c)) for c in corpus.tolist()] for q in queries.tolist()]
    )


def run_block(kernels, queries, corpus, space):
    out = np.empty((len(queries), len(corpus)), space.accumulator)
    grid = -(-len(corpus) // TILE), -(-len(queries) // TILE)
    sizes = map(np.int64, (*out.shape, space.n_features))
    kernels.launch("accumulate_block", grid, (THREADS, THREADS), (queries, corpus, out, *sizes))
    return out


def run_pairs(kernels, queries, corpus, i, j, space):
    out = np.empty(len(i), space.accumulator)
    sizes = map(np.int64, (len(i), space.n_features))
    kernels.launch(
        "accumulate_pairs", (-(-len(i) // PAIR_THREADS),), (PAIR_THREADS,), (queries, corpus, i, j, out, *sizes)
    )
    return out


@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (TILE - 1, TILE + 1, 17), (TILE + 1, 3, 16), (2, 2 * TILE + 5, 15)], ids=str
)
@pytest.mark.parametrize("dtype", COMPUTED)
@pytest.mark.parametrize("accumulate", EXPRESSIONS, ids=lambda function: function.__name__)
def test_kernels_do_what_the_scalar_function_does(accumulate, dtype, shape, rng, compiled):
    n_queries, n_corpus, n_features = shape
    space = Space(DIRECT[accumulate], np.dtype(dtype), n_features)
    queries, corpus = (rng.integers(0, 256, (n, n_features)) for n in (n_queries, n_corpus))
    if dtype != "uint8":
        queries, corpus = queries + rng.normal(size=queries.shape), corpus + rng.normal(size=corpus.shape)
    queries, corpus = queries.astype(dtype), corpus.astype(dtype)
    kernels, expected = compiled(direct_source(space)), accumulated(space, queries, corpus)
    i, j = (rng.integers(0, n, PAIR_THREADS + 1) for n in (n_queries, n_corpus))
    block, pairs = run_block(kernels, queries, corpus, space), run_pairs(kernels, queries, corpus, i, j, space)
    if space.is_integer:
        assert_identical(block, expected.astype(space.accumulator))
        assert_identical(pairs, block[i, j])
    else:
        allowed = direct_error(space, expected, np.finfo(dtype))
        assert_distances_close(block, expected, allowed)
        assert_distances_close(pairs, expected[i, j], allowed[i, j])


@pytest.mark.parametrize("accumulate", EXPRESSIONS, ids=lambda function: function.__name__)
def test_sums_beyond_32_bits(accumulate, compiled):
    space = Space(DIRECT[accumulate], np.dtype(np.uint8), 33_100)
    queries, corpus = np.full((1, 33_100), 255, np.uint8), np.zeros((1, 33_100), np.uint8)
    expected = {"add_square": 33_100 * 255**2, "add_absolute": 33_100 * 255, "keep_largest": 255}
    got = run_block(compiled(direct_source(space)), queries, corpus, space)
    assert_identical(got, np.full((1, 1), expected[accumulate.__name__], np.int64))


def on_rows(compiled, source, name, rows, *arrays, more=()):
    """Run a kernel of `cuda_row_source` as the backend does; arrays are changed in place."""
    arguments = rows, *arrays, *map(np.int64, rows.shape), *more
    compiled(source).launch(name, (-(-len(rows) // ROWS_A_BLOCK),), (cuda_row_source.THREADS,), arguments)


@pytest.mark.parametrize(
    ("element", "dtype"),
    [("uint8", "int32"), ("uint8", "int64"), ("uint8", "float64"), ("float32", "float32"), ("float64", "float64")],
)
@pytest.mark.parametrize("centre", [0, 128])
def test_squared_norms(centre, element, dtype, rng, compiled):
    rows = rng.integers(0, 256, (7, 133)).astype(element)
    norms = np.empty(7, dtype)
    on_rows(compiled, norms_source(rows.dtype, norms.dtype), "squared_norms", rows, norms, more=(np.int32(centre),))
    assert_identical(norms, ((rows.astype(np.int64) - centre) ** 2).sum(axis=1).astype(dtype))


@pytest.mark.parametrize("dtype", COMPUTED)
def test_rows_looked_through(dtype, rng, compiled):
    rows = rng.integers(1, 9, (11, 70)).astype(dtype)

    def found():
        numbers = np.full(2, len(rows), np.uint64)
        on_rows(compiled, scan_source(rows.dtype), "scan_rows", rows, numbers)
        return numbers.tolist()

    assert found() == [11, 11]
    rows[[9, 6]] = 0
    assert found() == [11, 6]
    if dtype != "uint8":
        rows[5, 69], rows[10, 0] = np.nan, np.inf
        assert found() == [5, 6]
        rows[2, 33] = -np.inf
        assert found() == [2, 6]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_rows_of_unit_length(dtype, rng, compiled):
    info = np.finfo(dtype)
    scales = np.array([[1.0], [float(info.max) / 2], [float(info.tiny)], [1e-3], [7.0]])
    rows = (rng.uniform(-1, 1, (5, 45)) * scales).astype(dtype)
    if dtype == "float64":  # CuPy has subnormal float32 taken as zero
        rows[3, :] = 0
        rows[3, [2, 40]] = float(info.smallest_subnormal)
    out = np.empty_like(rows)
    on_rows(compiled, unit_source(rows.dtype), "unit_rows", rows, out)
    np.testing.assert_allclose(out, unit_rows(np, rows), rtol=4 * info.eps, atol=0)


def test_rows_as_halves(rng, compiled):
    rows = (rng.normal(size=(6, 37)) * np.exp(4 * rng.normal(size=(6, 37)))).astype(np.float32)
    centre, scale = rows.mean(axis=0), np.array([0.25], np.float32)
    rows[3] = centre  # nothing is left of it, and nothing lost
    rows[4, 1], rows[5] = 1e6, centre + np.float32(2) ** -14  # beyond the range, and below the normal one
    halves, norms, lost = np.ones((6, 40), np.float16), np.empty(6, np.float32), np.empty(6, np.float32)
    arrays = centre, scale, halves.view(np.uint16), norms, lost
    on_rows(compiled, halve_source(), "halve", rows, *arrays, more=(np.int64(40),))
    scaled = (rows - centre) * scale
    with np.errstate(over="ignore"):
        expected = scaled.astype(np.float16)
    assert_identical(halves[:, :37].view(np.uint16), expected.view(np.uint16))
    assert not halves[:, 37:].any()
    np.testing.assert_allclose(norms, (scaled.astype(np.float64) ** 2).sum(axis=1), rtol=1e-6)
    rest = (scaled - expected.astype(np.float64)) ** 2
    # And what may have underflowed.
    np.testing.assert_allclose(lost, rest.sum(axis=1) + 40 * np.finfo(np.float32).tiny, rtol=1e-6)
    assert np.isinf(lost[4])


@pytest.mark.parametrize("number", [0, 1])
def test_a_missing_barrier_shows(number, rng, compiled):
    space = Space(METRICS["cityblock"], np.dtype(np.uint8), 40)
    first, second, third = direct_source(space).split("__syncthreads();")
    faulty = first + ("", "__syncthreads();")[number] + second + ("__syncthreads();", "")[number] + third
    queries, corpus = (rng.integers(0, 256, (TILE, 40), np.uint8) for _ in range(2))
    expected = accumulated(space, queries, corpus)
    assert (run_block(compiled(direct_source(space)), queries, corpus, space) == expected).all()
    assert not (run_block(compiled(faulty), queries, corpus, space) == expected).all()


def test_a_barrier_that_not_all_threads_reach_shows(compiled):
    source = 'extern "C" __global__ void kernel(int n) { if (threadIdx.x < n) __syncthreads(); }'
    with pytest.raises(AssertionError, match="not all threads reach"):
        compiled(source).launch("kernel", (1,), (4,), (np.int32(2),))
    compiled(source).launch("kernel", (1,), (4,), (np.int32(4),))


@pytest.mark.parametrize(("offset", "where"), [(-1, "before"), (2, "past")])
def test_a_write_outside_an_argument_shows(offset, where, compiled):
    source = 'extern "C" __global__ void kernel(int* out, int offset) { out[offset] = 7; }'
    with pytest.raises(AssertionError, match=f"writes {where}"):
        compiled(source).launch("kernel", (1,), (1,), (np.zeros(2, np.int32), np.int32(offset)))


GROUP_CASES = "few_queries or halves or blocks_do_not_show or small_budget"


@pytest.mark.parametrize(
    ("groups", "chosen"), [("0", ""), pytest.param("1", GROUP_CASES, marks=pytest.mark.slow)], ids=["warps", "groups"]
)
def test_the_cases_on_the_stand_in(groups, chosen, compiled):
    run_cases("tests.fake_cupy", chosen, KNNBENCH_CASES="cupy", KNNBENCH_WGMMA=groups)


COMPARE = """
import inspect, cupy
from tests import fake_cupy
# PLANTED

def parameters(function):
    try:
        return list(inspect.signature(function).parameters)
    except ValueError:  # compiled: the signature opens the docstring, with types
        inside = function.__doc__.splitlines()[0].split("->")[0].partition("(")[2].rpartition(")")[0]
        return [part.partition("=")[0].split()[-1].lstrip("*") for part in inside.split(",") if part.strip(" *")]

wrong = {name for name in fake_cupy.UFUNCS if not isinstance(getattr(cupy, name), cupy.ufunc)}
pairs = [(name, function, getattr(cupy, name)) for name, function in fake_cupy.FUNCTIONS.items()]
pairs += [(name, method, getattr(cupy.ndarray, name)) for name, method in vars(fake_cupy.ndarray).items()
          if inspect.isfunction(method) and not name.startswith("_")]
pairs += [("RawModule", fake_cupy.RawModule, cupy.RawModule)]
pairs += [(name, method, getattr(getattr(cupy.cuda, kind), name)) for kind in ("Event", "MemoryPool")
          for name, method in vars(getattr(fake_cupy, kind)).items() if inspect.isfunction(method)]
pairs += [("get_elapsed_time", fake_cupy.get_elapsed_time, cupy.cuda.get_elapsed_time)]
for name, fake, real in pairs:
    if not set(parameters(fake)) <= set(parameters(real)):
        wrong.add(f"{name}{parameters(fake)} for {parameters(real)}")
wrong |= {name for name in ("__call__", "max_dynamic_shared_size_bytes") if not hasattr(cupy.RawKernel, name)}
wrong |= {name for name in ("attributes", "compute_capability", "id") if not hasattr(cupy.cuda.Device, name)}
members = [name for name in vars(fake_cupy.ndarray) if name not in ("_host", "__dict__", "__weakref__")]
wrong |= {name for name in members if not hasattr(cupy.ndarray, name)}
print(sorted(wrong))
"""


@pytest.mark.parametrize(
    ("planted", "found"),
    [
        ("", []),
        ("fake_cupy.FUNCTIONS['argsort'] = lambda a, order: a", ["argsort['a', 'order'] for ['a', 'axis', 'kind']"]),
        ("fake_cupy.ndarray.partial = 1", ["partial"]),
        ("fake_cupy.UFUNCS['matmul'] = None", ["matmul"]),
    ],
    ids=["as it is", "parameter", "member", "ufunc"],
)
def test_the_stand_in_has_nothing_that_cupy_lacks(planted, found):
    if not any(distribution.name.startswith("cupy") for distribution in importlib.metadata.distributions()):
        skip("CuPy is not installed")
    code = COMPARE.replace("# PLANTED", planted)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert ast.literal_eval(done.stdout.strip().splitlines()[-1]) == found
