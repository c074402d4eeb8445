"""Files of a run, in a folder of its own: checkpoints to go on from, the best model, the log.

    step-000050/state-0.safetensors    codes, masters, buffers, optimiser state of rank 0
    step-000050/run.json               settings, step, the best evaluation so far
    best-000025-0.safetensors          codes and masters of the best evaluation, of rank 0
    log.jsonl                          one row a step, one an evaluation
    curves.png                         the log as a plot

Nothing is pickled. A checkpoint is written beside its place and renamed, and older ones go after
that: a kill at any moment leaves a whole one. Each rank writes what it owns; any number of ranks
reads all.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch.optim import Optimizer

from .parallel import Parallel
from .representation import TuningError
from .student import Student


def tensors_of(student: Student) -> dict[str, torch.Tensor]:
    """Codes and float32 masters of this rank (no buffers): all that an export needs."""
    owned = ((name, layer) for name, layer in student.layers.items() if layer.stack is not None)
    found = {f"{name}.codes": layer.codes for name, layer in owned}
    return found | {name: t for name, t, buffer in student.parameters() if not buffer}


@torch.no_grad()
def load_tensors(student: Student, tensors: Mapping[str, torch.Tensor]) -> None:
    """Put ``tensors_of`` back (buffers too, where they are there), and refresh the weights.

    ``tensors`` are those of all ranks.
    """
    for name, layer in student.layers.items():
        if layer.stack is not None:
            layer.codes.copy_(tensors[f"{name}.codes"])
    for name, tensor, buffer in student.parameters():
        if not buffer or name in tensors:
            tensor.copy_(tensors[name])
    student.refresh()


def _read(files: Iterable[Path]) -> dict[str, torch.Tensor]:
    """The tensors of all files."""
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def _under(tensors: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """The tensors whose names begin so, by the rest of their names."""
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def check_disk(folder: Path, student: Student) -> None:
    """Raise TuningError when the run's files would not fit beside what the folder holds already.

    At most there are two checkpoints (values with two moments, a LAMB buffer with one), two best
    models, and the tuned checkpoint, which is no larger than a best model.
    """
    moments = {True: 1 if student.settings.optimizer == "lamb" else 2, False: 2}
    sizes = [(t.numel() * t.element_size(), buffer) for _, t, buffer in student.parameters()]
    best = sum(t.numel() * t.element_size() for t in tensors_of(student).values())
    codes = best - sum(size for size, buffer in sizes if not buffer)
    checkpoint = codes + sum(size * (1 + moments[buffer]) for size, buffer in sizes)
    ranks = 1 if student.parallel is None else student.parallel.size  # owners are balanced
    needed = ranks * (2 * checkpoint + 3 * best)
    there = folder
    while not there.exists():
        there = there.parent
    free = shutil.disk_usage(there).free
    held = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
    if free + held < needed:
        raise TuningError(
            f"{there} has {free} bytes free, up to {needed - held} are needed for the run's files"
        )


class RunFolder:
    """The folder of one run, made when something is written.

    On several ranks all call every method alike; rank 0 writes what belongs to the whole run.
    """

    def __init__(self, folder: Path, parallel: Parallel | None = None):
        self.folder, self.parallel = folder, parallel
        self.rank = 0 if parallel is None else parallel.rank

    def _together(self) -> None:
        """Wait for the other ranks."""
        if self.parallel is not None:
            self.parallel.barrier()

    def checkpoints(self) -> list[Path]:
        """Whole checkpoints, oldest first."""
        return sorted(self.folder.glob("step-[0-9]*"))

    def require_new(self) -> None:
        """Raise TuningError when an interrupted run is there."""
        if self.checkpoints():
            raise TuningError(
                f"{self.folder} holds an interrupted run: --resume goes on with it, or remove it"
            )

    def start(self) -> None:
        """An empty log, and no other run's best model."""
        self._together()
        if self.rank == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.log.write_text("")
            for file in self.folder.glob("best-*"):
                file.unlink()
        self._together()

    @property
    def log(self) -> Path:
        return self.folder / "log.jsonl"

    def append(self, row: Mapping) -> None:
        """Add one row to the log."""
        if self.rank:
            return
        with self.log.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def rows(self) -> list[dict]:
        return [json.loads(line) for line in self.log.read_text().splitlines()]

    # -- checkpoints -------------------------------------------------------------------------------

    def save(self, student: Student, optimizer: Optimizer, run: Mapping) -> Path:
        """Write the checkpoint of ``run["step"]``, then drop older ones. Returns its folder."""
        state = tensors_of(student)
        for master in student.masters():
            state |= master.slices()
            for key, value in optimizer.state.get(master.parameter, {}).items():
                if value.dim():
                    each = master.slices(value)
                else:  # a count of steps, which a stack has in common
                    each = {name: value.clone() for name in master.names}
                state |= {f"optimizer.{name}.{key}": tensor for name, tensor in each.items()}
        place, draft = self.folder / f"step-{run['step']:06}", self.folder / "draft"
        self._together()
        if place.exists():
            return place
        self._together()
        if self.rank == 0:
            shutil.rmtree(draft, ignore_errors=True)  # of a save that was interrupted
            draft.mkdir()
        self._together()
        file = draft / f"state-{self.rank}.safetensors"
        save_file({n: t.contiguous() for n, t in state.items()}, file)
        self._together()
        if self.rank == 0:
            (draft / "run.json").write_text(json.dumps(run, indent=2) + "\n")
            os.rename(draft, place)
            for other in self.checkpoints():
                if other != place:
                    shutil.rmtree(other)
            best = self._best(run["best"]["step"])
            for old in set(self.folder.glob("best-*")) - set(self.folder.glob(f"{best}-*")):
                old.unlink()
        self._together()
        return place

    def load(self, student: Student, optimizer: Optimizer) -> dict:
        """Restore the newest checkpoint; returns its run record. The log is cut to its step.

        Raises TuningError when there is none, or when its tensors are not the student's.
        """
        run = self.peek()
        state = _read(self.checkpoints()[-1].glob("state-*.safetensors"))
        wanted = set(tensors_of(student)) | {name for name, _, _ in student.parameters()}
        found = {name for name in state if not name.startswith("optimizer.")}
        if wanted - found or (self.parallel is None and found - wanted):
            name = min(wanted ^ found)
            raise TuningError(f"{self.folder} is a run of another model: {name} is in one only")
        load_tensors(student, state)
        for master in student.masters():
            held = [_under(state, f"optimizer.{name}.") for name in master.names]
            if not held[0]:
                continue
            device, found = master.parameter.device, {}
            for key, first in held[0].items():
                if not first.dim():  # counts of steps stay on the CPU: both optimisers have them so
                    found[key] = first
                elif master.stacked:
                    found[key] = torch.stack([one[key] for one in held]).to(device)
                else:
                    found[key] = first.to(device)
            optimizer.state[master.parameter] = found
        if self.rank == 0:
            rows = [json.dumps(row) for row in self.rows() if row["step"] <= run["step"]]
            self.log.write_text("".join(f"{row}\n" for row in rows))
        return run

    def peek(self) -> dict:
        """The run record of the newest checkpoint."""
        if not self.checkpoints():
            raise TuningError(f"{self.folder} holds no checkpoint to resume")
        return json.loads((self.checkpoints()[-1] / "run.json").read_text())

    def finish(self) -> None:
        """Drop checkpoints and the best model: the log stays."""
        for entry in (*self.checkpoints(), self.folder / "draft"):
            shutil.rmtree(entry, ignore_errors=True)
        for file in (*self.folder.glob("best-*"), *self.folder.glob("draft-*")):
            file.unlink(missing_ok=True)

    # -- the best model ----------------------------------------------------------------------------

    def _best(self, step: int) -> str:
        """What the names of that model's files begin with."""
        return f"best-{step:06}"

    def save_best(self, student: Student, step: int) -> None:
        """Keep the model of this step."""
        self._together()
        if self.rank == 0:
            for file in self.folder.glob(f"{self._best(step)}-*"):
                file.unlink()
        self._together()
        draft = self.folder / f"draft-{self.rank}.safetensors"
        save_file({n: t.contiguous() for n, t in tensors_of(student).items()}, draft)
        os.replace(draft, self.folder / f"{self._best(step)}-{self.rank}.safetensors")
        self._together()

    def load_best(self, student: Student, step: int) -> None:
        """Put the model kept at this step back into the student."""
        load_tensors(student, _read(self.folder.glob(f"{self._best(step)}-*")))
