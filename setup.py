"""Build logic only: the native modules ``_cpu`` and ``_cuda``; metadata is in pyproject.toml.

AQLM_BUILD=auto|cpu|cuda (default auto: ``_cuda`` when nvcc is found). Also read, by torch:
TORCH_CUDA_ARCH_LIST, MAX_JOBS, NVCC_THREADS, CUDA_HOME. No others.
"""

import runpy
from pathlib import Path

from setuptools import Extension, find_packages, setup
from torch.utils.cpp_extension import BuildExtension

ROOT = Path(__file__).parent
VERSION = runpy.run_path(str(ROOT / "aqlm_infer" / "version.py"))["__version__"]


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


setup(
    version=VERSION,
    packages=[*find_packages(include=["aqlm_infer*"]), "aqlm_infer.triton_kernels"],
    package_dir={"aqlm_infer.triton_kernels": "triton_kernels"},
    package_data={"aqlm_infer": ["py.typed", "*.pyi"]},
    ext_modules=[cpu_extension()],
    cmdclass={"build_ext": BuildExtension.with_options(use_ninja=True)},
)
