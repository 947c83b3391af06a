# SPDX-License-Identifier: Apache-2.0
"""Compile the kernels: ``_C`` (CPU, always), ``_C_cuda`` (where torch has CUDA and its nvcc is found), ``_host``.

Environment: ``CURVLAB_CUDA=auto|0|1`` (0: never, 1: an error where impossible), ``TORCH_CUDA_ARCH_LIST``, ``MAX_JOBS``,
``CXX``, ``CURVLAB_ANY_TORCH=1`` (skip the check of torch's version).
"""

from __future__ import annotations

import glob
import importlib
import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

from setuptools import Extension, setup

TORCH_RANGE = "torch>=2.13,<2.15"  # what was built and tested; Makefile and CONTRIBUTING say the same
RUNTIME = ["numpy>=1.26", "rich>=13.7", "safetensors>=0.4.3"]
WANT_CUDA = os.environ.get("CURVLAB_CUDA", "auto")
ASKED_FOR_REQUIREMENTS = "egg_info" in sys.argv or "dist_info" in sys.argv
X86 = platform.machine() in ("x86_64", "AMD64")
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
ISA_FLAGS = {
    "default": [],
    "avx2": AVX2,
    "avx512": [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"],
}
CXX_FLAGS = [
    "-O3",
    "-g0",
    "-std=c++20",
    "-fopenmp",  # without it at::parallel_for silently runs on one thread
    "-fvisibility=hidden",
    "-Wall",
    "-Wno-unknown-pragmas",
    "-Wno-maybe-uninitialized",  # g++ 12 prints false ones from its own AVX-512 header
    f"-ffile-prefix-map={os.getcwd()}/=",
]
NVCC_FLAGS = ["-O3", "-std=c++20", "-lineinfo", "--threads", "0"]


def stop(why: str) -> None:
    sys.exit(f"\ncurvlab cannot be built: {why}\n")


def find_torch() -> ModuleType | None:
    """Torch of the target environment: pip's build isolation hides it, but runs the same interpreter."""
    folders = [sysconfig.get_path("platlib")]
    settings = os.path.join(sys.prefix, "pyvenv.cfg")
    text = Path(settings).read_text() if os.path.exists(settings) else ""
    if sys.prefix == sys.base_prefix or re.search(r"include-system-site-packages\s*=\s*true", text):
        # no virtual environment, or one that sees the system's packages
        base = {"base": sys.base_prefix, "platbase": sys.base_prefix}
        folders += [sysconfig.get_path("platlib", vars=base), site.getusersitepackages()]
    for folder in folders:
        if not importlib.util.find_spec("torch") and os.path.isdir(os.path.join(folder, "torch")):
            sys.path.append(folder)
    return importlib.import_module("torch") if importlib.util.find_spec("torch") else None


def check_torch(torch: ModuleType) -> None:
    """Stop on a torch outside ``TORCH_RANGE`` before its headers fill the screen with errors."""
    found = tuple(int(part) for part in torch.__version__.split(".")[:2])
    oldest, newest = (tuple(map(int, part.split("."))) for part in re.findall(r"[\d.]+", TORCH_RANGE))
    if not oldest <= found < newest:
        stop(
            f"it needs {TORCH_RANGE}, and this environment has torch {torch.__version__}.\n"
            f"  pip install '{TORCH_RANGE}'     (to try another version all the same: CURVLAB_ANY_TORCH=1)"
        )


def find_nvcc_home(torch: ModuleType) -> str | None:
    """Toolkit folder of an nvcc of torch's CUDA major; nvcc itself is asked, as the one on PATH may be a wrapper."""
    if WANT_CUDA == "0" or not torch.version.cuda:
        return None
    major = torch.version.cuda.split(".")[0]
    candidates = [os.path.join(os.environ[k], "bin/nvcc") for k in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(k)]
    candidates += [shutil.which("nvcc") or "", "/usr/local/cuda/bin/nvcc"]
    candidates += [found for p in sys.path for found in glob.glob(f"{p}/nvidia/cu{major}/bin/nvcc")]  # pip's nvcc
    for nvcc in filter(None, candidates):
        try:
            dry = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
            version = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
        except OSError:
            continue
        top, release = re.search(r"^#\$ TOP=(.*)$", dry, re.M), re.search(r"release (\d+)\.", version)
        if top and release and release[1] == major:
            return os.path.realpath(top[1])
    return None


def check_compiler() -> str:
    """First line of the C++ compiler's version; stops on one that cannot compile torch's C++20 headers."""
    compiler = os.environ.get("CXX", "c++")
    run = lambda flag: subprocess.run([*shlex.split(compiler), flag], capture_output=True, text=True, check=True).stdout  # noqa: E731
    try:
        version, line = run("-dumpversion").strip(), run("--version").splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        stop(
            f"no C++ compiler ({compiler!r} does not run).\n"
            "  Debian/Ubuntu: apt-get install g++     Fedora: dnf install gcc-c++     or set CXX to yours."
        )
    oldest = 14 if "clang" in line else 11
    if int(version.split(".")[0]) < oldest:
        stop(f"torch's headers need C++20: g++ >= 11 or clang >= 14, got {line!r}. Set CXX to a newer one.")
    return line


def stop_without_torch() -> None:
    stop(
        "it compiles against torch, and there is none in this environment.\n"
        f"  First:  pip install '{TORCH_RANGE}'        (the newest build, with CUDA: several GB)\n"
        "  then:   pip install .                     (never replaces the torch that it finds)"
    )


torch = find_torch()
if torch is None:
    if not ASKED_FOR_REQUIREMENTS:
        stop_without_torch()
    setup(setup_requires=[TORCH_RANGE], install_requires=[TORCH_RANGE, *RUNTIME])
    sys.exit()

if not sys.platform.startswith("linux"):
    stop(f"only Linux is supported so far, this is {sys.platform}")
if not os.environ.get("CURVLAB_ANY_TORCH"):
    check_torch(torch)
if WANT_CUDA not in ("auto", "0", "1"):
    stop(f"CURVLAB_CUDA must be auto, 0 or 1, got {WANT_CUDA!r}")
CUDA_HOME = find_nvcc_home(torch)
CUDA_MAJOR = int((torch.version.cuda or "0").split(".")[0])
build_requirements: list[str] = []
if not CUDA_HOME and WANT_CUDA != "0":
    if CUDA_MAJOR >= 13:  # nvcc as wheels: a GPU machine then needs only a driver and g++
        build_requirements = [f"cuda-toolkit[nvcc,cccl]=={torch.version.cuda}.*"]
    if not ASKED_FOR_REQUIREMENTS:
        why = f"no nvcc for CUDA {torch.version.cuda}" if CUDA_MAJOR else "this torch is a CPU build"
        if WANT_CUDA == "1":
            stop(f"CURVLAB_CUDA=1, but {why}")
        print(f"curvlab: {why}: building the CPU kernels only", file=sys.stderr)
if CUDA_HOME:
    os.environ["CUDA_HOME"] = CUDA_HOME  # before importing cpp_extension, which reads it once
    if not os.environ.get("TORCH_CUDA_ARCH_LIST") and not torch.cuda.is_available():
        os.environ["TORCH_CUDA_ARCH_LIST"] = "8.0;9.0+PTX"

from torch.utils.cpp_extension import BuildExtension, include_paths, library_paths  # noqa: E402


def cuda_architectures() -> str:
    """What nvcc compiles for: ``TORCH_CUDA_ARCH_LIST``, or the GPUs of this machine."""
    if listed := os.environ.get("TORCH_CUDA_ARCH_LIST"):
        return listed
    found = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    return ";".join(f"{major}.{minor}" for major, minor in sorted(found))


def build_facts() -> str:
    """What a bug report needs about this build, as JSON; ``python -m curvlab`` prints it."""
    return json.dumps(
        {
            "torch": torch.__version__,
            "compiler": "" if ASKED_FOR_REQUIREMENTS else check_compiler(),
            "flags": " ".join(f for f in CXX_FLAGS if not f.startswith("-ffile-prefix-map")),
            "instruction_sets": list(ISA_FLAGS) if X86 else ["default"],
            "cuda": torch.version.cuda if CUDA_HOME else None,
            "cuda_architectures": cuda_architectures() if CUDA_HOME else None,
        }
    )


class Build(BuildExtension):
    """Ninja, with one object per instruction set: csrc/cpu_<isa>.cpp is the same source under other flags."""

    def build_extension(self, ext: Extension) -> None:
        """Compile the objects that need their own flags, then the rest."""
        if ext.name == "curvlab._C":
            for isa in ISA_FLAGS if X86 else ["default"]:
                capability = [f"-DCURVLAB_CPU_CAPABILITY={isa.upper()}", f"-DCURVLAB_CPU_CAPABILITY_{isa.upper()}"]
                ext.extra_objects += self.compiler.compile(
                    [f"csrc/cpu_{isa}.cpp"],
                    output_dir=self.build_temp,
                    include_dirs=ext.include_dirs,
                    extra_postargs={"cxx": [*CXX_FLAGS, *capability, *ISA_FLAGS[isa]], "nvcc": []},
                )
        kernels = [source for source in ext.sources if source.endswith(".cu")]
        if kernels:  # <op>_cuda.cu and <op>_cuda.cpp: their objects would have one name in one folder
            ext.sources = [source for source in ext.sources if source not in kernels]
            ext.extra_objects += self.compiler.compile(
                kernels,
                output_dir=os.path.join(self.build_temp, "kernels"),
                include_dirs=ext.include_dirs,
                extra_postargs={"cxx": CXX_FLAGS, "nvcc": NVCC_FLAGS},
            )
        super().build_extension(ext)


def extension(name: str, sources: list[str], libraries: list[str], *, device: str = "cpu", **more: list) -> Extension:
    return Extension(
        f"curvlab.{name}",
        sorted(sources),
        language="c++",
        libraries=libraries,
        library_dirs=library_paths(device),
        include_dirs=[os.path.abspath("csrc"), *include_paths(device)],
        extra_link_args=["-fopenmp", "-Wl,--as-needed", "-s"],
        define_macros=[("MULTI_ISA", "1")] if X86 else [],
        extra_compile_args={"cxx": CXX_FLAGS + more.get("cxx", []), "nvcc": NVCC_FLAGS},
    )


def extensions() -> list[Extension]:
    if not ASKED_FOR_REQUIREMENTS:
        check_compiler()
    cuda_sources = glob.glob("csrc/*/*_cuda.cpp") + glob.glob("csrc/*/*_cuda.cu")
    cpu_sources = [f for f in glob.glob("csrc/*/*.cpp") if f not in cuda_sources] + ["csrc/library.cpp"]
    facts = f"-DCURVLAB_BUILD_FACTS={json.dumps(build_facts())}"
    found = [
        extension("_C", cpu_sources, ["c10", "torch_cpu"]),
        extension("_host", ["csrc/host.cpp"], ["c10", "torch_cpu", "torch_python"], cxx=[facts]),
    ]
    if CUDA_HOME:  # NVIDIA's wheels carry no libcudart.so link
        folders = library_paths("cuda")
        plain = any(os.path.exists(os.path.join(d, "libcudart.so")) for d in folders)
        runtime = "cudart" if plain else f":libcudart.so.{CUDA_MAJOR}"
        found.append(extension("_C_cuda", cuda_sources, ["c10", "torch_cpu", "c10_cuda", runtime], device="cuda"))
    return found


setup(
    ext_modules=extensions(),
    cmdclass={"build_ext": Build},
    # Only where pip asks: run directly, setuptools would fetch them into the checkout.
    setup_requires=build_requirements if ASKED_FOR_REQUIREMENTS else [],
    install_requires=[f"torch=={'.'.join(torch.__version__.split('.')[:2])}.*", *RUNTIME],
    # One build folder per torch: else a module left by another torch's build would ride along in the wheel.
    options={"build": {"build_base": f"build/torch-{torch.__version__}"}},
)
