"""Run the CPU kernel tests under the address and undefined-behaviour sanitizers.

    python tests/sanitize_cpu.py [pytest arguments]

Builds ``_cpu`` with -fsanitize=address,undefined in a temporary folder and runs
tests/test_kernels_cpu.py, test_kernels_cpu_rotated.py and test_generation_ops.py against that
build. Any report ends the run with a failure (add ``-s`` to see it: pytest keeps what a dying
process printed).
"""

import os
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pybind11

ROOT = Path(__file__).resolve().parent.parent
FLAGS = ["-O1", "-g", "-fopenmp", "-fPIC", "-fvisibility=hidden", "-fno-omit-frame-pointer"]
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]

RUN = """
import importlib.util, sys, torch
spec = importlib.util.spec_from_file_location("aqlm_infer._cpu", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
sys.modules["aqlm_infer._cpu"] = module
import pytest
sys.exit(pytest.main(sys.argv[2:]))
"""


def build(folder: Path) -> Path:
    headers = (ROOT / "csrc", pybind11.get_include(), sysconfig.get_path("include"))
    includes = [f"-I{p}" for p in headers]
    sources = [ROOT / "csrc/bindings_cpu.cpp", *sorted((ROOT / "csrc/cpu").glob("*.cpp"))]

    def compile_one(source: Path) -> str:
        target = str(folder / f"{source.stem}.o")
        subprocess.run(
            ["g++", "-c", *FLAGS, *SANITIZE, *includes, str(source), "-o", target], check=True
        )
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, sources))
    module = folder / "_cpu.so"
    subprocess.run(["g++", "-shared", *FLAGS, *SANITIZE, *objects, "-o", str(module)], check=True)
    return module


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        module = build(Path(folder))
        # libstdc++ beside libasan: the interceptor of `throw` must find the real one at start.
        libraries = (
            subprocess.check_output(["g++", f"-print-file-name={name}"], text=True).strip()
            for name in ("libasan.so", "libstdc++.so")
        )
        environment = {
            **os.environ,
            "LD_PRELOAD": " ".join(libraries),
            "ASAN_OPTIONS": "detect_leaks=0",
            "UBSAN_OPTIONS": "print_stacktrace=1",
        }
        names = ("kernels_cpu", "kernels_cpu_rotated", "generation_ops")
        tests = [str(ROOT / "tests" / f"test_{name}.py") for name in names]
        options = ["-p", "no:cacheprovider", "-m", "not gpu"]
        command = [sys.executable, "-c", RUN, str(module), *tests, *options]
        return subprocess.run([*command, *sys.argv[1:]], env=environment, cwd=ROOT).returncode


if __name__ == "__main__":
    sys.exit(main())
