"""The probes, in machine code and in numbers; the ceilings, with workers that die; floors.

No time is asserted. That a probe measures what it says is read off its machine code: the loop holds the instruction
as often as there are accumulators, each in a register of its own.
"""

import ctypes
import io
import itertools
import json
import math
import os
import platform
import re
import subprocess
import sys
import threading
import time
import types
from importlib import import_module
from pathlib import Path

import numba
import numpy as np
import pytest
from llvmlite import binding, ir
from rich.console import Console

from knnbench.errors import BackendUnavailableError, InvalidInputError, OverBudgetError, UnsupportedError
from knnbench.kernels import cpu_probes, cuda_probes
from knnbench.kernels.cpu_simd import cpu_features
from knnbench.measure import ceilings, host_probes, probe_worker
from knnbench.measure.ceilings import PROBES, Ceiling, Ceilings, Probe, floor
from knnbench.report.table import ceilings_table

from .conftest import REQUIRED
from .test_gpu_compile import PACKAGES, is_absent
from .test_laziness import loaded_after

ROOT = Path(__file__).parents[1]

CPU_PROBES = [name for name, probe in PROBES.items() if probe.device == "cpu"]
# The features of x86-64 with which an instruction that some CPUs lack is there.
OPTIONAL = {
    "sad-uint8": {"avx2", "avx512bw"},
    "madd-int16": {"avx2", "avx512bw"},
    "dot-uint8": {"avxvnni", "avx512vnni"},
    "matrix-uint8": {"amx-int8"},
}

CUDA_PROBES = [name for name, probe in PROBES.items() if probe.device == "cuda"]


# --- machine code of the CPU's probes


def loops(asm):
    """Return the lines of each innermost loop: from a label to the jump back to it, without a jump between."""
    found, lines = [], [line.strip() for line in asm.splitlines()]
    for end, line in enumerate(lines):
        target = re.fullmatch(r"(?:j\w+|b\.\w+|cbnz\s+\w+,)\s+(\.?L\w+)", line)
        starts = [at for at in range(end) if target and re.match(re.escape(target[1]) + r":", lines[at])]
        if starts:
            body = lines[starts[-1] + 1 : end]
            if not any(re.match(r"\.?L\w+:", other) for other in body):
                found.append([other for other in body if other and not other.startswith((".", "#", "/"))])
    return found


def chain_loop(asm, instruction):
    """Return the registers that an instruction writes in each loop that holds it, and whether one uses the stack."""
    # There are several where the compiler repeats the loop's body: the rest of the iterations has a loop of its own.
    found = [lines for lines in loops(asm) if any(re.match(instruction, line) for line in lines)]
    assert found
    written = set()
    for lines in found:
        results = set()
        for line in lines:
            if re.match(instruction, line):
                operands = [operand.strip() for operand in line.split("#")[0].split(None, 1)[1].split(",")]
                # Arm's assembly has the result first, that of x86-64 last.
                results.add(operands[-1 if "%" in line else 0])
        written = min(written or results, results, key=len)
    return written, any(re.search(r"\b(rsp|rbp|sp)\b", line) for lines in found for line in lines)


def assembled(triple, cpu, dtype, lanes, step, n_given, count):
    """Return the assembly of a loop of chains for a CPU that need not be this one."""
    binding.initialize_all_targets()
    binding.initialize_all_asmprinters()
    module = ir.Module()
    module.triple = triple
    scalar = ir.FloatType() if dtype == "float32" else ir.DoubleType()
    function = ir.Function(module, ir.FunctionType(scalar, [ir.IntType(64)] + [scalar] * (lanes + n_given)), "chains")
    builder = ir.IRBuilder(function.append_basic_block())
    n, *values = function.args
    builder.ret(cpu_probes.build_chains(builder, step, count, n, values[:lanes], values[lanes:]))
    machine = binding.Target.from_triple(triple).create_target_machine(cpu=cpu, opt=3)
    parsed = binding.parse_assembly(str(module))
    options = binding.create_pipeline_tuning_options(speed_level=3)
    binding.create_pass_builder(machine, options).getModulePassManager().run(
        parsed, binding.create_pass_builder(machine, options)
    )
    return machine.emit_assembly(parsed)


X86, ARM = "x86_64-unknown-linux-gnu", "aarch64-unknown-linux-gnu"

# Triple, CPU, bytes of a vector, its registers' names, instructions.
MACHINES = {
    "sse": (X86, "nehalem", 16, "xmm", {"add": r"addp[sd]\b"}),
    "avx": (X86, "sandybridge", 32, "ymm", {"add": r"vaddp[sd]\b"}),
    "haswell": (X86, "haswell", 32, "ymm", {"add": r"vaddp[sd]\b", "fma": r"vfmadd\d+p[sd]\b"}),
    "skylake": (X86, "skylake-avx512", 64, "zmm", {"add": r"vaddp[sd]\b", "fma": r"vfmadd\d+p[sd]\b"}),
    "zen4": (X86, "znver4", 64, "zmm", {"add": r"vaddp[sd]\b", "fma": r"vfmadd\d+p[sd]\b"}),
    "neoverse": (ARM, "neoverse-v1", 16, "v", {"add": r"fadd\b", "fma": r"fml[as]\b|fmad\b"}),
}
CASES = [(name, kind) for name, machine in MACHINES.items() for kind in machine[4]]
STEPS = {"add": (cpu_probes.add_step, 1), "fma": (cpu_probes.fma_step, 2)}


