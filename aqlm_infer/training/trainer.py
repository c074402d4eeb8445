"""The training loop: accumulate a batch's gradient, step, evaluate, keep the best, save."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from .data import Order
from .loss import ChunkedLoss, check_split, default_chunk, score_means, score_sums
from .modes import recompute_blocks, reproducible
from .optimizers import make_optimizer, set_rate
from .representation import TuningError
from .runs import RunFolder
from .settings import TuneSettings
from .student import Student
from .vstep import Moved

RESUMABLE = ("steps", "patience", "save_every")
"""Settings that a resumed run may change: what was computed so far does not depend on them (but
on the steps where learning rates fall)."""


@dataclass(frozen=True)
class TuneResult:
    """A finished run. ``first`` and ``best`` are evaluations: ``step``, ``nll``, ``ppl`` and,
    with a teacher, ``kl`` and ``top1``; ``flips`` is the mean fraction of groups a step."""

    steps: int
    stopped: str
    first: dict[str, float]
    best: dict[str, float]
    flips: float
    epochs: float
    seconds: float


class NotFinite(RuntimeError):
    """A loss or gradient that is not finite; the message says where, and what was kept."""


class Trainer:
    """Tunes a student.

    Args:
        student: changed in place; on several ranks, so is the teacher.
        teacher: dense model on the same device, or None for the loss "ce".
        train, valid: windows [n, L], int64.
        settings: of the run.
        folder: of its checkpoints and log.
        progress: whether to show a progress bar.

    Raises TuningError when models, data and settings do not go together.
    """

    def __init__(
        self,
        student: Student,
        teacher: nn.Module | None,
        train: torch.Tensor,
        valid: torch.Tensor,
        settings: TuneSettings,
        folder: RunFolder,
        progress: bool = False,
    ):
        if (teacher is None) != (settings.loss == "ce"):
            raise TuningError(f"loss={settings.loss!r} with{'out' * (teacher is None)} a teacher")
        self.student, self.teacher, self.settings = student, teacher, settings
        self.train, self.valid = train, valid[: settings.valid_windows]
        self.folder, self.progress = folder, progress
        self.order = Order(len(train), settings.batch, settings.seed)
        self.parallel = student.parallel
        self.rank, self.size = 0, 1
        if self.parallel is not None:
            self.rank, self.size = self.parallel.rank, self.parallel.size
            if teacher is not None:
                self.parallel.shard_blocks(teacher)
        self.device = next(student.model.parameters()).device
        vocabulary = student.model.get_output_embeddings().weight.shape[0]
        self.chunk = settings.chunk or default_chunk(vocabulary, self.device)
        self.loss = ChunkedLoss(student.model, teacher, self.chunk)
        self.micro = settings.microbatch or max(1, settings.batch // self.size)
        if settings.batch % (self.size * self.micro):
            raise TuningError(
                f"batch={settings.batch} is not made of microbatches of {self.micro} on"
                f" {self.size} devices"
            )
        self.optimizer = make_optimizer(student, settings)
        student.model.eval()
        if settings.gradient_checkpointing:
            recompute_blocks(student.model)
        if teacher is not None:
            teacher.eval().requires_grad_(False)
        ids = train[:1].to(self.device)
        student.run(lambda: check_split(student.model, ids, "student"))
        if teacher is not None:
            check_split(teacher, ids, "teacher")

    # -- one step ----------------------------------------------------------------------------------

    def _gradients(self, step: int) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
        """Forward and backward over the step's batch: the part of the mean loss that each
        microbatch has, and the student's gradients."""
        windows = self.train[self.order[step]]
        tokens = self.loss.scored(*windows.shape)
        losses = []
        for ids in windows.chunk(self.size)[self.rank].split(self.micro):
            ids = ids.to(self.device)
            with reproducible(self.device):
                loss = self.student.run(lambda ids=ids: self.loss(ids)) / tokens
                (loss * self.size).backward()  # FSDP2 takes the mean over ranks
            losses.append(loss.detach())
        return losses, self.student.gradients()

    def _checked(self, step: int, losses: list[torch.Tensor], norms: dict) -> float:
        """The loss of the whole batch. Raises NotFinite; what the student holds is then lost."""
        found = torch.stack([x.float() for x in (*losses, *norms.values())]).tolist()
        where = f"on rank {self.rank} at step {step + 1}"
        bad = [
            f"the loss is {value} in microbatch {number} {where}"
            for number, value in enumerate(found[: len(losses)])
            if not math.isfinite(value)
        ]
        bad += [
            f"the gradient of {name} has norm {value} {where}"
            for name, value in zip(norms, found[len(losses) :], strict=True)
            if not math.isfinite(value)
        ]
        return self._total(sum(found[: len(losses)]), bad[0] if bad else "")

    def _total(self, loss: float, trouble: str) -> float:
        """The loss summed over ranks, which all stop where one is in ``trouble``."""
        found = [trouble]
        if self.parallel is not None:
            totals = torch.tensor([loss, float(bool(trouble))], dtype=torch.float64)
            loss, troubled = self.parallel.sum(totals.to(self.device)).tolist()
            if troubled:
                found = self.parallel.gather_text(trouble)
        for text in found:
            if text:
                self._stop(text)
        return loss

    def _stop(self, what: str) -> None:
        kept = self.folder.checkpoints()
        where = f"the last good checkpoint is {kept[-1]}" if kept else "no step was saved yet"
        raise NotFinite(f"{what}; {where}, and the best model so far is beside it")

    def _step(self, step: int) -> dict:
        """One optimiser step and V step; the row of the log."""
        losses, gradients = self._gradients(step)
        norms = dict(zip(gradients, torch._foreach_norm(list(gradients.values())), strict=True))
        set_rate(self.optimizer, self.settings.rate(step))
        moved = self.student.update(gradients, self.optimizer, step + 1)
        loss = self._checked(step, losses, norms)  # the first wait for the device
        return {"kind": "step", "step": step + 1, "loss": loss, **self._movement(moved)}

    def _movement(self, moved: Sequence[Moved]) -> dict[str, float]:
        """Flips as a fraction of all groups, norms relative to |What|, the trust region's use."""
        if self.student.choice is None:
            return {"flips": 0.0}
        limit = self.settings.rule.trust_ratio
        sums = [0.0] * 5  # flips, changes^2, residuals^2, sizes^2, shares of the trust region
        if moved:
            each = torch.cat(
                [torch.stack([m.flips, m.moved, m.residual, m.size], 1) for m in moved]
            ).tolist()
            shares = [math.sqrt(m / s) / limit if limit and s else 0.0 for _, m, _, s in each]
            sums = [sum(column) for column in (*zip(*each, strict=True), shares)]
        if self.parallel is not None:
            totals = torch.tensor(sums, dtype=torch.float64, device=self.device)
            sums = self.parallel.sum(totals).tolist()
        flips, change, residual, size, shares = sums
        groups = sum(layer.groups for layer in self.student.layers.values())
        found = {
            "flips": flips / groups,
            "moved": math.sqrt(change / size) if size else 0.0,
            "drift": math.sqrt(residual / size) if size else 0.0,
        }
        if limit:
            found["budget"] = shares / len(self.student.layers)
        return found

    # -- the run -----------------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """``score`` of the student on the validation windows, with ``ppl``."""
        model, chunk = self.student.model, self.chunk
        mine = self.valid[self.rank :: self.size]
        sums = torch.zeros(3, dtype=torch.float64, device=self.device)
        for start in range(0, -(-len(self.valid) // self.size), self.micro):
            group = mine[start : start + self.micro]
            # A rank that is through computes along: the others need its part of the weights.
            ids = (group if len(group) else self.valid[:1]).to(self.device)
            found = self.student.run(lambda ids=ids: score_sums(model, self.teacher, ids, chunk))
            sums += found * bool(len(group))
        if self.parallel is not None:
            self.parallel.sum(sums)
        found = score_means(sums, *self.valid.shape, self.teacher is not None)
        bad = {k: v for k, v in found.items() if not math.isfinite(v)}
        if bad:
            self._stop(f"validation found {bad}")
        return {**found, "ppl": math.exp(min(found["nll"], 700))}

    def run(self, resume: bool = False) -> TuneResult:
        """Train to the end, an early stop or an error; the student then holds the best model.

        With ``resume`` from the folder's newest checkpoint: the result is that of an undisturbed
        run, bit for bit on the same machine.
        """
        start = time.perf_counter()
        record = self._resume() if resume else self._begin()
        stopped = "steps"
        shown = tqdm(
            total=self.settings.steps, initial=record["step"], desc="tune", unit="step",
            disable=not self.progress or self.rank > 0,
        )  # fmt: skip
        with shown as bar:
            while record["step"] < self.settings.steps:
                if self.settings.patience and record["worse"] >= self.settings.patience:
                    stopped = "patience"
                    break
                row = self._step(record["step"])
                record["step"] = step = row["step"]
                record["flips"] += row["flips"]
                self.folder.append({**row, "seconds": round(time.perf_counter() - start, 3)})
                if step % self.settings.eval_every == 0 or step == self.settings.steps:
                    self._judge(record)
                if step % self.settings.save_every == 0 or step == self.settings.steps:
                    self.folder.save(self.student, self.optimizer, record)
                bar.update()
                best = record["best"]
                bar.set_postfix(loss=f"{row['loss']:.4f}", ppl=f"{best['ppl']:.2f}@{best['step']}")
        self.folder.save(self.student, self.optimizer, record)
        self.folder.load_best(self.student, record["best"]["step"])
        return TuneResult(
            steps=record["step"],
            stopped=stopped,
            first=record["first"],
            best=record["best"],
            flips=record["flips"] / max(1, record["step"]),
            epochs=self.order.epochs(record["step"]),
            seconds=time.perf_counter() - start,
        )

    def _begin(self) -> dict:
        self.folder.require_new()
        self.folder.start()
        record = {"step": 0, "flips": 0.0, "worse": 0, "windows": self._digest()}
        record["settings"] = asdict(self.settings)
        self._judge(record)
        self.folder.save(self.student, self.optimizer, record)
        return record

    def _judge(self, record: dict) -> None:
        """Evaluate; keep the model when it is the best so far (ties go to the earlier)."""
        found = {"step": record["step"], **self.evaluate()}
        metric = "kl" if self.teacher is not None else "nll"
        better = "best" not in record or found[metric] < record["best"][metric]
        if better:
            self.folder.save_best(self.student, record["step"])
            record["best"] = found
        record.setdefault("first", found)
        record["worse"] = 0 if better else record["worse"] + 1
        self.folder.append({"kind": "eval", **found, "best": better})

    def _resume(self) -> dict:
        record = self.folder.peek()
        check_same(record["settings"], self.settings, self.folder.folder)
        if record["windows"] != self._digest():
            raise TuningError(f"{self.folder.folder} is a run on other tokens")
        return self.folder.load(self.student, self.optimizer)

    def _digest(self) -> str:
        """Hash of the training and validation windows."""
        digest = hashlib.sha256()
        for windows in (self.train, self.valid):
            digest.update(windows.contiguous().numpy())
        return digest.hexdigest()


def check_same(saved: Mapping, settings: TuneSettings, folder: Path) -> None:
    """Raise TuningError when a resumed run would differ in more than ``RESUMABLE``."""
    for name, value in asdict(settings).items():
        before = saved.get(name)
        value = list(value) if isinstance(value, tuple) else value
        free = name in RESUMABLE and (name != "steps" or settings.final_lr == 1)
        if not free and before != value:
            raise TuningError(f"{folder} is a run with {name}={before}, not {value}")
