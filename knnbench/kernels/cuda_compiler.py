"""Machine code of CUDA C++ for an architecture's own features, which the compiler that CuPy starts is not asked for.

Instructions such as ``wgmma`` exist for ``sm_90a`` alone, and not for the ``sm_90`` whose code later devices could be
expected to run. It takes the NVRTC that CuPy brings; what it made is kept on disk.
"""

import hashlib
import os
import tempfile
from functools import cache
from pathlib import Path

from knnbench.kernels.compilation import cache_directory

__all__ = ["machine_code"]

# CuPy's own, so that a kernel computes the same whoever compiles it.
OPTIONS = ("--std=c++17", "-ftz=true")


def machine_code(source: str, architecture: str) -> Path:
    """Return a file with the machine code of CUDA C++ without headers.

    Parameters
    ----------
    source : str
    architecture : str
        Such as ``"90a"``.

    Returns
    -------
    Path
        Of a cubin, in `cache_directory`, or where that cannot be written in a directory of this process.

    Raises
    ------
    ImportError
        Without CuPy, or with one that has no NVRTC.
    RuntimeError
        CuPy's ``NVRTCError``, if it does not compile.
    """
    from cupy_backends.cuda.libs import nvrtc  # type: ignore[import-untyped]

    options = (f"--gpu-architecture=sm_{architecture}", *OPTIONS)
    key = hashlib.sha256(repr((source, options, nvrtc.getVersion())).encode()).hexdigest()[:32]
    path = _folder() / f"{key}.cubin"
    if not path.exists():
        program = nvrtc.createProgram(source, "kernels.cu", (), ())
        try:
            nvrtc.compileProgram(program, options)
            code = nvrtc.getCUBIN(program)
        finally:
            nvrtc.destroyProgram(program)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(code)
        Path(file.name).replace(path)
    return path


@cache
def _folder() -> Path:
    try:
        cache_directory().mkdir(parents=True, exist_ok=True)
    except OSError:
        return _own_folder()
    return cache_directory() if os.access(cache_directory(), os.W_OK) else _own_folder()


@cache
def _own_folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="knnbench-"))