def chains_on(name, kind, dtype, count=None):
    triple, cpu, width, registers, instructions = MACHINES[name]
    count = count or cpu_probes.accumulators("aarch64" if triple == ARM else "x86_64")
    lanes = width // np.dtype(dtype).itemsize
    asm = assembled(triple, cpu, dtype, lanes, *STEPS[kind], count)
    written, uses_stack = chain_loop(asm, instructions[kind])
    assert all(re.fullmatch(rf"%?{registers}\d+(\.\d[sd])?", register) for register in written), written
    return count, written, uses_stack


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_each_accumulator_has_a_register_on_every_kind_of_cpu(name, kind, dtype):
    count, written, uses_stack = chains_on(name, kind, dtype)
    assert (len(written), uses_stack) == (count, False)


def test_too_many_accumulators_are_found():
    count, written, uses_stack = chains_on("haswell", "add", "float32", count=20)
    assert uses_stack or len(written) < count


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    ("kernel", "instruction", "n_given"),
    [(cpu_probes.add_chains, r"v?addp[sd]\b|fadd\b", 1), (cpu_probes.fma_chains, r"vfmadd\d+p[sd]\b|fml[as]\b", 2)],
)
def test_what_runs_here_has_that_loop_too(kernel, instruction, n_given, dtype):
    if kernel is cpu_probes.fma_chains:
        try:
            cpu_probes.require_fma()
        except UnsupportedError as error:
            pytest.skip(str(error))
    fresh = numba.njit(nogil=True)(kernel.py_func)  # what comes from the cache has no assembly
    for width in cpu_probes.vector_bytes():
        fresh(1, cpu_probes.starts(dtype, width), *[dtype(1)] * n_given)
    asms = fresh.inspect_asm()
    assert len(asms) == len(cpu_probes.vector_bytes())
    for asm in asms.values():
        written, uses_stack = chain_loop(asm, instruction)
        assert (len(written), uses_stack) == (cpu_probes.accumulators(), False)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="reads the assembly of x86-64")
@pytest.mark.parametrize("n_arrays", [1, 2])
def test_streams_take_whole_vectors_and_pass_the_caches_by(n_arrays):
    kernel = numba.njit((cpu_probes._read, cpu_probes._copy)[n_arrays - 1].py_func)
    kernel(1, *[host_probes.aligned(cpu_probes.CHUNK_BYTES) for _ in range(n_arrays)])
    (asm,) = kernel.inspect_asm().values()
    # Several where the compiler repeats the loop around this one.
    found = [lines for lines in loops(asm) if any("mm" in line for line in lines)]
    assert found
    width = cpu_probes.vector_bytes()[0]
    name = {16: "xmm", 32: "ymm", 64: "zmm"}[width]
    for loop in found:
        loads = [line for line in loop if re.match(rf"v?\w+\s+-?\d*\([^)]*\),.*%{name}", line)]
        stores = [line for line in loop if re.match(rf"v?movnt\w+\s+%{name}\d+, -?\d*\(", line)]
        assert len(loads) == cpu_probes.CHUNK_BYTES // width
        assert len(stores) == (n_arrays - 1) * len(loads)


# --- what the CPU's kernels compute


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_chains_do_every_operation(dtype):
    count = cpu_probes.accumulators()
    for width in cpu_probes.vector_bytes():
        lanes = cpu_probes.starts(dtype, width)
        assert {type(lane) for lane in lanes} == {dtype}
        assert cpu_probes.chain_operations(len(lanes)) == count * width // np.dtype(dtype).itemsize
        firsts = [float(lane) + c for lane in lanes for c in range(count)]
        added = cpu_probes.add_chains(7, lanes, dtype(2))
        assert added == sum(first + 7 * 2 for first in firsts)
        cpu_probes.require_fma()
        # Three times x -> 2 x + 1.
        assert cpu_probes.fma_chains(3, lanes, dtype(2), dtype(1)) == sum(8 * first + 7 for first in firsts)
        settled = cpu_probes.fma_chains(200, lanes, dtype(0.5), dtype(0.5))
        assert settled == len(firsts)


@pytest.mark.parametrize("chunks", [1, 2, 7])
def test_streams_touch_every_word(rng, chunks):
    n_words = chunks * cpu_probes.CHUNK_BYTES // 8
    source, target = host_probes.aligned(8 * n_words), host_probes.aligned(8 * n_words)
    source[:] = rng.integers(-(2**62), 2**62, n_words)
    assert np.int64(cpu_probes.read_words(1, source)) == source.sum()
    assert cpu_probes.read_words(3, source) == (3 * int(source.sum()) + 2**63) % 2**64 - 2**63
    cpu_probes.copy_words(1, source, target)
    assert (source == target).all()


