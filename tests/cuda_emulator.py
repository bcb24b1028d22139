"""CUDA C++ kernels compiled as C++ for the host, so that their arithmetic and their barriers can be tested.

Each thread of a block is a coroutine of its own: it runs until a barrier or its end, then the next one does. A
barrier that is missing therefore shows, as does one that not all threads reach, a shared array indexed past its
end, a signed overflow, or a write past the end of an argument. Blocks run one after the other.
"""

import ctypes
import functools
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np

HEADER = r"""
#include <ucontext.h>
#include <vector>

struct Index { unsigned x, y, z; };
static Index threadIdx, blockIdx, blockDim, gridDim;
static ucontext_t main_context;
struct Thread { ucontext_t context; std::vector<char> stack; bool waits, ended; };
static Thread* running;

static void barrier() { running->waits = true; swapcontext(&running->context, &main_context); }

#define __global__
#define __device__ static
#define __shared__ static
#define __launch_bounds__(...)
#define __syncthreads() barrier()
"""

LAUNCHER = r"""
#include <tuple>
#include <utility>

template <typename... A, size_t... I>
static void call(void (*kernel)(A...), void** args, std::index_sequence<I...>) { kernel(*static_cast<A*>(args[I])...); }

template <auto kernel> struct Entry {
    static void** args;
    template <typename... A> static void call_it(void (*k)(A...)) { call(k, args, std::index_sequence_for<A...>()); }
    static void run() { call_it(kernel); running->ended = true; swapcontext(&running->context, &main_context); }
};
template <auto kernel> void** Entry<kernel>::args;

// Returns 0, or 1 if some threads of a block wait at a barrier while others have ended.
template <auto kernel> static int launch(const unsigned* dims, void** args)
{
    Entry<kernel>::args = args;
    gridDim = {dims[0], dims[1], 1};
    blockDim = {dims[2], dims[3], 1};
    std::vector<Thread> threads(blockDim.x * blockDim.y);
    for (Thread& thread : threads) thread.stack.resize(1 << 16);
    for (blockIdx.y = 0; blockIdx.y < gridDim.y; ++blockIdx.y)
    for (blockIdx.x = 0; blockIdx.x < gridDim.x; ++blockIdx.x) {
        for (Thread& thread : threads) {
            getcontext(&thread.context);
            thread.context.uc_stack.ss_sp = thread.stack.data();
            thread.context.uc_stack.ss_size = thread.stack.size();
            thread.ended = false;
            makecontext(&thread.context, Entry<kernel>::run, 0);
        }
        for (unsigned ended = 0; ended < threads.size();) {
            unsigned waiting = 0;
            for (unsigned t = 0; t < threads.size(); ++t) {
                running = &threads[t];
                if (running->ended) continue;
                running->waits = false;
                threadIdx = {t % blockDim.x, t / blockDim.x, 0};
                swapcontext(&main_context, &running->context);
                waiting += running->waits;
                ended += running->ended;
            }
            if (waiting && ended) return 1;
        }
    }
    return 0;
}
"""

# Past the ends of an argument: in sizes, indices and integers a large number, in floats a NaN.
GUARD = np.full(64, 0xFF, np.uint8)


def compiler():
    """Return the path of a C++ compiler, None if there is none."""
    return shutil.which("g++")


class Kernels:
    """The kernels of a source, which is CUDA C++ without headers."""

    def __init__(self, source):
        names = re.findall(r'extern "C" __global__ void (?:__launch_bounds__\([^()]*\) )?(\w+)\(', source)
        entries = "".join(
            f'extern "C" int run_{name}(unsigned* dims, void** args) {{ return launch<{name}>(dims, args); }}\n'
            for name in names
        )
        with tempfile.TemporaryDirectory() as folder:
            path, library = Path(folder, "kernels.cpp"), Path(folder, "kernels.so")
            path.write_text(HEADER + source + LAUNCHER + entries)
            command = [compiler(), "-std=c++17", "-O1", "-fPIC", "-shared", "-Wno-unknown-pragmas"]
            # Traps, because the library of messages cannot be loaded into a running Python.
            command += ["-fsanitize=undefined", "-fsanitize-undefined-trap-on-error", "-fno-sanitize=vptr"]
            done = subprocess.run([*command, str(path), "-o", str(library)], capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            self._library = ctypes.CDLL(str(library))

    def launch(self, name, grid, block, args):
        """Run a kernel; `args` are C-contiguous arrays, which it may change, and numpy scalars."""
        grid, block = ((*size, 1)[:2] for size in (grid, block))
        held, pointers = [], []
        for arg in args:
            if isinstance(arg, np.ndarray):
                assert arg.flags.c_contiguous, f"{name} is given an array with strides {arg.strides}"
                held.append(np.concatenate([GUARD, arg.reshape(-1).view(np.uint8), GUARD]))
                pointers.append(ctypes.c_void_p(held[-1].ctypes.data + GUARD.size))
            else:
                held.append(np.array(arg))
                pointers.append(np.ctypeslib.as_ctypes(held[-1].reshape(1)))
        addresses = (ctypes.c_void_p * len(args))(*(ctypes.addressof(pointer) for pointer in pointers))
        function = getattr(self._library, f"run_{name}")
        assert function((ctypes.c_uint * 4)(*grid, *block), addresses) == 0, f"{name}: a barrier not all threads reach"
        for arg, memory in zip(args, held, strict=True):
            if isinstance(arg, np.ndarray):
                assert (memory[: GUARD.size] == GUARD).all(), f"{name} writes before an argument"
                assert (memory[-GUARD.size :] == GUARD).all(), f"{name} writes past an argument"
                arg.reshape(-1).view(np.uint8)[:] = memory[GUARD.size : -GUARD.size]


@functools.cache
def compiled(source):
    """Return the kernels of a source, compiled once a process."""
    return Kernels(source)
