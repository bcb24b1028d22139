"""Benchmarks for asv: a small grid that is measured for each commit; wide sweeps are `knnbench run`'s.

They call only what the first commit already offered, so that asv can measure old commits with them. What a commit
or a machine lacks is n/a, with the reason in ``asv run --show-stderr``; a wrong answer is a failure.
"""

import os
import sys

# Read by each library once, when it is loaded: so before anything here imports numpy.
POOLS = (
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OMP_NUM_THREADS",
    "BLIS_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
    "NUMBA_NUM_THREADS",
)

# asv does not pass on its matrix to an existing environment (--python=same). A command, such as
# ``python -m benchmarks.kernels``, takes all CPUs like any other program.
THREADS = os.environ.get("KNNBENCH_THREADS") or ("1" if "asv_runner" in sys.modules else "")
if THREADS:
    os.environ.update(dict.fromkeys(("KNNBENCH_THREADS", *POOLS), THREADS))
