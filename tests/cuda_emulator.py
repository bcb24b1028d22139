"""CUDA C++ kernels compiled as C++ for the host, so that their arithmetic and their barriers can be tested.

Each thread of a block is a coroutine of its own: it runs until a barrier or its end, then the next one does. A
barrier that is missing therefore shows, as does one that not all threads reach, a shared array indexed past its
end, a signed overflow, or a write or an asynchronous copy past the end of an argument. Blocks run one after the other.

Instructions that C++ has no words for have stand-ins. What all threads of a warp do together, they do between barriers
of the warp; and an asynchronous copy is made as late as the program allows, so that a wait that is missing shows.
"""

import ctypes
import functools
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np

# What a kernel sees. What it calls is compiled once: with the containers in it, that takes longer than a kernel.
HEADER = r"""
#include <cstdint>

struct Index { unsigned x, y, z; };
extern Index threadIdx, blockIdx, blockDim, gridDim;

enum State { RUNS, WAITS_FOR_WARP, WAITS_FOR_BLOCK, ENDED };
void wait(State);

#define __global__
#define __device__ static
#define __shared__ static
#define __launch_bounds__(...)
#define __syncthreads() wait(WAITS_FOR_BLOCK)

struct alignas(16) uint4 { unsigned x, y, z, w; };
extern uint4* dynamic_memory;

unsigned atomicAdd(unsigned* place, unsigned n);
void atomicMin(unsigned long long* place, unsigned long long n);
unsigned __byte_perm(unsigned low, unsigned high, unsigned selector);
unsigned differences(unsigned a, unsigned b);
unsigned add_differences(unsigned sum, unsigned a, unsigned b);
unsigned __vmaxu2(unsigned a, unsigned b);
unsigned larger_halves(unsigned a, unsigned b);
float from_half(unsigned short half);
unsigned short to_half(float x);

void copy_async(void* to, const void* from, unsigned size, unsigned n_bytes);
template <unsigned size> static void copy_async(void* to, const void* from, unsigned n_bytes)
{
    copy_async(to, from, size, n_bytes);
}
void end_of_group();
void wait_for_all_but(unsigned n_groups);
template <unsigned n_groups> static void wait_for_all_but() { wait_for_all_but(n_groups); }

void load_matrices(unsigned (&to)[4], const void* row);
void multiply_add(int& c0, int& c1, int& c2, int& c3, const unsigned (&a)[4], unsigned b0, unsigned b1);
void multiply_add(float& c0, float& c1, float& c2, float& c3, const unsigned (&a)[4], unsigned b0, unsigned b1);

void begin_barrier(unsigned long long& barrier);
void show_barriers();
void expect(unsigned long long& barrier, unsigned n_bytes);
void copy_whole(void* to, const void* from, unsigned n_bytes, unsigned long long& barrier);
void wait_until_filled(unsigned long long& barrier, unsigned parity);

uint64_t matrix_at(const unsigned char* rows);
uint64_t bytes_on(uint64_t matrix, unsigned n_bytes);
void begin_products();
void settle(int&);
void settle(float&);
void multiply_add(int (&acc)[2][64], unsigned long long a, unsigned long long b);
void multiply_add(float (&acc)[2][64], unsigned long long a, unsigned long long b);
void end_of_products();
void wait_for_products(unsigned n_groups);
template <unsigned n_groups> static void wait_for_products() { wait_for_products(n_groups); }

void exchange(void* x, unsigned n_bytes, unsigned mask);
template <typename T> static T of_lane(T x, unsigned mask)
{
    exchange(&x, sizeof(T), mask);
    return x;
}
bool any_of_warp(bool x);

int run_blocks(void (*thread)(), const unsigned* dims);
"""

