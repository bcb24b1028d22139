"""Compile every CUDA kernel for devices that are not there, and print what became of it as JSON.

A process of its own, started by `tests/test_gpu_compile.py`; the compilers are loaded only when it runs. Its arguments
say which of the kernels: ``numba`` or ``sources`` in C++, and for which architectures; or ``cache``, numba's as they
come from the disk. The numba kernels and their signatures are those that the backend starts when it is run on all
metrics and dtypes, with the starting taken out. What is compiled is looked at in machine code: registers, what does not
fit into them, and instructions in double precision.
"""

import collections
import contextlib
import hashlib
import json
import re
import subprocess
import sys
import tempfile
import types
from collections import Counter
from pathlib import Path

import numba
import numpy as np
from numba import float32, float64, uint8

from knnbench.backends import numba_cuda
from knnbench.blocking import DEFAULT_BUDGET
from knnbench.dtypes import COMPUTED
from knnbench.kernels import cuda_launch, cuda_rows, cuda_tiles
from knnbench.kernels.cuda_linear_source import CLASSES, MOST_MODELS, loss_kernel
from knnbench.kernels.cuda_row_source import halve_source, norms_source, pack_source, scan_source, unit_source
from knnbench.kernels.cuda_search import recompute_source, search_of
from knnbench.kernels.cuda_source import EXPRESSIONS, direct_source
from knnbench.metrics import METRICS, Space, unchanged

ARCHITECTURES = (80, 90, 100)
COMPILED_FOR = (8, 0)

ENTRY = re.compile(r'extern "C" __global__ void (?:__launch_bounds__\([^()]*\) )?(\w+)\(')

# Rows that fit 32-bit sums of uint8, and rows that need 64 bits.
N_FEATURES = {"uint8": (3, 40_000), "float32": (3,), "float64": (3,)}

INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@\S+\s+)?([A-Z][\w.]*)")
HOT = 16

TILE_KERNELS = ("search", "distance_tile")

DOUBLE = re.compile(r"^D(ADD|MUL|FMA|SETP|MNMX)\b|\.F64|64H\b")


class DeviceArray(np.ndarray):
    """What the backend sees as an array on the device, of numba's own."""

    __module__ = "numba"

    def is_c_contiguous(self):
        return self.flags.c_contiguous

    def copy_to_host(self):
        return np.array(self)

    @property
    def __cuda_array_interface__(self):
        return self.__array_interface__


def device_array(shape, dtype=np.float64):
    return np.zeros(shape, dtype).view(DeviceArray)


def started_kernels():
    """Return ``{(kernel, argument types): (space, threads of a block)}`` of everything that the backend starts."""
    started, space = {}, None

    def record(kernel, grid, block, *args):
        given = (np.asarray(arg) if isinstance(arg, DeviceArray) else arg for arg in args)
        started.setdefault((kernel, tuple(map(numba.typeof, given))), (space, block))

    cuda_launch.launch = cuda_tiles.launch = record
    cuda_launch.cuda.get_current_device = lambda: types.SimpleNamespace(MULTIPROCESSOR_COUNT=1)
    numba_cuda.cuda = types.SimpleNamespace(
        device_array=device_array,
        to_device=lambda array: array.view(DeviceArray),
        as_cuda_array=lambda array: array,
        synchronize=lambda: None,
    )
    backend = numba_cuda.NumbaCudaBackend()
    for dtype in map(np.dtype, COMPUTED):
        for given in ("bool", "float16", "int64"):
            backend.to_native(device_array((4, 3), given), dtype)
        backend.to_native(device_array((4, 3), dtype).T, dtype)
        backend.to_native(device_array((4, 3), dtype)[::2, ::2], dtype)
        backend.scan(device_array((4, 3), dtype), finite=True, zero=True)
        for metric in METRICS.values():
            for n_features in N_FEATURES[dtype.name]:
                space = Space(metric, dtype, n_features)
                rows = device_array((2, n_features), dtype)
                prepared = backend.prepare(rows, space)
                backend.pairwise(rows, prepared, space, DEFAULT_BUDGET)
                ranked, _ = backend.knn(rows, prepared, 1, space, DEFAULT_BUDGET)
                backend.finish(ranked, space)
        space = None
        X, y, weight = device_array((4, 3), dtype), np.zeros(4, np.int64), np.ones(4)
        real = np.result_type(dtype, np.float32)
        backend.linear_loss(X, y, weight, real)(np.zeros((2, 3, 2), real), np.zeros((2, 2), real))
    return started


