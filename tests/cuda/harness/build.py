# SPDX-License-Identifier: Apache-2.0
"""Compiles kernels for the levels of verification that need no GPU, and keeps what was compiled.

Everything lands in one folder (``CURVLAB_TEST_BUILD``, else ``build/cuda_tests`` of the checkout, else a private folder
under the system's temporary one) under a name that holds a hash of the compiler, the flags and every source file that
may be included, so a second run compiles nothing. Files appear whole (temporary name, then rename) and one process
builds a thing while the others wait, so parallel test processes share the folder.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
HARNESS = ROOT / "tests" / "cuda" / "harness"
PLANTED = ROOT / "tests" / "cuda" / "planted"
NORMS = ROOT / "csrc" / "norms"
NORMS_LAUNCHERS = (NORMS / "multi_tensor_norms_cuda.cu", NORMS / "filter_norms_cuda.cu")
HVP = ROOT / "csrc" / "hvp"
HVP_LAUNCHERS = tuple(HVP / f"{name}_cuda.cu" for name in ("tangent", "pool", "softmax_hessian", "activation_factors"))

SPARSE = ROOT / "csrc" / "sparse_conv"
SPARSE_LAUNCHERS = (SPARSE / "masked_conv2d_cuda.cu",)

_SOURCE_FOLDERS = (ROOT / "csrc" / "common", NORMS, HVP, SPARSE, HARNESS, PLANTED, ROOT / "tests" / "ops" / "sanitized")
_SOURCE_SUFFIXES = {".h", ".cuh", ".cu", ".cpp"}
_HOST_FLAGS = (
    "-std=c++20",
    "-DCURVLAB_SIMT_HOST",
    "-ffp-contract=off",  # nothing is fused but what the source fuses: the bits are comparable with the PTX level
    "-g",
    "-Wall",
    "-Wextra",
    "-Wno-sign-compare",  # threadIdx.x < n: CUDA code mixes them everywhere
    "-Wno-unknown-pragmas",  # #pragma unroll
    f"-I{ROOT / 'csrc'}",
    f"-I{HARNESS}",
)
_SANITIZERS = {
    "": ("-O2",),
    "address": ("-O2", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"),
    "thread": ("-O2", "-fsanitize=thread", "-fno-omit-frame-pointer"),
}
SANITIZER_ENVIRONMENT = {
    # Leaks are not the kernels' matter: a launch that a fault stopped abandons its fibers, with what they own.
    "ASAN_OPTIONS": "detect_leaks=0:exitcode=66",
    "UBSAN_OPTIONS": "print_stacktrace=1:exitcode=66",
    "TSAN_OPTIONS": "exitcode=66:halt_on_error=0:report_signal_unsafe=0",
}


class BuildError(RuntimeError):
    """A compiler said no; the message holds the command and the compiler's words."""


def cxx() -> str | None:
    """The host compiler: ``CXX``, else g++, clang++ or c++; None if there is none."""
    named = os.environ.get("CXX")
    return next((path for name in (named, "g++", "clang++", "c++") if name and (path := shutil.which(name))), None)


def nvcc() -> str | None:
    """Path of nvcc: on PATH, under ``CUDA_HOME``, or installed from the package index; None if there is none."""
    home = os.environ.get("CUDA_HOME")
    places = [shutil.which("nvcc"), f"{home}/bin/nvcc" if home else None, _from_index("nvcc")]
    return next((p for p in places if p and os.access(p, os.X_OK)), None)


def nvdisasm() -> str | None:
    """Path of nvdisasm (package nvidia-cuda-nvdisasm); None if there is none."""
    places = [_from_index("nvdisasm"), shutil.which("nvdisasm")]
    return next((p for p in places if p and os.access(p, os.X_OK)), None)


def _from_index(tool: str) -> str | None:
    found = sorted(Path(sysconfig.get_paths()["purelib"]).glob(f"nvidia/cu*/bin/{tool}"))
    return str(found[-1]) if found else None


@functools.cache
def build_folder() -> Path:
    """The folder of everything compiled here; made on first use."""
    named = os.environ.get("CURVLAB_TEST_BUILD")
    candidates = [Path(named)] if named else [ROOT / "build" / "cuda_tests", _private_temporary_folder()]
    for folder in candidates:
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            if os.access(folder, os.W_OK):
                return folder
    raise BuildError(f"build_folder: none of these can be written: {', '.join(map(str, candidates))}")


def _private_temporary_folder() -> Path:
    folder = Path(tempfile.gettempdir()) / f"curvlab-cuda-tests-{os.getuid()}"
    with contextlib.suppress(OSError):
        folder.mkdir(mode=0o700, exist_ok=True)
        if folder.stat().st_uid == os.getuid():  # someone else's libraries are not loaded
            return folder
    return Path(tempfile.mkdtemp(prefix="curvlab-cuda-tests-"))


