"""What is true of an installed wheel only: ``check_wheel.py`` runs this outside the source tree.

Not collected by ``make test``, where the package is the source tree itself.
"""

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import aqlm_infer
from aqlm_infer.backends import native

WHEEL = os.environ["WHEEL_UNDER_TEST"]
LOCAL = WHEEL.split("-")[1].partition("+")[2]
FOLDER = Path(aqlm_infer.__file__).parent
LM7 = Path(__file__).parents[1] / "examples" / "lm7"
cpu_wheel = pytest.mark.skipif(LOCAL != "cpu", reason="the wheel of the CUDA kernels")
cuda_wheel = pytest.mark.skipif(LOCAL == "cpu", reason="the wheel of the CPU kernels")


def program(*arguments) -> subprocess.CompletedProcess:
    """The console script that pip made."""
    command = [Path(sys.prefix, "bin", "aqlm-infer"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_the_package_is_the_installed_one():
    assert FOLDER.is_relative_to(sys.prefix)
    assert not (Path(__file__).parents[1] / "aqlm_infer").exists()
    assert importlib.metadata.version("aqlm_infer") == WHEEL.split("-")[1]
    files = importlib.metadata.files("aqlm_infer")
    assert {Path(f.locate()) for f in files if f.suffix == ".py"} == set(FOLDER.rglob("*.py"))
    assert not [f for f in FOLDER.rglob("*") if f.suffix in (".cpp", ".cu", ".cuh", ".h")]
    for name in ("tests", "triton_kernels", "benchmarks", "csrc"):
        assert not (FOLDER.parent / name).exists(), name


def test_pip_is_told_what_it_must_have():
    """pip refuses an older torch and an older Python by these."""
    found = importlib.metadata.metadata("aqlm_infer")
    assert "torch>=2.10" in found.get_all("Requires-Dist")
    assert found["Requires-Python"] == ">=3.10"


def test_import_loads_little():
    code = "import sys, aqlm_infer; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    loaded = set(done.stdout.split())
    assert "aqlm_infer.backends.native" in loaded
    assert not loaded & {"triton", "aqlm_infer.triton_kernels", "transformers", "matplotlib"}


@cpu_wheel
def test_there_is_one_openmp_runtime():
    """The wheel has no libgomp: its kernels run on torch's threads."""
    code = (
        "import aqlm_infer; print(*(l.split()[-1] for l in open('/proc/self/maps') if 'gomp' in l))"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    runtimes = {Path(p).resolve() for p in done.stdout.split() if "libgomp" in p}
    assert len(runtimes) == 1, runtimes
    assert Path(torch.__file__).resolve().parent in next(iter(runtimes)).parents


def test_info_names_the_modules():
    done = program("info", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    here, absent = ("_cpu", "_cuda") if LOCAL == "cpu" else ("_cuda", "_cpu")
    assert found["modules"][here] == {"loaded": True, "problem": None}
    assert "is not built" in found["modules"][absent]["problem"]
    assert "aqlm-infer" in program("info").stdout


@cpu_wheel
def test_every_instruction_set_is_in_the_wheel():
    found = json.loads(program("info", "--json").stdout)
    compiled = {isa for row in found["native_kernels"] for isa in row["isas"]}
    assert compiled == {"avx512vbmi", "avx512", "avx2", "portable"}
    assert found["cpu"]["isa"] in found["cpu"]["isas"] and "portable" in found["cpu"]["isas"]


@pytest.mark.parametrize(
    "device",
    [
        pytest.param("cpu", marks=cpu_wheel),
        pytest.param("cuda", marks=[cuda_wheel, pytest.mark.gpu]),
    ],
)
def test_quantize_evaluate_and_write(device, tmp_path):
    """The whole way of a user of the command line, on the 7M-parameter model."""
    out, on = tmp_path / "q", ("--device", device)
    done = program("quantize", LM7, "--scheme", "rtn-int4-g64", "--out", out, *on, "--json")
    assert done.returncode == 0, done.stderr
    found = []
    for model in (LM7, out):
        tokens = LM7.parent / "text" / "valid.bin"
        done = program("eval", model, "--tokens", tokens, "--windows", 4, *on, "--json")
        assert done.returncode == 0 and "slow reference" not in done.stderr, done.stderr
        found.append(json.loads(done.stdout)["ppl"])
    assert found[0] < found[1] < 1.5 * found[0]
    done = program("generate", out, "--prompt", "The old house", "--max-new-tokens", 8, *on)
    assert done.returncode == 0 and len(done.stdout.split()) > 3, done.stderr


def test_a_wrong_file_is_one_line(tmp_path):
    done = program("eval", tmp_path / "none", "--tokens", "x.bin")
    assert done.returncode == 1 and done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr and str(tmp_path / "none") in done.stderr


@cuda_wheel
def test_the_cuda_operators_are_registered():
    """The module loads with any torch that has the stable ABI, a GPU or none."""
    assert native.cuda is not None, native.cuda_problem
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    for name in ("additive_matmul", "e8p_matmul", "scalar_matmul", "hadamard"):
        assert has(f"aqlm_infer::{name}", "CUDA"), name


@cuda_wheel
def test_without_the_cpu_module_the_reference_runs_and_says_so():
    x = torch.randn(3, 64)
    with pytest.warns(UserWarning, match="_cpu is not built"):
        layer = aqlm_infer.QuantLinear.from_linear(torch.nn.Linear(64, 32), "aqlm-1x4-g8")
        y = layer(x)  # where there is a GPU the warning waits for a first use on the CPU
    expected = x.double() @ layer.weight.double().T + layer.bias.double()
    assert layer.kernel_id == "ref.dequant"
    torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-4)