# Without <cmath>, which takes 80 ms to read, where a kernel takes 120 to compile.
KERNEL_HEADER = r"""
using size_t = decltype(sizeof 0);
extern "C" {
double exp(double), fabs(double), log(double), sqrt(double), fmax(double, double), fmin(double, double);
double fma(double, double, double), frexp(double, int*);
float expf(float), fabsf(float), logf(float), sqrtf(float), fmaxf(float, float), fminf(float, float);
float fmaf(float, float, float);
}
static float exp(float x) { return expf(x); }
static float fabs(float x) { return fabsf(x); }
static float fma(float x, float y, float z) { return fmaf(x, y, z); }
static float fmax(float x, float y) { return fmaxf(x, y); }
static float log(float x) { return logf(x); }
static float sqrt(float x) { return sqrtf(x); }

static void** given;
template <typename... A> struct Call { Call(void (*kernel)(A...), A... args) { kernel(args...); } };
template <typename... A> static void call(void (*kernel)(A...))
{
    void** next = given;
    Call<A...>{kernel, *static_cast<A*>(*next++)...};  // in braces one after the other, in parentheses in any order
}
"""

RUNTIME = r"""
#include <setjmp.h>
#include <ucontext.h>
#include <algorithm>
#include <cmath>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <vector>

Index threadIdx, blockIdx, blockDim, gridDim;
struct Copy { void* to; const void* from; unsigned size, n_bytes; };
struct Product { void* sums; bool is_float; const unsigned char *a, *b; };
struct Thread {
    ucontext_t first;
    jmp_buf next;
    bool is_started;
    State state;
    std::vector<Copy> started;
    std::deque<std::vector<Copy>> groups;
    std::vector<Product> begun;
    std::deque<std::vector<Product>> products;
    std::map<unsigned long long*, unsigned> waits;
    unsigned given[8];
    const void* place;
};
static Thread *running, *warp;  // warp: the first of 32

// Jumps, because a change of contexts asks the system for the mask of signals each time.
static jmp_buf scheduler;
static void resume(Thread& thread)
{
    if (_setjmp(scheduler)) return;
    if (thread.is_started) _longjmp(thread.next, 1);
    thread.is_started = true;
    setcontext(&thread.first);
}
void wait(State state)
{
    running->state = state;
    if (!_setjmp(running->next)) _longjmp(scheduler, 1);
}

uint4* dynamic_memory;

// What a kernel may read by asynchronous copies: its arguments.
static std::vector<std::pair<const char*, size_t>> arguments;
static bool reads_outside;
extern "C" void allow(const char* start, size_t n_bytes) { arguments.push_back({start, n_bytes}); }

unsigned atomicAdd(unsigned* place, unsigned n) { unsigned old = *place; *place += n; return old; }

void atomicMin(unsigned long long* place, unsigned long long n) { *place = std::min(*place, n); }

unsigned __byte_perm(unsigned low, unsigned high, unsigned selector)
{
    const uint64_t both = uint64_t(high) << 32 | low;
    unsigned result = 0;
    for (int i = 0; i < 4; ++i) result |= unsigned(both >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i;
    return result;
}

unsigned differences(unsigned a, unsigned b)
{
    unsigned result = 0;
    for (int i = 0; i < 32; i += 8) result |= unsigned(std::abs(int(a >> i & 255) - int(b >> i & 255))) << i;
    return result;
}

unsigned add_differences(unsigned sum, unsigned a, unsigned b)
{
    for (int i = 0; i < 32; i += 8) sum += unsigned(std::abs(int(a >> i & 255) - int(b >> i & 255)));
    return sum;
}

unsigned __vmaxu2(unsigned a, unsigned b)
{
    return std::max(a >> 16, b >> 16) << 16 | std::max(a & 0xffff, b & 0xffff);
}
// Of numbers in float16 that are neither negative nor NaN.
unsigned larger_halves(unsigned a, unsigned b) { return __vmaxu2(a, b); }

void copy_async(void* to, const void* from, unsigned size, unsigned n_bytes)
{
    if (uintptr_t(to) % size || uintptr_t(from) % size) __builtin_trap();
    const char* const start = static_cast<const char*>(from);
    reads_outside |= n_bytes && std::none_of(arguments.begin(), arguments.end(), [&](auto argument) {
        return start >= argument.first && start + n_bytes <= argument.first + argument.second;
    });
    running->started.push_back({to, from, size, n_bytes});
}
void end_of_group()
{
    running->groups.push_back(running->started);
    running->started.clear();
}
void wait_for_all_but(unsigned n_groups)
{
    for (; running->groups.size() > n_groups; running->groups.pop_front())
        for (const Copy& copy : running->groups.front()) {
            memset(copy.to, 0, copy.size);
            if (copy.n_bytes) memcpy(copy.to, copy.from, copy.n_bytes);
        }
}

// Threads 8 m to 8 m + 7 give the rows of matrix m; each gets, of every matrix, 4 bytes of row lane / 4.
void load_matrices(unsigned (&to)[4], const void* row)
{
    running->place = row;
    wait(WAITS_FOR_WARP);
    const unsigned lane = running - warp;
    for (int m = 0; m < 4; ++m)
        memcpy(&to[m], static_cast<const char*>(warp[8 * m + lane / 4].place) + lane % 4 * 4, 4);
    wait(WAITS_FOR_WARP);
}

// Row i of the first matrix is held by lanes 4 (i % 8) to 4 (i % 8) + 3, its columns 16 h to 16 h + 15 in register
// i / 8 + 2 h; column j of the second by lanes 4 j to 4 j + 3.
static int dot_of_32(unsigned i, unsigned j)
{
    int sum = 0;
    for (unsigned f = 0; f < 32; ++f) {
        const unsigned part = f / 4 % 4, half = f / 16, shift = f % 4 * 8;
        const unsigned a = warp[i % 8 * 4 + part].given[i / 8 + 2 * half], b = warp[j * 4 + part].given[4 + half];
        sum += int(a >> shift & 255) * int(b >> shift & 255);
    }
    return sum;
}
void multiply_add(int& c0, int& c1, int& c2, int& c3, const unsigned (&a)[4], unsigned b0, unsigned b1)
{
    memcpy(running->given, a, sizeof(a));
    running->given[4] = b0, running->given[5] = b1;
    wait(WAITS_FOR_WARP);
    const unsigned lane = running - warp, i = lane / 4, j = lane % 4 * 2;
    c0 += dot_of_32(i, j), c1 += dot_of_32(i, j + 1);
    c2 += dot_of_32(i + 8, j), c3 += dot_of_32(i + 8, j + 1);
    wait(WAITS_FOR_WARP);
}

// A number of float16 as bits; to the nearest one, of two the even.
float from_half(unsigned short half)
{
    const int exponent = half >> 10 & 31, fraction = half & 1023;
    const float size = exponent == 31 ? (fraction ? NAN : INFINITY)
        : exponent ? std::ldexp(1024.f + fraction, exponent - 25) : std::ldexp(float(fraction), -24);
    return half >> 15 ? -size : size;
}
unsigned short to_half(float x)
{
    const unsigned short sign = std::signbit(x) ? 0x8000 : 0;
    if (x != x) return 0x7fff;
    const float size = std::fabs(x);
    if (size >= 65520) return sign | 0x7c00;
    if (size < 0x1p-14f) return sign | (unsigned short)(std::nearbyint(std::ldexp(size, 24)));
    int exponent;
    const float fraction = std::nearbyint(std::ldexp(std::frexp(size, &exponent), 11));
    return sign | (unsigned short)(((exponent + 13) << 10) + int(fraction));
}
// Row i and column j as in `dot_of_32`, whose bytes are those of 16 numbers.
static float dot_of_16(float sum, unsigned i, unsigned j)
{
    for (unsigned f = 0; f < 16; ++f) {
        const unsigned part = f / 2 % 4, half = f / 8, shift = f % 2 * 16;
        const unsigned a = warp[i % 8 * 4 + part].given[i / 8 + 2 * half], b = warp[j * 4 + part].given[4 + half];
        sum += from_half(a >> shift & 65535) * from_half(b >> shift & 65535);
    }
    return sum;
}
void multiply_add(float& c0, float& c1, float& c2, float& c3, const unsigned (&a)[4], unsigned b0, unsigned b1)
{
    memcpy(running->given, a, sizeof(a));
    running->given[4] = b0, running->given[5] = b1;
    wait(WAITS_FOR_WARP);
    const unsigned lane = running - warp, i = lane / 4, j = lane % 4 * 2;
    c0 = dot_of_16(c0, i, j), c1 = dot_of_16(c1, i, j + 1);
    c2 = dot_of_16(c2, i + 8, j), c3 = dot_of_16(c3, i + 8, j + 1);
    wait(WAITS_FOR_WARP);
}

// A barrier that counts bytes: what is to be copied for each time that it is filled, and whether that was done. Copies
// are made when the first thread waits for them.
struct Filling { unsigned expected; std::vector<Copy> copies; bool done; };
static std::map<unsigned long long*, std::vector<Filling>> fillings;
void begin_barrier(unsigned long long& barrier) { fillings[&barrier].clear(); }
void show_barriers() {}
void expect(unsigned long long& barrier, unsigned n_bytes)
{
    fillings[&barrier].push_back({n_bytes, {}, false});
}
void copy_whole(void* to, const void* from, unsigned n_bytes, unsigned long long& barrier)
{
    if (uintptr_t(to) % 16 || uintptr_t(from) % 16 || n_bytes % 16) __builtin_trap();
    const char* const start = static_cast<const char*>(from);
    reads_outside |= std::none_of(arguments.begin(), arguments.end(), [&](auto argument) {
        return start >= argument.first && start + n_bytes <= argument.first + argument.second;
    });
    fillings[&barrier].back().copies.push_back({to, from, n_bytes, n_bytes});
    memset(to, 0xAA, n_bytes);  // what stood there may be gone from now on
}
// A thread waits for one filling after the other.
void wait_until_filled(unsigned long long& barrier, unsigned parity)
{
    const unsigned number = running->waits[&barrier]++;
    if (number % 2 != parity) __builtin_trap();
    if (fillings[&barrier].size() <= number) __builtin_trap();  // thread 0 comes first, and asks for it
    Filling& filling = fillings[&barrier][number];
    if (filling.done) return;
    filling.done = true;
    for (const Copy& copy : filling.copies) {
        filling.expected -= copy.n_bytes;
        memcpy(copy.to, copy.from, copy.n_bytes);
    }
    if (filling.expected) __builtin_trap();
}

// Products of four warps, whose matrices lie in shared memory: rows of 128 bytes with chunks that change places. They
// are computed as late as the program allows.
uint64_t matrix_at(const unsigned char* rows)
{
    if (uintptr_t(rows) % 1024) __builtin_trap();
    return uintptr_t(rows);
}
uint64_t bytes_on(uint64_t matrix, unsigned n_bytes) { return matrix + n_bytes; }
void begin_products() {}
void settle(int&) {}
void settle(float&) {}
void multiply_add(int (&acc)[2][64], unsigned long long a, unsigned long long b)
{
    running->begun.push_back({acc, false, (const unsigned char*)a, (const unsigned char*)b});
}
void multiply_add(float (&acc)[2][64], unsigned long long a, unsigned long long b)
{
    running->begun.push_back({acc, true, (const unsigned char*)a, (const unsigned char*)b});
}
void end_of_products()
{
    running->products.push_back(running->begun);
    running->begun.clear();
}
static const unsigned char* swizzled(const unsigned char* matrix, unsigned row, unsigned offset)
{
    const uintptr_t place = uintptr_t(matrix) + row * 128 + offset;
    return (const unsigned char*)(place ^ (place >> 7 & 7) << 4);
}
static void compute(const Product& product)
{
    const unsigned lane = threadIdx.x % 32, first = threadIdx.x / 32 % 4 * 16 + lane / 4;
    for (unsigned r = 0; r < 2; ++r)
        for (unsigned c = 0; c < 64; ++c) {
            const unsigned i = first + 8 * r, j = c / 2 * 8 + lane % 4 * 2 + c % 2;
            if (product.is_float) {
                float& sum = static_cast<float(*)[64]>(product.sums)[r][c];
                for (unsigned f = 0; f < 32; f += 2) {
                    unsigned short a, b;
                    memcpy(&a, swizzled(product.a, i, f), 2), memcpy(&b, swizzled(product.b, j, f), 2);
                    sum += from_half(a) * from_half(b);
                }
            } else {
                int& sum = static_cast<int(*)[64]>(product.sums)[r][c];
                for (unsigned f = 0; f < 32; ++f)
                    sum += int(*swizzled(product.a, i, f)) * int(*swizzled(product.b, j, f));
            }
        }
}
void wait_for_products(unsigned n_groups)
{
    for (; running->products.size() > n_groups; running->products.pop_front())
        for (const Product& product : running->products.front()) compute(product);
}

// What the thread of the warp has whose number differs in the bits of a mask.
void exchange(void* x, unsigned n_bytes, unsigned mask)
{
    memcpy(running->given, x, n_bytes);
    wait(WAITS_FOR_WARP);
    memcpy(x, warp[(running - warp) ^ mask].given, n_bytes);
    wait(WAITS_FOR_WARP);
}

bool any_of_warp(bool x)
{
    running->given[0] = x;
    wait(WAITS_FOR_WARP);
    bool any = false;
    for (int lane = 0; lane < 32; ++lane) any |= warp[lane].given[0] != 0;
    wait(WAITS_FOR_WARP);
    return any;
}

// Runs the threads of a warp until all wait for the block or have ended; returns whether all do the same.
static bool run_warp(std::vector<Thread>& threads, size_t first)
{
    const size_t end = std::min(first + 32, threads.size());
    for (;;) {
        size_t counts[4] = {};
        warp = &threads[first];
        for (size_t t = first; t < end; ++t) {
            running = &threads[t];
            threadIdx = {unsigned(t % blockDim.x), unsigned(t / blockDim.x), 0};
            if (running->state == RUNS) resume(*running);
            ++counts[running->state];
        }
        if (counts[WAITS_FOR_WARP] != end - first)
            return counts[WAITS_FOR_BLOCK] == end - first || counts[ENDED] == end - first;
        for (size_t t = first; t < end; ++t) threads[t].state = RUNS;
    }
}

static void (*kernel)();
static void run_thread() { for (;;) kernel(), wait(ENDED); }

// Returns 0; 1 if some threads of a block or a warp wait at a barrier while others do not; 2 if something is written
// past the shared memory that was asked for; 3 if something is copied that is no argument.
int run_blocks(void (*thread)(), const unsigned* dims)
{
    kernel = thread;
    const uint4 guard = {~0u, ~0u, ~0u, ~0u};
    std::vector<uint4> memory(dims[4] / sizeof(uint4) + 5, guard);
    dynamic_memory = memory.data();
    reads_outside = false;
    gridDim = {dims[0], dims[1], 1};
    blockDim = {dims[2], dims[3], 1};
    std::vector<Thread> threads(blockDim.x * blockDim.y);
    const size_t stack_bytes = 1 << 16;
    const std::unique_ptr<char[]> stacks(new char[threads.size() * stack_bytes]);
    for (size_t t = 0; t < threads.size(); ++t) {
        ucontext_t& first = threads[t].first;
        getcontext(&first);
        first.uc_stack.ss_sp = &stacks[t * stack_bytes];
        first.uc_stack.ss_size = stack_bytes;
        makecontext(&first, run_thread, 0);
    }
    for (blockIdx.y = 0; blockIdx.y < gridDim.y; ++blockIdx.y)
    for (blockIdx.x = 0; blockIdx.x < gridDim.x; ++blockIdx.x) {
        for (Thread& thread : threads) {
            thread.state = RUNS;
            thread.groups.clear();
            thread.products.clear();
            thread.waits.clear();
        }
        for (size_t ended = 0; ended < threads.size();) {
            bool agree = true;
            for (size_t first = 0; first < threads.size(); first += 32) agree &= run_warp(threads, first);
            if (!agree) return 1;
            ended = 0;
            for (Thread& thread : threads)
                if (thread.state == ENDED) ++ended; else thread.state = RUNS;
            if (ended && ended < threads.size()) return 1;
        }
    }
    const unsigned char* const bytes = reinterpret_cast<unsigned char*>(dynamic_memory);
    for (size_t i = dims[4]; i < dims[4] + 4 * sizeof(uint4); ++i)
        if (bytes[i] != 255) return 2;
    arguments.clear();
    return 3 * reads_outside;
}
"""