def host_library(name: str, sources: Iterable[Path]) -> Path:
    """Shared library of launchers and a binding for the host harness, optimized, without sanitizers."""
    flags = (*_SANITIZERS[""], "-shared", "-fPIC", "-fvisibility=hidden", *_no_unique())
    return _host_build(f"lib{name}.so", sources, flags)


def host_executable(
    name: str,
    sources: Iterable[Path],
    sanitizer: str = "",
    *,
    headers: Path | None = None,
    flags: Sequence[str] = (),
) -> Path:
    """Executable of the host harness; ``sanitizer`` is "", "address" (with undefined behavior) or "thread".

    ``headers`` is a folder whose files go before those of ``csrc``; its name must change with what it holds. ``flags``
    are further ones of the compiler.
    """
    first = () if headers is None else ("-iquote", str(headers))
    return _host_build(f"{name}-{sanitizer or 'plain'}", sources, (*_SANITIZERS[sanitizer], *first, *flags))


def _no_unique() -> tuple[str, ...]:
    """Two loaded builds must not share their inline variables; only g++ would let them."""
    return ("-fno-gnu-unique",) if "g++" in Path(_need(cxx(), "a C++ compiler")).name else ()


def _host_build(name: str, sources: Iterable[Path], flags: Sequence[str]) -> Path:
    compiler = _need(cxx(), "a C++ compiler")
    files = [part for source in sources for part in ("-x", "c++", str(source))]
    return _built(name, compiler, [*_HOST_FLAGS, *flags, *files], lambda out: [compiler, "-o", str(out)])


def ptx(source: Path, arch: str, *, fuse: bool = True) -> Path:
    """PTX of a .cu file for a virtual architecture such as ``compute_80``, with source lines.

    ``fuse=False`` keeps nvcc from making fma of a product and a sum, as the host harness does not either.
    """
    compiler = _need(nvcc(), "nvcc")
    flags = ["-O3", "-std=c++20", "-lineinfo", f"-arch={arch}", "-ptx", f"-I{ROOT / 'csrc'}", str(source)]
    flags += [] if fuse else ["-fmad=false"]
    return _built(f"{source.stem}-{arch}.ptx", compiler, flags, lambda out: [compiler, "-o", str(out)])


def cubin(source: Path, arch: str) -> tuple[Path, str]:
    """Machine code of a .cu file for an architecture such as ``sm_80``, and what ptxas says about its resources."""
    compiler = _need(nvcc(), "nvcc")
    flags = ["-O3", "-std=c++20", f"-arch={arch}", "-cubin", "-Xptxas", "-v", f"-I{ROOT / 'csrc'}", str(source)]
    out = _built(f"{source.stem}-{arch}.cubin", compiler, flags, lambda out: [compiler, "-o", str(out)])
    return out, out.with_name(out.name + ".log").read_text()


def in_parallel(jobs: Iterable[Callable[[], object]]) -> None:
    """Runs the builds two at a time; the first error is raised when all have ended."""
    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(job) for job in jobs]:
            done.result()


def run_checked(command: Sequence[str], *, timeout: float = 280.0) -> str:
    """Standard output of a tool; ``BuildError`` with its words if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    if done.returncode:
        raise BuildError(f"{' '.join(command)}\n{done.stdout[-4000:]}{done.stderr[-8000:]}")
    return done.stdout


def _need(tool: str | None, name: str) -> str:
    if tool is None:
        raise BuildError(f"{name} was not found")
    return tool


@functools.cache
def _version(compiler: str) -> str:
    return run_checked([compiler, "--version"])


def _key(compiler: str, flags: Sequence[str]) -> str:
    digest = hashlib.sha256("\0".join([compiler, _version(compiler), *flags]).encode())
    for folder in _SOURCE_FOLDERS:
        # csrc's .cpp files need torch: nothing here compiles them
        suffixes = _SOURCE_SUFFIXES - {".cpp"} if folder.is_relative_to(ROOT / "csrc") else _SOURCE_SUFFIXES
        for path in sorted(p for p in folder.rglob("*") if p.suffix in suffixes):
            digest.update(f"\0{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _built(name: str, compiler: str, flags: Sequence[str], command: Callable[[Path], list[str]]) -> Path:
    stem, dot, suffix = name.partition(".")
    out = build_folder() / f"{stem}-{_key(compiler, flags)}{dot}{suffix}"
    log = out.with_name(out.name + ".log")
    with _lock(out.with_name(out.name + ".lock")):
        if not out.exists():
            partial = out.with_name(f"partial-{os.getpid()}-{threading.get_ident()}-{out.name}")
            try:
                done = subprocess.run([*command(partial), *flags], capture_output=True, text=True)
                if done.returncode:
                    raise BuildError(f"{' '.join([*command(out), *flags])}\n{done.stderr[-8000:]}")
                log.write_text(done.stdout + done.stderr)  # first the log: `out` says that both are there
                os.replace(partial, out)
            finally:
                partial.unlink(missing_ok=True)
    return out


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    if sys.platform == "win32":
        raise BuildError("the host harness needs a POSIX system")
    import fcntl

    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
