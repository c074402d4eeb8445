"""Build logic only: the native modules ``_cpu`` and ``_cuda``; metadata is in pyproject.toml.

AQLM_BUILD=auto (default): ``_cpu``, and ``_cuda`` when torch has CUDA and nvcc is found
AQLM_BUILD=cpu:            ``_cpu`` alone, version tag +cpu
AQLM_BUILD=cuda:           ``_cuda`` alone, needs nvcc but no GPU and no CUDA in torch; one wheel
                           for every Python >= 3.10 (limited API), torch >= 2.10 (stable ABI)
Also read, by torch: TORCH_CUDA_ARCH_LIST, MAX_JOBS, NVCC_THREADS, CUDA_HOME. No others.
"""

import os
import re
import runpy
import subprocess
from pathlib import Path

import torch
from setuptools import Extension, find_packages, setup
from torch.utils import cpp_extension

ROOT = Path(__file__).parent
VERSION = runpy.run_path(str(ROOT / "aqlm_infer" / "version.py"))["__version__"]
ARCHS = "8.0;8.6;8.9;9.0a;10.0;12.0"

# A CPU-only torch does not look for the toolkit, and its builder asks this variable for nvcc.
TOOLKIT = os.environ.get("CUDA_HOME", "/usr/local/cuda")
if cpp_extension.CUDA_HOME is None and Path(TOOLKIT, "bin", "nvcc").exists():
    cpp_extension.CUDA_HOME = TOOLKIT
CUDA_HOME = cpp_extension.CUDA_HOME

BUILD = os.environ.get("AQLM_BUILD", "auto")
if BUILD not in ("auto", "cpu", "cuda"):
    raise SystemExit(f"AQLM_BUILD={BUILD!r} is not one of auto, cpu, cuda")
if BUILD == "cuda" and CUDA_HOME is None:
    raise SystemExit(f"AQLM_BUILD=cuda: no nvcc in {TOOLKIT}; set CUDA_HOME to the CUDA toolkit")
WITH_CUDA = BUILD == "cuda" or (BUILD == "auto" and bool(torch.version.cuda and CUDA_HOME))


def sources(*patterns: str) -> list[str]:
    found = sorted(p for pattern in patterns for p in ROOT.glob(pattern))
    return [str(p.relative_to(ROOT)) for p in found]


def cpu_extension() -> Extension:
    """Torch-free: a plain Extension, so that it links no torch library."""
    import pybind11

    return Extension(
        "aqlm_infer._cpu",
        sources("csrc/bindings_cpu.cpp", "csrc/cpu/*.cpp"),
        include_dirs=["csrc", pybind11.get_include()],
        depends=sources("csrc/cpu/*.h", "csrc/common/*"),
        extra_compile_args=["-O3", "-g0", "-fopenmp", "-fvisibility=hidden"],
        extra_link_args=["-fopenmp", "-s"],
        language="c++",
    )


def cuda_extension() -> Extension:
    """Stable ABI, limited API, static CUDA runtime: a CPU-only torch will do to build it."""
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", ARCHS)
    return Extension(
        "aqlm_infer._cuda",
        sources("csrc/ops_cuda*.cpp", "csrc/cuda/*.cu", "csrc/cuda/instances/*.cu"),
        include_dirs=["csrc", *cpp_extension.include_paths(), f"{CUDA_HOME}/include"],
        depends=sources("csrc/*.h", "csrc/cuda/**/*.cuh", "csrc/cuda/**/*.h", "csrc/cuda/**/*.inl"),
        define_macros=[("USE_CUDA", None), ("TORCH_TARGET_VERSION", "0x020a000000000000")],
        extra_compile_args={
            "cxx": ["-O2", "-g0", "-fvisibility=hidden"],
            "nvcc": ["-O3", "-Xcompiler", "-fvisibility=hidden"],
        },
        library_dirs=[*cpp_extension.library_paths(), f"{CUDA_HOME}/lib64"],
        libraries=["torch_cpu", "c10", "cudart_static", "rt", "dl", "pthread"],
        extra_link_args=["-s"],
        py_limited_api=True,
        language="c++",
    )


class Build(cpp_extension.BuildExtension):
    """Compiles anew what is older than a header. torch's rules for nvcc follow headers only where
    torch itself has CUDA; objects of before and after a change once made a wheel together."""

    def build_extensions(self) -> None:
        for extension in self.extensions:
            changed = max(Path(header).stat().st_mtime for header in extension.depends)
            for source in extension.sources:
                made = Path(self.build_temp, source).with_suffix(".o")
                if made.exists() and made.stat().st_mtime < changed:
                    made.unlink()
        super().build_extensions()


def local_tag() -> str:
    """+cpu or +cu130 on built wheels; a development install has none."""
    if BUILD != "cuda":
        return "+cpu" if BUILD == "cpu" else ""
    nvcc = subprocess.check_output([f"{CUDA_HOME}/bin/nvcc", "--version"], text=True)
    return "+cu" + "".join(re.search(r"release (\d+)\.(\d+)", nvcc).groups())


setup(
    version=VERSION + local_tag(),
    packages=[*find_packages(include=["aqlm_infer*"]), "aqlm_infer.triton_kernels"],
    package_dir={"aqlm_infer.triton_kernels": "triton_kernels"},
    package_data={
        "aqlm_infer": ["py.typed", "*.pyi"],
        "aqlm_infer.triton_kernels": ["configs/*.json"],
    },
    ext_modules=[
        *([cpu_extension()] if BUILD != "cuda" else []),
        *([cuda_extension()] if WITH_CUDA else []),
    ],
    cmdclass={"build_ext": Build.with_options(use_ninja=True)},
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if BUILD == "cuda" else {},
)