def test_streams_stay_within_their_arrays():
    n_words = 3 * cpu_probes.CHUNK_BYTES // 8
    source, held = host_probes.aligned(8 * n_words), host_probes.aligned(8 * n_words + 64)
    cpu_probes.copy_words(1, source[: n_words - 1], held)
    assert (held == 1).all()
    source[:] = 5
    cpu_probes.copy_words(1, source, held[:n_words])
    assert (held[:n_words] == 5).all()
    assert (held[n_words:] == 1).all()


def test_streams_refuse_what_they_would_misread():
    good = host_probes.aligned(2 * cpu_probes.CHUNK_BYTES)
    for bad in (good[1:], good[: cpu_probes.CHUNK_BYTES // 8 - 1], good[::2], good.view(np.uint8)):
        with pytest.raises(AssertionError):
            cpu_probes.read_words(1, bad)
    with pytest.raises(AssertionError):
        cpu_probes.copy_words(1, good, good[: len(good) - 1])


def test_kernels_are_kept_on_disk(tmp_path):
    code = """
import json
import numpy as np
from knnbench.kernels import cpu_probes as probes
from knnbench.measure.host_probes import aligned
given = np.float32(0.5)
lanes = probes.starts(np.float32, probes.vector_bytes()[0])
probes.add_chains(1, lanes, given)
probes.fma_chains(1, lanes, given, given)
probes.read_words(1, aligned(4096))
probes.copy_words(1, aligned(4096), aligned(4096))
kernels = probes.add_chains, probes.fma_chains, probes._read, probes._copy
print(json.dumps([sum(kernel.stats.cache_hits.values()) for kernel in kernels]))
"""
    environment = {**os.environ, "KNNBENCH_CACHE": str(tmp_path)}
    command = [sys.executable, "-c", code]
    hits = [json.loads(subprocess.run(command, env=environment, check=True, stdout=-1).stdout) for _ in range(2)]
    assert hits == [[0, 0, 0, 0], [1, 1, 1, 1]]


# --- how the CPU's probes measure


def test_the_best_round_that_is_long_enough_counts():
    rounds = host_probes.Rounds(amount=100.0, seconds=0.25)
    rounds.take(0.001)
    assert (rounds.best, rounds.done) == (0, False)
    calls = rounds.calls
    assert 1 < calls <= 24
    rounds.take(0.1)
    assert rounds.best == pytest.approx(calls * 100 / 0.1)
    rounds.take(0.05)
    assert (rounds.calls, rounds.done) == (calls, False)
    rounds.take(0.2)
    assert rounds.best == pytest.approx(calls * 100 / 0.05)
    assert rounds.done


def test_short_rounds_never_end_it():
    rounds = host_probes.Rounds(1.0, 0.001)
    for _ in range(5):
        rounds.take(0.01)
        assert not rounds.done
    assert rounds.calls >= 2**5


def test_an_undisturbed_round_is_waited_for():
    disturbed, freed = host_probes.Rounds(1.0, 1.0), host_probes.Rounds(1.0, 1.0)
    for _ in range(3):
        disturbed.take(1.0, busy=0.5)
        freed.take(1.0, busy=0.5)
        assert not disturbed.done
    freed.take(0.5, busy=0.95)
    assert freed.done
    disturbed.take(1.0, busy=0.5)
    assert disturbed.done


def test_all_threads_work_at_once():
    together = threading.Barrier(3)
    names = set()

    def prepare():
        names.add(threading.get_ident())
        together.wait(10)  # passes only if all three are here
        return lambda n: time.sleep(0.03)

    assert 0 < host_probes.in_threads(prepare, 1.0, 3, 0.01) < math.inf
    assert len(names) == 3


@pytest.mark.parametrize("place", ["prepare", "call"])
def test_a_thread_that_fails_ends_all(place):
    numbers = itertools.count()

    def prepare():
        number = next(numbers)
        if number == 1 and place == "prepare":
            raise MemoryError("no room")

        def call(n):
            if number == 1 and n > 1:
                raise MemoryError("no room")

        return call

    with pytest.raises(MemoryError, match="no room"):
        host_probes.in_threads(prepare, 1.0, 2, 0.01)


@pytest.fixture
def small(monkeypatch):
    """Arrays that take no time to fill; what they measure is a cache."""
    monkeypatch.setattr(host_probes, "cache_bytes", lambda: 1 << 16)
    monkeypatch.setattr(host_probes, "LEAST_BYTES", 1 << 20)
    monkeypatch.setattr(host_probes, "MOST_ROWS", host_probes.LEAST_ROWS)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", CPU_PROBES)
def test_every_probe_of_the_cpu_gives_a_rate(small, name, threads):
    answer = probe_worker.run_probe(PROBES[name], threads, 0.01)
    if name in OPTIONAL and "rate" not in answer:
        assert "has no instruction of its own" in answer["reason"]
        # What this CPU has must not be missing.
        assert not cpu_features() & OPTIONAL[name]
        return
    assert answer.keys() == {"rate", "contention"}, answer
    # A byte a microsecond, and what no CPU does.
    assert 1e6 < answer["rate"] < 1e16


def test_arrays_are_larger_than_the_caches():
    gib = 1 << 30
    assert host_probes.stream_bytes(32 << 20, None) == host_probes.LEAST_BYTES
    assert host_probes.stream_bytes(100 << 20, None) == 400 << 20
    assert host_probes.stream_bytes(gib, None) == gib
    assert host_probes.stream_bytes(100 << 20, 2 * gib) == 2 * gib // 8
    with pytest.raises(OverBudgetError, match="1,677,721,600 bytes of available"):
        host_probes.stream_bytes(100 << 20, gib)


def test_the_last_caches_are_added_up(tmp_path):
    assert host_probes.cache_bytes(tmp_path) == host_probes.ASSUMED_CACHE
    # Four CPUs with a second-level cache each, and a third-level one for two of them.
    for cpu in range(4):
        pair = "0-1" if cpu < 2 else "2-3"
        for index, level, size, shared in ((0, 1, "32K", cpu), (2, 2, "1024K", cpu), (3, 3, "16384K", pair)):
            folder = tmp_path / f"cpu{cpu}" / "cache" / f"index{index}"
            folder.mkdir(parents=True)
            for name, value in (("level", level), ("size", size), ("shared_cpu_list", shared)):
                (folder / name).write_text(f"{value}\n")
    (tmp_path / "cpu0" / "cache" / "index1").mkdir()
    assert host_probes.cache_bytes(tmp_path) == 32 << 20


def test_products_grow_until_one_fills_its_time():
    seen = []

    def best_rate(n):
        seen.append(n)
        return {512: 1.0, 1024: 3.0, 2048: 2.0}[n], (n / 1024) ** 3

    assert host_probes.growing_products(best_rate, 63.0, 8192) == 3.0
    assert seen == [512, 1024, 2048]
    seen.clear()
    assert host_probes.growing_products(best_rate, 63.0, 1024) == 3.0
    assert seen == [512, 1024]


def test_a_cpu_without_multiply_add_is_refused(monkeypatch):
    monkeypatch.setattr(cpu_probes, "cpu_features", lambda: frozenset({"avx"}))
    monkeypatch.setattr(cpu_probes.platform, "machine", lambda: "x86_64")
    answer = probe_worker.run_probe(PROBES["fma-float32"], 1, 0.01)
    assert answer == {"reason": "UnsupportedError: this CPU has no fused multiply-add"}


# --- the device's probes


COUNTS = """
import collections, json, re, sys, tempfile
from pathlib import Path
from knnbench.kernels.cuda_probes import INSTRUCTIONS, chain_source, instruction_source, read_source
from tests.compile_cuda import ARCHITECTURES, compiled_source, examined, run_tool

sources = {name: chain_source(name) for name in ("float32", "float64")} | {"read": read_source()}
sources["one"] = sources["float32"].replace("sum += x[c]", "sum = x[c]")
assert sources["one"] != sources["float32"]
# In one text: the tools take half a second however little they are given.
text = "".join(
    re.sub(r"(add_chains|fma_chains|read_words)\\(", rf"{name}_\\1(", source) for name, source in sources.items()
)
text += "".join(instruction_source(name).replace(f" {name}(", f" instruction_{name}(") for name in INSTRUCTIONS)
# Sums that nobody stores: the compiler may leave all of them out.
removed = instruction_source("sad_uint8").replace("if (sum == start)", "if (0)")
text += removed.replace(" sad_uint8(", " removed_sad_uint8(")
records = []
for architecture in ARCHITECTURES:
    cubin = compiled_source(text, architecture)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "code.cubin")
        path.write_bytes(cubin)
        code = run_tool("nvdisasm", "-c", "-ndf", path)
    for function, found in examined(cubin).items():
        section = code.partition(f".section\\t.text.{function},")[2].partition(".section\\t")[0]
        # As in FADD.FTZ R5, R5, c[0x0][0x170] and LDG.E.128.CONSTANT R8, [R2.64], by register.
        written = collections.defaultdict(collections.Counter)
        for name, register in re.findall(
            r"/\\*[0-9a-f]{4,}\\*/\\s+(?:@\\S+\\s+)?(LDG.E.128|[A-Z0-9]+)[\\w.]* (R\\d+)", section
        ):
            written[name][register] += 1
        source, _, kernel = function.partition("_")
        # As in VABSDIFF4.U8.ACC R5, R6, R7, R5 and IMMA.16832.S8.S8 R4, R8.ROW, R2.COL, R4.
        names = re.findall(r"/\\*[0-9a-f]{4,}\\*/\\s+(?:@\\S+\\s+)?([A-Z][\\w.]*)", section)
        records.append({
            "architecture": architecture, "source": source, "kernel": kernel, "written": written,
            "instructions": collections.Counter(names), **found,
        })
json.dump(records, sys.stdout)
"""


@pytest.fixture(scope="module")
def compiled():
    absent = [package for package in PACKAGES if is_absent(package)]
    if absent:
        (pytest.fail if "gpu-check" in REQUIRED else pytest.skip)(f"not installed: {', '.join(absent)}")
    environment = {name: value for name, value in os.environ.items() if name != "NUMBA_ENABLE_CUDASIM"}
    done = subprocess.run(
        [sys.executable, "-c", COUNTS], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


INSTRUCTIONS = {
    ("add_chains", "float32"): "FADD",
    ("add_chains", "float64"): "DADD",
    ("fma_chains", "float32"): "FFMA",
    ("fma_chains", "float64"): "DFMA",
}


def chains(record):
    """Return how many registers an instruction writes again and again, and how often it stands there in all."""
    written = record["written"][INSTRUCTIONS[record["kernel"], record["source"]]]
    return sum(count >= cuda_probes.STEPS for count in written.values()), sum(written.values())


def test_every_chain_of_the_device_is_there(compiled):
    records = [record for record in compiled if record["source"] in ("float32", "float64")]
    kernels = {(r["architecture"], r["kernel"], r["source"]) for r in records}
    assert kernels == {(architecture, *key) for architecture in (80, 90, 100) for key in INSTRUCTIONS}
    for record in records:
        n_chains, count = chains(record)
        assert n_chains == cuda_probes.CHAINS, record
        # Twice as many as there are chains set them up and add them up.
        assert 0 <= count - cuda_probes.CHAINS * cuda_probes.STEPS <= 2 * cuda_probes.CHAINS, record
        assert record["local_bytes"] == 0
        # Of 65,536 on a multiprocessor, for the 2048 threads that it holds.
        assert record["registers"] <= 32
        assert bool(record["doubles"]) == (record["source"] == "float64")


def test_chains_that_were_removed_are_found(compiled):
    # The compiler writes out more iterations instead, so that the instructions are as many as before.
    removed = [record for record in compiled if record["source"] == "one"]
    assert len(removed) == 6
    for record in removed:
        assert chains({**record, "source": "float32"})[0] < cuda_probes.CHAINS


def test_the_device_reads_in_words_of_16_bytes(compiled):
    records = [record for record in compiled if record["source"] == "read"]
    assert len(records) == 3
    for record in records:
        assert sum(record["written"]["LDG.E.128"].values()) >= 8
        assert record["local_bytes"] == 0


MACHINE_INSTRUCTIONS = {
    "sad_uint8": ("VABSDIFF4.U8.ACC",),
    "dot_uint8": ("IDP.4A.U8.U8",),
    "matrix_int8": ("IMMA.16832.S8.S8",),
    "matrix_bfloat16": ("HMMA.16816.F32.BF16",),
}


def counted(record):
    """Return how often a probe's instruction stands in its machine code."""
    return sum(record["instructions"].get(name, 0) for name in MACHINE_INSTRUCTIONS[record["kernel"]])


def test_every_instruction_of_the_device_is_there_and_alone(compiled):
    records = [record for record in compiled if record["source"] == "instruction"]
    assert {(r["architecture"], r["kernel"]) for r in records} == {
        (architecture, name) for architecture in (80, 90, 100) for name in cuda_probes.INSTRUCTIONS
    }
    chains_and_steps = cuda_probes.CHAINS * cuda_probes.STEPS
    for record in records:
        assert counted(record) % chains_and_steps == 0, record
        assert counted(record) >= chains_and_steps, record
        assert record["local_bytes"] == 0
        # What sets up and adds up the sums, and counts: no other work in the loop.
        others = sum(record["instructions"].values()) - counted(record)
        assert others <= 100 + 4 * cuda_probes.CHAINS * cuda_probes.INSTRUCTIONS[record["kernel"]].n_sums, record
        # Of 65,536 on a multiprocessor, for all the threads that it holds; for matrices half of them.
        assert record["registers"] <= (64 if record["kernel"].startswith("matrix") else 32)


def test_instructions_that_were_removed_are_found(compiled):
    removed = [record for record in compiled if record["source"] == "removed"]
    assert len(removed) == 3
    for record in removed:
        assert counted(record) < cuda_probes.CHAINS * cuda_probes.STEPS


RATE = 1e12
"""What the pretended device does of everything."""


class PretendedCupy(types.ModuleType):
    """As much of CuPy as the probes use, with a clock that what they start moves by what it does."""

    ndarray = np.ndarray
    zeros, ones = (staticmethod(getattr(np, name)) for name in ("zeros", "ones"))

    class Matrix(np.ndarray):
        """An array whose memory has an address on the device."""

        data = property(lambda self: types.SimpleNamespace(ptr=self.ctypes.data))

    @staticmethod
    def empty(shape, dtype=float):
        return np.empty(shape, dtype).view(PretendedCupy.Matrix)

    @staticmethod
    def full(shape, value, dtype=None):
        return np.full(shape, value, dtype).view(PretendedCupy.Matrix)

    def __init__(self):
        super().__init__("cupy")
        self.clock, self.launched = 0.0, []
        cupy = self

        class Event:
            def record(self):
                self.at = cupy.clock

            def synchronize(self):
                pass

        device = types.SimpleNamespace(
            attributes={"L2CacheSize": 1 << 20, "MultiProcessorCount": 3}, mem_info=(1 << 28, 1 << 30)
        )
        self.cuda = types.SimpleNamespace(
            Event=Event,
            get_elapsed_time=lambda start, stop: 1e3 * (stop.at - start.at),
            get_current_stream=lambda: "stream",
            alloc_pinned_memory=bytearray,
            cublas=types.SimpleNamespace(
                gemmEx=self.gemm_ex,
                CUBLAS_OP_N=0,
                CUBLAS_OP_T=1,
                CUBLAS_COMPUTE_32F=68,
                CUBLAS_COMPUTE_32I=72,
                CUBLAS_GEMM_DEFAULT=-1,
            ),
            device=types.SimpleNamespace(get_cublas_handle=lambda: 5),
            Device=lambda: device,
        )
        pool = types.SimpleNamespace(free_all_blocks=lambda: None)
        self.get_default_memory_pool = lambda: pool

    def works(self, amount):
        self.clock += amount / RATE

    def matmul(self, a, b):
        self.works(a.shape[0] * a.shape[1] * b.shape[1])

    def gemm_ex(self, handle, transa, transb, m, n, k, alpha, A, Atype, lda, B, Btype, ldb, beta, C, Ctype, ldc,
                computeType, algo):  # fmt: skip
        """Take what cuBLAS takes for dtypes that go together."""
        assert (handle, transa, transb, algo) == (5, 1, 0, -1)
        assert lda == ldb == ldc == m == n == k
        assert len({A, B, C, alpha, beta}) == 5
        assert (Atype, Ctype, computeType) in ((3, 10, 72), (14, 0, 68))
        assert Atype == Btype
        one = ctypes.c_int32 if Ctype == 10 else ctypes.c_float
        assert (one.from_address(alpha).value, one.from_address(beta).value) == (1, 0)
        element, value = (ctypes.c_int8, 1) if Atype == 3 else (ctypes.c_uint16, 0x3F80)
        assert {element.from_address(x + (n * n - 1) * ctypes.sizeof(element)).value for x in (A, B)} == {value}
        self.launched.append("gemmEx")
        self.works(m * n * k)

    def RawModule(self, code, options):
        def get_function(name):
            assert f"{name}(" in code

            def launch(grid, block, args):
                self.launched.append(name)
                if name == "read_words":
                    self.works(args[0].nbytes)
                    assert int(args[2]) * cuda_probes.WORD_BYTES == args[0].nbytes
                elif name in cuda_probes.INSTRUCTIONS:
                    out, start, a, b, iterations = args
                    assert out.dtype == start.dtype
                    assert f"{cuda_probes.INSTRUCTIONS[name].sums}* out" in code
                    assert (
                        out.dtype
                        == {"unsigned int": "uint32", "int": "int32", "float": "float32"}[
                            cuda_probes.INSTRUCTIONS[name].sums
                        ]
                    )
                    assert {a.dtype, b.dtype} == {np.dtype(np.uint32)}
                    assert (len(out), iterations.dtype) == (grid[0], np.int32)
                    instructions = grid[0] * block[0] * cuda_probes.CHAINS * cuda_probes.STEPS * int(iterations)
                    self.works(instructions * cuda_probes.INSTRUCTIONS[name].elements)
                else:
                    out, *numbers, iterations = args
                    assert {out.dtype} == {number.dtype for number in numbers}
                    assert ("double*" in code) == (out.dtype == np.float64)
                    assert (len(out), iterations.dtype) == (grid[0], np.int32)
                    self.works(grid[0] * block[0] * cuda_probes.CHAINS * cuda_probes.STEPS * int(iterations))

            return launch

        return types.SimpleNamespace(get_function=get_function)


class PretendedArray:
    """What is copied: an array without elements."""

    def __init__(self, cupy):
        def copy(address, n_bytes, stream):
            assert (type(address), stream) == (int, "stream")
            cupy.works(n_bytes)

        self.data = types.SimpleNamespace(copy_from_host_async=copy, copy_to_host_async=copy)


@pytest.fixture
def pretended(monkeypatch):
    cupy = PretendedCupy()
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.delitem(sys.modules, "knnbench.measure.device_probes", raising=False)
    monkeypatch.delenv("CUPY_TF32", raising=False)
    probes = import_module("knnbench.measure.device_probes")
    monkeypatch.setattr(host_probes, "LEAST_BYTES", 1 << 22)
    monkeypatch.setattr(probes, "COPIED_BYTES", 1 << 22)
    monkeypatch.setattr(probes, "MOST_ROWS", 1024)
    monkeypatch.setattr(probe_worker, "backend_status", lambda name: types.SimpleNamespace(ok=True))
    yield cupy
    # Its functions hold on to the pretence.
    sys.modules.pop("knnbench.measure.device_probes", None)


@pytest.mark.parametrize("name", CUDA_PROBES)
def test_every_probe_of_the_device_counts_what_it_starts(pretended, monkeypatch, name):
    if name.startswith("copy-"):
        for function in ("zeros", "empty"):
            monkeypatch.setattr(pretended, function, lambda *_: PretendedArray(pretended), raising=False)
    answer = probe_worker.run_probe(PROBES[name], 1, 0.1)
    assert answer["rate"] == pytest.approx(RATE, rel=1e-9)
    kind, instruction = re.match("cuda-(read|add|fma)", name), name.removeprefix("cuda-").replace("-", "_")
    expected = {{"read": "read_words"}.get(kind[1], f"{kind[1]}_chains")} if kind else set()
    expected |= {instruction} & cuda_probes.INSTRUCTIONS.keys()
    expected |= {"gemmEx"} if name in ("cuda-gemm-int8", "cuda-gemm-bfloat16") else set()
    assert set(pretended.launched) == expected


def test_tf32_is_refused(pretended, monkeypatch):
    monkeypatch.setenv("CUPY_TF32", "1")
    assert "CUPY_TF32" in probe_worker.run_probe(PROBES["cuda-gemm-float32"], 1, 0.1)["reason"]


def test_without_cupy_the_reason_says_how_to_get_it(monkeypatch):
    status = types.SimpleNamespace(ok=False, reason="no device", install="pip install it")
    monkeypatch.setattr(probe_worker, "backend_status", lambda name: status)
    answer = probe_worker.run_probe(PROBES["cuda-read"], 1, 0.1)
    assert answer == {"reason": "no device. To use it: pip install it"}


# --- the registry and the process


def test_the_registry_loads_no_library():
    assert loaded_after("from knnbench.measure.ceilings import PROBES, Ceilings; Ceilings(1)") == set()


def test_the_registry_is_in_order():
    assert list(PROBES) == [probe.name for probe in PROBES.values()]
    assert {probe.unit for probe in PROBES.values()} == {"operations/s", "bytes/s"}
    assert len({probe.target for probe in PROBES.values()}) == len(PROBES)
    for name in CPU_PROBES:
        module, _, function = PROBES[name].target.partition(":")
        assert function in import_module(module).__all__


@pytest.mark.parametrize(
    ("result", "reason"),
    [(0.0, "the probe gave 0.0"), (math.inf, "the probe gave inf"), (math.nan, "the probe gave nan")],
)
def test_a_rate_that_is_none_is_not_sent(monkeypatch, result, reason):
    monkeypatch.setattr(host_probes, "read", lambda threads, seconds: result)
    assert probe_worker.run_probe(PROBES["read"], 1, 0.1) == {"reason": reason}


def test_what_a_probe_raises_is_the_reason():
    bad = Probe("bad", "bytes/s", "cpu", "", "knnbench.measure.host_probes:absent")
    assert "AttributeError" in probe_worker.run_probe(bad, 1, 0.1)["reason"]


def test_ceilings_are_measured_in_a_process_of_their_own():
    known = Ceilings(1, seconds=0.01)
    names = ["fma-float64", "add-float32", "fma-float64"]
    found = list(known.measure(names))
    assert [ceiling.name for ceiling in found] == names
    assert found[0] == found[2]
    for ceiling in found:
        assert ceiling.unit == "operations/s"
        assert ceiling.reason == ""
        assert 1e6 < ceiling.rate < 1e16
    assert known.rate("add-float32") == found[1].rate
    assert known.reasons == {}


DYING = """
import json, os, signal, sys
from knnbench.measure.process import worker_channel
job, channel = worker_channel()
assert os.environ["KNNBENCH_THREADS"] == "3" and job["threads"] == 3
for name in job["probes"]:
    if name == "copy":
        os.kill(os.getpid(), signal.SIGSEGV)
    if name == "add-float32":
        sys.exit(0)
    if name == "add-float64":
        sys.stderr.write("broken\\n"); sys.stderr.flush(); os._exit(7)
    print(json.dumps({"rate": float(len(job["probes"]))}), file=channel)
"""


@pytest.fixture
def dying(tmp_path, monkeypatch):
    (tmp_path / "dying_probes.py").write_text(DYING)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(ceilings, "WORKER", "dying_probes")


def test_a_worker_that_dies_is_a_reason_and_costs_no_other_probe(dying):
    known = Ceilings(3)
    names = ["read", "copy", "fma-float32", "add-float32", "add-float64", "fma-float64"]
    found = {ceiling.name: ceiling for ceiling in known.measure(names)}
    assert list(found) == names
    # Of the first process, of the second after its death, and of the fourth: how many it was left with.
    assert [found[name].rate for name in names] == [6.0, None, 4.0, None, None, 1.0]
    assert "SIGSEGV" in found["copy"].reason
    assert "before its answer" in found["add-float32"].reason
    assert "exit code 7: broken" in found["add-float64"].reason
    assert known.rate("copy") is None
    assert known.reasons.keys() == {"copy", "add-float32", "add-float64"}
    with pytest.raises(BackendUnavailableError, match=r"'copy' gives no rate here: .*SIGSEGV"):
        known.again("copy")
    assert known.again("read") == 6.0


@pytest.fixture
def answers(monkeypatch):
    """What the worker answers for each probe, in turn; and the jobs that it was given."""
    given, jobs = {}, []

    def run_worker(module, job, threads, limit_s):
        jobs.append(job["probes"])
        for name in job["probes"]:
            answer = given[name].pop(0)
            yield {"reason": answer} if isinstance(answer, str) else {"rate": answer, "contention": 1 / answer}

    monkeypatch.setattr(ceilings, "run_worker", run_worker)
    given["jobs"] = jobs
    return given


def test_again_keeps_the_larger(answers):
    answers["read"] = [2.0, 5.0, 3.0, "out of order"]
    known = Ceilings(1)
    assert known.rate("read") == 2.0
    assert [known.again("read"), known.again("read"), known.again("read")] == [5.0, 5.0, 5.0]
    assert list(known.measure(["read"])) == [Ceiling("read", 5.0, "bytes/s", "", contention=1 / 5.0)]
    assert known.reasons == {}


def test_again_can_find_the_first_rate(answers):
    answers["read"] = ["busy", 4.0]
    known = Ceilings(1)
    assert (known.rate("read"), known.reasons) == (None, {"read": "busy"})
    assert known.again("read") == 4.0
    assert (known.rate("read"), known.reasons) == (4.0, {})


def test_each_probe_is_run_once_and_only_when_asked(answers):
    answers.update(read=[1.0], copy=["no"], gemm=[])
    known = Ceilings(1)
    assert answers["jobs"] == []
    assert known.rate("read") == 1.0
    assert [ceiling.rate for ceiling in known.measure(["read", "copy", "copy"])] == [1.0, None, None]
    assert known.rate("copy") is None
    assert answers["jobs"] == [["read"], ["copy"]]


def test_all_probes_are_measured_by_default(answers):
    answers.update({name: [1.0] for name in PROBES})
    assert [ceiling.name for ceiling in Ceilings(1).measure()] == list(PROBES)
    assert answers["jobs"] == [list(PROBES)]


def test_an_unknown_probe_is_named_with_the_known_ones():
    known = Ceilings(1)
    for call in (
        lambda: known.rate("sad"),
        lambda: known.again("sad"),
        lambda: known.measure(["read", "sad"]),
        lambda: floor({"sad": 1.0}, known),
    ):
        with pytest.raises(InvalidInputError, match=f"probe 'sad' is unknown.*{', '.join(PROBES)}"):
            call()


# --- floors


@pytest.fixture
def machine(answers):
    rates = {"read": 10.0, "fma-float32": 100.0, "add-float32": 50.0, "cuda-read": "no device", "copy-in": "no device"}
    answers.update({name: [rate] for name, rate in rates.items()})
    return Ceilings(1)


def test_the_slowest_kind_of_operation_decides(machine):
    assert floor({"read": 20.0, "fma-float32": 100.0}, machine) == (2.0, "read")
    assert floor({"read": 20.0, "fma-float32": 1000.0, "add-float32": 300.0}, machine) == (10.0, "fma-float32")


def test_what_has_no_ceiling_bounds_nothing(machine):
    assert floor({"cuda-read": 1e9, "add-float32": 25.0}, machine) == (0.5, "add-float32")
    assert floor({"cuda-read": 1e9, "copy-in": 1.0}, machine) == (None, "")
    assert floor({}, machine) == (None, "")
    assert floor({"read": 0}, machine) == (0.0, "read")


@pytest.mark.parametrize("count", [-1.0, math.nan, math.inf])
def test_a_floor_takes_counts(machine, count):
    with pytest.raises(InvalidInputError, match="operations of 'read'"):
        floor({"read": count}, machine)


# --- the table


def test_the_table_shows_rates_and_reasons():
    console = Console(width=160, record=True, file=io.StringIO())
    rows = [
        Ceiling("read", 23.456e9, "bytes/s", "", contention=0.05),
        Ceiling("fma-float32", 1.5e12, "operations/s", "", contention=0.5),
        Ceiling("cuda-read", None, "bytes/s", "absent [cuda13]"),
    ]
    console.print(ceilings_table(rows))
    text = console.export_text()
    for part in ("23.5 GB/s", "1.5 T op/s", "absent [cuda13]", PROBES["read"].description):
        assert part in text
    assert [line.split()[1] for line in text.splitlines() if "contended 50%" in line] == ["fma-float32"]
    assert "contended 5%" not in text
