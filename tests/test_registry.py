"""Kernel selection explains itself; importing the package stays light."""

import subprocess
import sys

import pytest
import torch

from aqlm_infer import KernelError, explain, parse_scheme, select
from aqlm_infer.backends import KERNELS, Problem
from aqlm_infer.backends.registry import register


def problem(**changes):
    base = {"format": parse_scheme("aqlm-2x8-g8"), "N": 64, "K": 64, "dtype": torch.float32}
    return Problem(**{**base, **changes})


def test_the_cheapest_that_fits_is_chosen():
    assert select(problem()).id == "cpu.additive.lut"
    assert select(problem(format=parse_scheme("aqlm-1x16-g8"))).id == "cpu.additive.direct"
    assert select(problem(dtype=torch.float64)).id == "ref.dequant"


def test_explain_gives_every_kernel_a_verdict():
    rows = explain(problem(precision="fast"))
    assert {r.kernel for r in rows} == set(KERNELS)
    assert rows[0].chosen and rows[0].kernel == "cpu.additive.lut" and rows[0].predicted_us > 0
    verdicts = {r.kernel: r.reason for r in rows}
    assert verdicts["cpu.additive.direct"] == "takes 9..16 bits, not 8"
    assert verdicts["ref.dequant"] == "precision 'fast' is not implemented (exact only)"


def test_no_kernel_lists_the_reasons():
    with pytest.raises(KernelError) as caught:
        select(problem(precision="int3"))
    for kernel in KERNELS:
        assert kernel in str(caught.value)
    assert "N=64 K=64 M=any float32 int3 on cpu" in str(caught.value)
    assert not any(r.chosen for r in explain(problem(precision="int3")))


def test_ids_are_unique():
    with pytest.raises(KernelError, match="registered twice"):
        register(KERNELS["ref.dequant"])


def test_import_is_light():
    code = (
        "import sys, aqlm_infer, torch;"
        "heavy = {'transformers', 'triton', 'accelerate', 'typer', 'rich', 'requests'};"
        "bad = heavy & set(sys.modules);"
        "assert not bad, bad;"
        "assert not torch.cuda.is_initialized()"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0 and run.stdout == "" and run.stderr == "", run.stderr


@pytest.mark.parametrize("gpu", [False, True])
def test_a_missing_native_module_is_explained(gpu):
    """Without _cpu everything still runs through the reference, and the registry says why; beside a
    GPU at the first use, since a layer that was made on the CPU may be on its way there."""
    code = (
        "import sys; sys.modules['aqlm_infer._cpu'] = None\n"
        "import torch, aqlm_infer\n"
        f"torch.cuda.is_available = lambda: {gpu}\n"
        "from aqlm_infer.backends import Problem, explain, select\n"
        "p = Problem(aqlm_infer.parse_scheme('aqlm-2x8-g8'), 64, 64, torch.float32)\n"
        "print(select(p).id)\n"
        "print([r.reason for r in explain(p) if r.kernel == 'cpu.additive.lut'][0])\n"
        "layer = aqlm_infer.QuantLinear.from_linear(torch.nn.Linear(8, 4), 'aqlm-1x2-g2')\n"
        "print('made', file=sys.stderr, flush=True)\n"
        "layer(layer(torch.ones(1, 8)).new_ones(1, 8))\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    texts = run.stderr.split("made")
    assert [text.count("slow reference kernel") for text in texts] == ([0, 1] if gpu else [1, 0])
    assert "is not built" in texts[gpu]
    chosen, reason = run.stdout.strip().splitlines()
    assert chosen == "ref.dequant"
    assert "aqlm_infer._cpu is not built" in reason and "pip install" in reason
