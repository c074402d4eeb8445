"""Two ranks (gloo on the CPU, NCCL on two GPUs) against one: the same steps, checkpoints that both
load."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_training_cli import arguments, call, files  # noqa: F401
from tuning_worker import prepared

from aqlm_infer.training.parallel import Parallel

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]
ROOT = Path(__file__).parents[1]


TWO_GPUS = pytest.param(
    "cuda",
    marks=[
        pytest.mark.gpu,
        pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
    ],
)


def launch(command: list[str], folder: Path, ranks: int = 2) -> list[str]:
    """Run the command as every rank, in a folder from which nothing of the checkout is imported;
    their outputs, once all have ended well."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    started = []
    for rank in range(ranks):
        environment = {
            **os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(
                [*filter(None, [os.environ.get("PYTHONPATH")]), str(ROOT), str(ROOT / "tests")]
            ),
        }  # fmt: skip
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen(command, env=environment, cwd=folder, **pipes))
    outputs = []
    for process in started:
        out, err = process.communicate(timeout=180)
        assert process.returncode == 0, err[-3000:]
        outputs.append(out)
    return outputs


def state_of(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of the newest checkpoint, from every rank's file."""
    parts = sorted(max(folder.glob("step-*")).glob("state-*.safetensors"))
    return {n: t for part in parts for n, t in load_file(part).items()}


def assert_near(one: dict, two: dict) -> None:
    """Equal codes but for near ties, and values within what another order of sums explains."""
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        if name.endswith("codes"):
            assert (tensor == two[name]).double().mean() > 0.995, name
        else:
            error = (tensor - two[name]).norm() / tensor.norm().clamp_min(1e-12)
            assert error < 2e-3, f"{name}: {error:.1e}"


CASES = {
    "additive": {
        "scheme": "aqlm-2x4-g8", "method": "pv", "code_lr": 1.0, "microbatch": 1, "tied": True,
    },
    "rotated": {"scheme": "quip-e8p-2bit", "method": "pv-ste", "code_lr": 0.2, "warm_up": False},
}  # fmt: skip


@pytest.mark.parametrize("device", ["cpu", TWO_GPUS])
def test_two_ranks_equal_one_and_exchange_checkpoints(tmp_path, device):
    results = {}
    for name, case in CASES.items():
        given = {**case, "folder": tmp_path / f"{name}-1", "steps": 4, "device": device}
        trainer, _ = prepared(given)
        results[name] = trainer.run()
    for folder in ("longer-1", "onto-2"):
        shutil.copytree(tmp_path / "additive-1", tmp_path / folder)
    runs = [{**case, "folder": str(tmp_path / f"{name}-2"), "steps": 4}
            for name, case in CASES.items()]  # fmt: skip
    longer = {**CASES["additive"], "steps": 6, "resume": True}
    runs.append({**longer, "folder": str(tmp_path / "onto-2")})
    launch(
        [sys.executable, str(ROOT / "tests" / "tuning_worker.py"), json.dumps(runs), device],
        tmp_path,
    )

    for name, result in results.items():
        last = tmp_path / f"{name}-2" / "step-000004"
        written = sorted(f.name for f in last.iterdir())
        assert written == ["run.json", "state-0.safetensors", "state-1.safetensors"]
        assert_near(state_of(tmp_path / f"{name}-1"), state_of(tmp_path / f"{name}-2"))
        record = json.loads((last / "run.json").read_text())
        assert record["best"]["kl"] == pytest.approx(result.best["kl"], rel=1e-3)
        assert record["flips"] == pytest.approx(result.flips * 4, rel=0.05) and result.flips > 0

    # From step 4 to 6: one rank with its own checkpoint and with that of two, two with that of one.
    for folder in ("longer-1", "additive-2"):
        trainer, _ = prepared({**longer, "folder": tmp_path / folder, "device": device})
        trainer.run(resume=True)
    assert len(list((tmp_path / "additive-2" / "step-000006").glob("state-*"))) == 1
    for folder in ("additive-2", "onto-2"):
        assert_near(state_of(tmp_path / "longer-1"), state_of(tmp_path / folder))


@pytest.mark.parametrize("device", ["cpu", TWO_GPUS])
def test_tune_command_on_two_ranks(files, tmp_path, capfd, device):  # noqa: F811
    more = ("--method", "pv", "--code-lr", "1", "--json", "--device", device)
    more = (*more, "--compute", "float32")
    command = [sys.executable, "-m", "aqlm_infer"]
    outputs = launch([*command, *arguments(files, tmp_path / "two", *more)], tmp_path)
    status, alone, err = call(capfd, *arguments(files, tmp_path / "one", *more))
    assert status == 0, err
    assert not outputs[1]
    reports = [json.loads(outputs[0]), json.loads(alone)]
    for key in ("kl", "ppl"):
        assert reports[0]["final"][key] == pytest.approx(reports[1]["final"][key], rel=1e-3)
    pair = [load_file(tmp_path / n / "model.safetensors") for n in ("two", "one")]
    assert_near(*({n: t.float() for n, t in tensors.items()} for tensors in pair))


def test_owners_are_balanced():
    class Group(Parallel):
        def __init__(self, size):
            self.size = size

    sizes = {f"t{i}": 100 - i for i in range(40)}
    found = Group(3).owners(sizes)
    loads = [sum(sizes[n] for n, r in found.items() if r == rank) for rank in range(3)]
    assert max(loads) - min(loads) <= 100 and sum(loads) == sum(sizes.values())
    assert found == Group(3).owners(dict(reversed(sizes.items())))