def linked(ptx, architecture):
    """Return the machine code of PTX texts together."""
    from cuda.bindings import nvjitlink

    linker = nvjitlink.create(2, [f"-arch=sm_{architecture}", "-O3"])
    for number, text in enumerate(ptx):
        data = text.encode()
        nvjitlink.add_data(linker, nvjitlink.InputType.PTX, data, len(data), f"{number}.ptx")
    nvjitlink.complete(linker)
    cubin = bytearray(nvjitlink.get_linked_cubin_size(linker))
    nvjitlink.get_linked_cubin(linker, cubin)
    return bytes(cubin)


def compiled_source(source, architecture):
    """Return the machine code of CUDA C++, with the options that CuPy gives."""
    from cuda.bindings import nvrtc

    _, program = nvrtc.nvrtcCreateProgram(source.encode(), b"kernels.cu", 0, [], [])
    options = [f"--gpu-architecture=sm_{architecture}".encode(), b"--std=c++17", b"-ftz=true"]
    (failed,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
    log = bytes(nvrtc.nvrtcGetProgramLogSize(program)[1])
    nvrtc.nvrtcGetProgramLog(program, log)
    assert not failed, log.decode()
    cubin = bytes(nvrtc.nvrtcGetCUBINSize(program)[1])
    nvrtc.nvrtcGetCUBIN(program, cubin)
    return cubin


def run_tool(name, *args):
    import nvidia

    paths = [path for folder in nvidia.__path__ for path in Path(folder).glob(f"**/bin/{name}")]
    return subprocess.run([paths[0], *args], capture_output=True, text=True, check=True).stdout


def inner_loop(text):
    """Return the instructions, and how often they are there, of the shortest loop that loads vectors of 16 bytes from
    shared memory; empty if none does."""
    starts, loops = {}, []
    for line in re.finditer(r"^(\.L_x_\d+):|BRA\b[^;]*`\((\.L_x_\d+)\)", text, re.MULTILINE):
        if line[1]:
            starts[line[1]] = line.start()
        elif line[2] in starts:
            found = INSTRUCTION.findall(text[starts[line[2]] : line.start()])
            if "LDS.128" in found:
                loops.append(found)
    return collections.Counter(min(loops, key=len, default=[]))


def examined(cubin):
    """Return, by function, its registers, its bytes of local memory, its instructions in double precision, how many
    vectors it loads from global memory, how often its innermost loop with such loads from shared memory has each
    instruction, and its loops.

    A loop is the count of each instruction between a label and a jump: those that have `HOT` times the same.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "code.cubin")
        path.write_bytes(cubin)
        resources, code = run_tool("cuobjdump", "-res-usage", path), run_tool("nvdisasm", "-c", "-ndf", path)
    found = {}
    for name, registers, stack, local in re.findall(
        r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", resources
    ):
        text = code.partition(f".section\t.text.{name},")[2].partition(".section\t")[0]
        instructions = INSTRUCTION.findall(text)
        assert instructions, f"no instructions of {name}"
        found[name] = {
            "registers": int(registers),
            "local_bytes": int(stack) + int(local),
            "doubles": sorted({name for name in instructions if DOUBLE.search(name)}),
            "instructions": dict(Counter(instructions)),
            "loops": hot_blocks(text),
            "vector_loads": instructions.count("LDG.E.128"),
            "inner": inner_loop(text),
        }
    return found


def hot_blocks(text):
    """Return the counts of instructions between labels and jumps, where one of them comes `HOT` times."""
    blocks = re.split(r"^\.L\w+:|\bBRA\b.*", text, flags=re.MULTILINE)
    counts = (Counter(INSTRUCTION.findall(block)) for block in blocks)
    return [dict(count) for count in counts if count and max(count.values()) >= HOT]


def may_use_double(kernel, signature):
    """Return whether the values of a kernel are of double precision by the rules for dtypes."""
    if kernel is cuda_rows.unit_rows:
        return True
    arrays = [argument.dtype for argument in signature if isinstance(argument, numba.types.Array)]
    is_rounded = arrays[-1] == float32 and float32 not in arrays[:-1]  # what integers are finished as
    if kernel.py_func.__name__ in TILE_KERNELS:
        del arrays[2:4]  # the norms, which are float64 and read only if the ranking is
    return is_rounded or float64 in (*arrays, *signature)


def compile_numba(kernels, architectures):
    """Return what became of numba kernels, ``[(kernel, signature, description)]``, on each architecture."""
    libraries = [kernel.compile(signature).library for kernel, signature, _ in kernels]
    records = []
    for architecture in architectures:
        ptx = [library.get_asm_str(cc=divmod(architecture, 10)) for library in libraries]
        names = [re.search(r"\.visible \.entry (\S+?)\(", text)[1] for text in ptx]
        found = examined(linked(ptx, architecture))
        records += [
            {"architecture": architecture, **found[name], **description}
            for name, (_, _, description) in zip(names, kernels, strict=True)
        ]
    return records


def compiled_before(kernels):
    """Return how many numba kernels came from the disk, how many did not, and a hash of the code of each."""
    # Names carry a number that is counted up in each process.
    texts = [
        re.sub(r"B\d*v\d+", "", kernel.compile(signature).library.get_asm_str()) for kernel, signature, _ in kernels
    ]
    dispatchers = {kernel for kernel, _, _ in kernels}
    return {
        "hits": sum(sum(kernel._cache_hits.values()) for kernel in dispatchers),
        "misses": sum(sum(kernel._cache_misses.values()) for kernel in dispatchers),
        "code": [hashlib.sha256(text.encode()).hexdigest() for text in texts],
    }


def described(kernel, signature, space, threads=256):
    return {
        "kernel": kernel.py_func.__name__,
        "threads": threads,
        "signature": str(signature),
        "metric": space.metric.name if space else None,
        "dtype": space.dtype.name if space else None,
        "accumulator": space.accumulator.name if space else None,
        "may_use_double": may_use_double(kernel, signature),
    }


def half_of_square(acc, a, b):
    return acc + 0.5 * (a - b) * (a - b)


def planted():
    """Return kernels with faults that must be found: a literal of double precision, bytes taken one by one, and too
    many registers."""
    floats, words = float32[:, ::1], uint8[:, ::1]
    norms, tiles = (float64[::1], float64[::1]), numba.int64
    cityblock = {dtype: Space(METRICS["cityblock"], np.dtype(dtype), 3) for dtype in ("float32", "uint8")}
    parameters = {dtype: cuda_tiles.parameters_of(space) for dtype, space in cityblock.items()}
    kernel = cuda_tiles.search_kernel(parameters["float32"]._replace(accumulate=half_of_square))
    found = [(kernel, (floats, floats, *norms, tiles, floats, numba.int64[:, ::1]), "float32", "literal")]
    # What follows is not among what tells kernels apart, in this process or on the disk.
    cuda_launch.cached_on_disk = lambda: contextlib.nullcontext(False)
    for made in (cuda_tiles.search_kernel, cuda_tiles.distance_kernel, cuda_tiles.arithmetic_of):
        made.cache_clear()
    cuda_tiles.BYTES.clear()
    kernel = cuda_tiles.search_kernel(parameters["uint8"])
    found.append((kernel, (words, words, *norms, tiles, numba.int32[:, ::1], numba.int64[:, ::1]), "uint8", "singly"))
    cuda_tiles.PIECES = 4
    kernel = cuda_tiles.distance_kernel(parameters["float32"], unchanged, float32, float32)
    found.append((kernel, (floats, floats, *norms, floats), "float32", "spill"))
    return [
        (kernel, signature, {**described(kernel, signature, cityblock[dtype]), "fault": fault})
        for kernel, signature, dtype, fault in found
    ]


def together(sources):
    """Return sources as one text, each in a namespace of its own: the tools take half a second for however little."""
    texts = []
    for number, source in enumerate(sources):
        for kernel in ENTRY.findall(source):
            source = re.sub(rf"\b{kernel}\(", f"n{number}_{kernel}(", source)
        texts.append(f"namespace n{number} {{ {source} }}\n")
    return "".join(texts)


def compile_sources(described, architectures):
    """Return what became of C++ sources, ``[(source, description)]``, on each architecture."""
    text = together(source for source, _ in described)
    records = []
    for architecture in architectures:
        for function, found in examined(compiled_source(text, architecture)).items():
            number, _, kernel = function[1:].partition("_")
            records.append({"architecture": architecture, "kernel": kernel, **described[int(number)][1], **found})
    return records


def spaces():
    for dtype in map(np.dtype, COMPUTED):
        for metric in METRICS.values():
            for n_features in N_FEATURES[dtype.name]:
                yield Space(metric, dtype, n_features)


def direct_sources():
    """Return the sources of the direct form with what they compute."""
    different = {
        (space.form.accumulate.__name__, space.dtype.name, space.accumulator.name): space
        for space in spaces()
        if space.form.accumulate in EXPRESSIONS
    }
    names = "accumulate", "dtype", "accumulator"
    return [(direct_source(space), dict(zip(names, key, strict=True))) for key, space in different.items()]


def searches():
    """Return the sources of the fused search, with all tiles and widths of copies that the backend takes."""
    different = {}
    for space in spaces():
        for direct in (False, True) if not space.is_integer else (False,):
            for n_queries in (1, 100):
                for copy_bytes in (16, max(4, space.dtype.itemsize)):
                    search = search_of(space, n_queries=n_queries, direct=direct, copy_bytes=copy_bytes)
                    if search:
                        form = space.form
                        function = form.accumulate if direct or not form.from_dot else form.from_dot
                        different.setdefault(search.source, about(search, function.__name__, space, copy_bytes))
        halves = search_of(space, halves=True)
        if halves:
            different.setdefault(halves.source, about(halves, "halves", space, 16))
    return list(different.items())


def group_searches():
    """Return the sources of the fused search for tensor cores that are given the work of four warps."""
    found = [(search_of(space, in_groups=True, halves=not space.is_integer), space) for space in spaces()]
    found = [(search, space) for search, space in found if search and search.tile.in_groups]
    different = {search.source: about(search, "squares_from_dot", space, 16) for search, space in found}
    return list(different.items())


def about(search, function, space, copy_bytes):
    """Return what tells a search from others, and how many registers its threads may have."""
    room = min(255, 65_536 // (search.tile.threads * search.tile.blocks))
    tile = {"per_thread": search.tile.per_thread, "most_registers": room}
    return {"function": function, "dtype": space.dtype.name, "copy_bytes": copy_bytes, **tile}


def row_sources():
    """Return the sources of what is done to single rows and pairs."""
    sources = [(halve_source(), "float32"), (pack_source(), "uint8")]
    pairs = [("uint8", "int32"), ("uint8", "int64"), ("uint8", "float64"), ("float32",) * 2, ("float64",) * 2]
    sources += [(norms_source(*map(np.dtype, pair)), pair[1]) for pair in pairs]
    sources += [(scan_source(np.dtype(name)), name) for name in COMPUTED]
    # Lengths are taken in double precision.
    sources += [(unit_source(np.dtype(name)), "float64") for name in ("float32", "float64")]
    sources += [(recompute_source(np.dtype(name)), name) for name in ("float32", "float64")]
    return [(source, {"dtype": dtype}) for source, dtype in sources]


def linear_sources():
    """Return the sources of losses of linear models: few and many, and of bytes with classes in several parts."""
    different = {}
    cases = [(name, n_models, CLASSES) for name in COMPUTED for n_models in (1, MOST_MODELS)]
    for name, n_models, n_classes in (*cases, ("uint8", MOST_MODELS, CLASSES + 1)):
        dtype = np.dtype(name)
        found = loss_kernel(dtype, np.result_type(dtype, np.float32), 784, n_classes, n_models)
        per_thread, blocks = (found.samples // 32, found.weight_shape[2]), 3 if n_classes == CLASSES else 2
        room = 65_536 // (32 * MOST_MODELS * blocks)
        about = {"dtype": name, "per_thread": per_thread, "most_registers": min(255, room)}
        different.setdefault(found.source, about)
    return list(different.items())


def faulty_linear_sources():
    """Return sources of losses of linear models with faults that must be found."""
    plants = {
        "constant": ("word[0], two_23,", "word[0], 0x4b000000,"),
        "spill": ("__launch_bounds__(32 * most_models, 3)", "__launch_bounds__(32 * most_models, 8)"),
        "literal": ("acc[r][c] = fma(value,", "acc[r][c] = 1.1 * fma(value,"),
    }
    source = loss_kernel(np.dtype(np.uint8), np.dtype(np.float32), 784, CLASSES, MOST_MODELS).source
    (about,) = (about for other, about in linear_sources() if other == source)
    for correct, _ in plants.values():
        assert source.count(correct) == 1, correct
    return [(source.replace(*plant), {**about, "fault": fault}) for fault, plant in plants.items()]


def faulty_searches():
    """Return sources of the fused search, of absolute differences of bytes, with faults that must be found."""
    plants = {
        "literal": ("return ordered(x) < limit;", "return ordered(x) * 0.5 < limit;"),
        "spill": ("__launch_bounds__(threads, 2) search", "__launch_bounds__(threads, 4) search"),
        "intrinsic": ("return add_differences(acc, a, b);", "return acc + __vsadu4(a, b);"),
        "wide": ("Chunk a[down];", "acc[0][0] += u32(u64(acc[0][1]) * acc[0][2] >> 32); Chunk a[down];"),
    }
    space = Space(METRICS["cityblock"], np.dtype(np.uint8), 3)
    source = search_of(space).source
    (described,) = (described for other, described in searches() if other == source)
    for correct, _ in plants.values():
        assert source.count(correct) == 1, correct
    return [(source.replace(*plant), {**described, "fault": fault}) for fault, plant in plants.items()]


def pretend_to_have_a_device():
    """Let numba-cuda compile and store kernels as for a device, without loading them."""
    from numba.cuda import codegen, dispatcher

    dispatcher.get_current_device = lambda: types.SimpleNamespace(compute_capability=COMPILED_FOR)
    dispatcher._Kernel.bind = lambda kernel: None
    codegen.CUDACodeLibrary._ensure_cc = lambda library, cc: cc or COMPILED_FOR
    codegen.JITCUDACodegen.magic_tuple = lambda code: COMPILED_FOR


def numba_records(architectures):
    """Return what became of numba's kernels; without architectures, only whether they came from the disk."""
    pretend_to_have_a_device()
    kernels = [
        (kernel, given, described(kernel, given, *about)) for (kernel, given), about in started_kernels().items()
    ]
    records = {"cache": compiled_before(kernels)}
    if architectures:
        records["numba"] = compile_numba(kernels, architectures)
        records["planted"] = compile_numba(planted(), architectures)  # last: the faults stay in this process
    return records


def source_records(architectures):
    """Return what became of the sources in C++."""
    made = {
        "source": direct_sources,
        "search": searches,
        "rows": row_sources,
        "linear": linear_sources,
        "faulty_linear": faulty_linear_sources,
        "faulty": faulty_searches,
    }
    records = {name: compile_sources(sources(), architectures) for name, sources in made.items()}
    return {**records, "groups": compile_sources(group_searches(), ("90a",))}


def main():
    part, *names = sys.argv[1:]
    architectures = [int(name) for text in names for name in text.split(",")]
    json.dump((source_records if part == "sources" else numba_records)(architectures), sys.stdout)


if __name__ == "__main__":
    main()
