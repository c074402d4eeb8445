"""The CUDA sources compile without a GPU and without torch, and no kernel spills registers."""

import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CSRC = ROOT / "csrc"
SOURCES = sorted((CSRC / "cuda").glob("**/*.cu"))
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
ARCHS = ("90a", "80")

pytestmark = pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")


@pytest.fixture(scope="module", params=ARCHS)
def objects(request, tmp_path_factory):
    """Compile every source for one architecture, two at a time: {object file: compiler output}.

    There is no torch on the include path, so a torch header in a ``.cu`` file is an error here.
    """
    arch, folder = request.param, tmp_path_factory.mktemp("cuda")

    def build(source):
        target = folder / f"{source.stem}.o"
        flags = ["-O3", f"-gencode=arch=compute_{arch},code=sm_{arch}", "-Xptxas", "-v"]
        flags += ["-Xcompiler", "-fPIC,-fvisibility=hidden"]
        command = [NVCC, *flags, "-I", str(CSRC), "-c", str(source), "-o", str(target)]
        done = subprocess.run(command, capture_output=True, text=True)
        output = done.stdout + done.stderr
        assert done.returncode == 0, f"{source.name} for sm_{arch}:\n{output[-3000:]}"
        return target, output

    with ThreadPoolExecutor(2) as pool:
        return dict(pool.map(build, SOURCES))


def test_no_kernel_spills_registers(objects):
    spilled, kernels = [], 0
    for output in objects.values():
        for name, stores, loads in re.findall(
            r"Function properties for (\S+)\n.*?(\d+) bytes spill stores, (\d+) bytes spill loads",
            output,
        ):
            kernels += 1
            if stores != "0" or loads != "0":
                spilled.append(f"{name}: {stores} + {loads} bytes")
    assert kernels > 50, "the compiler's report was not understood"
    assert not spilled, "\n".join(spilled)


def test_no_warpgroup_mma_is_serialized(objects):
    """ptxas says so with C75xx when registers in use keep MMAs from overlapping."""
    for target, output in objects.items():
        assert "wgmma.mma_async instructions are serialized" not in output, target.name


def test_no_warpgroup_mma_loses_its_registers(objects):
    """ptxas moves register copies to before the wait for the MMA that still reads the register."""
    pytest.importorskip("triton", reason="its cuobjdump disassembles")
    if not any("sm_90a" in output for output in objects.values()):
        pytest.skip("no warpgroup MMA on this architecture")
    tool = ROOT / "benchmarks/ladder/cuda/mma_hazards.py"
    done = subprocess.run([sys.executable, tool, *objects], capture_output=True, text=True)
    assert "instructions, 0 hazards" in done.stdout, done.stderr
    assert done.returncode == 0, done.stdout


def test_objects_hold_no_torch_symbol(objects):
    for target in objects:
        names = subprocess.run(["nm", "-C", target], capture_output=True, text=True, check=True)
        assert "aqlm::" in names.stdout, target.name
        for symbol in ("torch", "c10::", "at::"):
            assert symbol not in names.stdout, f"{target.name} refers to {symbol}"