# Past the ends of an argument: in sizes, indices and integers a large number, in floats a NaN.
GUARD = np.full(64, 0xFF, np.uint8)


def compiler():
    """Return the path of a C++ compiler, None if there is none."""
    return shutil.which("g++")


def run_compiler(folder, source, *options):
    """Compile a source in a folder."""
    path = folder / "source.cpp"
    path.write_text(source)
    command = [compiler(), "-std=c++17", "-O1", "-fPIC", "-Wno-unknown-pragmas"]
    # Traps, because the library of messages cannot be loaded into a running Python.
    command += ["-fsanitize=undefined", "-fsanitize-undefined-trap-on-error", "-fno-sanitize=vptr"]
    done = subprocess.run([*command, path, *options], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@functools.cache
def runtime():
    """Return the machine code of what kernels call, compiled once a process."""
    with tempfile.TemporaryDirectory() as folder:
        # Fortified, a jump may not go to another stack.
        run_compiler(Path(folder), HEADER + RUNTIME, "-U_FORTIFY_SOURCE", "-c", "-o", "runtime.o")
        return Path(folder, "runtime.o").read_bytes()


class Kernels:
    """The kernels of a source, which is CUDA C++ without headers."""

    def __init__(self, source):
        names = re.findall(r'extern "C" __global__ void (?:__launch_bounds__\([^()]*\) )?(\w+)\(', source)
        entries = "".join(
            f'extern "C" int run_{name}(const unsigned* dims, void** args)\n'
            f"{{ given = args; return run_blocks([] {{ call({name}); }}, dims); }}\n"
            for name in names
        )
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "runtime.o").write_bytes(runtime())
            source = re.sub(r"extern __shared__ (\w+) (\w+)\[\];", r"\1* const \2 = dynamic_memory;", source)
            # Each library has its own state, and must not find another's.
            options = "runtime.o", "-shared", "-Wl,-Bsymbolic", "-o", "kernels.so"
            run_compiler(Path(folder), HEADER + KERNEL_HEADER + source + entries, *options)
            self._library = ctypes.CDLL(str(Path(folder, "kernels.so")))

    def launch(self, name, grid, block, args, shared_mem=0):
        """Run a kernel; `args` are C-contiguous arrays, which it may change, and numpy scalars."""
        grid, block = ((*size, 1)[:2] for size in (grid, block))
        held, pointers = [], []
        for arg in args:
            if isinstance(arg, np.ndarray):
                assert arg.flags.c_contiguous, f"{name} is given an array with strides {arg.strides}"
                held.append(np.concatenate([GUARD, arg.reshape(-1).view(np.uint8), GUARD]))
                pointers.append(ctypes.c_void_p(held[-1].ctypes.data + GUARD.size))
                self._library.allow(pointers[-1], ctypes.c_size_t(arg.nbytes))
            else:
                held.append(np.array(arg))
                pointers.append(np.ctypeslib.as_ctypes(held[-1].reshape(1)))
        addresses = (ctypes.c_void_p * len(args))(*(ctypes.addressof(pointer) for pointer in pointers))
        function = getattr(self._library, f"run_{name}")
        failed = function((ctypes.c_uint * 5)(*grid, *block, shared_mem), addresses)
        faults = (
            "",
            "waits at a barrier not all threads reach",
            "writes past its shared memory",
            "reads past an argument",
        )
        assert not failed, f"{name} {faults[failed]}"
        for arg, memory in zip(args, held, strict=True):
            if isinstance(arg, np.ndarray):
                assert (memory[: GUARD.size] == GUARD).all(), f"{name} writes before an argument"
                assert (memory[-GUARD.size :] == GUARD).all(), f"{name} writes past an argument"
                arg.reshape(-1).view(np.uint8)[:] = memory[GUARD.size : -GUARD.size]


@functools.cache
def compiled(source):
    """Return the kernels of a source, compiled once a process."""
    return Kernels(source)
