"""The loss, in chunks of tokens whose logits are never all there at once.

    kl    mean over all tokens of KL(teacher || student), temperature 1, softmax in float32
    ce    mean negative log-likelihood of every token but the first of a window

Both trunks run to their last hidden state; then, chunk by chunk, the heads and the loss. A chunk's
gradient is known with its loss and taken back through the head at once, so that its logits are made
once and go again.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from .representation import TuningError

LOGITS = {"cpu": 1 << 23, "cuda": 1 << 27}
"""Logits of a chunk: on a GPU it must be many launches' worth of work (1.5 GB while it lasts)."""


def default_chunk(vocabulary: int, device: torch.device) -> int:
    """Tokens whose logits exist at once, where no setting says it."""
    return max(1, LOGITS[device.type] // vocabulary)


def hidden_states(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Last hidden state of a causal language model, [windows * tokens, width]."""
    output = model.get_decoder()(input_ids=ids, use_cache=False)
    return output.last_hidden_state.flatten(0, 1)


@torch.no_grad()
def check_split(model: nn.Module, ids: torch.Tensor, what: str) -> None:
    """Raise TuningError unless the model's logits are its head on its last hidden state.

    Some architectures scale or cap logits after the head; ``what`` names the model.
    """
    whole = model(input_ids=ids, use_cache=False).logits.flatten(0, 1).float()
    split = model.get_output_embeddings()(hidden_states(model, ids)).float()
    difference = float((whole - split).abs().max())
    if not difference <= 1e-3 * float(whole.abs().max()):
        raise TuningError(
            f"{what}: the logits of {type(model).__name__} are not its head on its last hidden"
            f" state (they differ by {difference:.3g}), which the chunked loss relies on"
        )


def token_kl(logits: torch.Tensor, teacher_logits: torch.Tensor) -> torch.Tensor:
    """Sum over tokens [n, V] of KL(teacher || student), float32."""
    student = F.log_softmax(logits.float(), -1)
    teacher = F.log_softmax(teacher_logits.float(), -1)
    return F.kl_div(student, teacher, reduction="sum", log_target=True)


def token_nll(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Sum over tokens [n, V] of the negative log-likelihood of ``labels`` (-100: not scored)."""
    return F.cross_entropy(logits.float(), labels, reduction="sum", ignore_index=-100)


def labels_of(ids: torch.Tensor) -> torch.Tensor:
    """The next token of every position of the windows [n, L], -100 at their ends, flat."""
    return F.pad(ids[:, 1:], (0, 1), value=-100).flatten()


def kl_and_gradient(
    logits: torch.Tensor, teacher_logits: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """``token_kl`` and its gradient in the logits, softmax(logits) - softmax(teacher's).

    Overwrites the logits on a GPU.
    """
    if logits.device.type == "cuda":
        from ..triton_kernels.divergence import divergence

        return divergence(logits, teacher_logits.contiguous()).sum(), logits
    student = F.log_softmax(logits, -1, dtype=torch.float32)
    teacher = F.log_softmax(teacher_logits, -1, dtype=torch.float32)
    loss = F.kl_div(student, teacher, reduction="sum", log_target=True)
    return loss, student.exp_().sub_(teacher.exp_())


def nll_and_gradient(
    logits: torch.Tensor, labels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """``token_nll`` and its gradient in the logits, softmax(logits) - onehot(label)."""
    scores = F.log_softmax(logits, -1, dtype=torch.float32)
    loss = F.nll_loss(scores, labels, reduction="sum", ignore_index=-100)
    scored = labels >= 0
    chosen = labels.clamp_min(0)[:, None]
    gradient = scores.exp_()
    gradient.scatter_(1, chosen, gradient.gather(1, chosen) - 1)
    return loss, gradient * scored[:, None]


class HeadLoss(torch.autograd.Function):
    """Sum of a loss over all tokens; its gradients are made in the forward pass.

    Args:
        hidden: last hidden states [n, d].
        weight, bias: of the head.
        of_chunk: (logits, slice of the tokens) -> (sum of the loss, its gradient in the logits).
        chunk: tokens of a chunk.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, of_chunk: Callable, chunk: int) -> torch.Tensor:
        wanted = ctx.needs_input_grad[:3]
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        back = torch.empty_like(hidden) if wanted[0] else None
        sums = [
            torch.zeros_like(t, dtype=torch.float32) if wish else None
            for t, wish in zip((weight, bias), wanted[1:], strict=True)
        ]
        for start in range(0, len(hidden), chunk):
            part = slice(start, start + chunk)
            loss, gradient = of_chunk(F.linear(hidden[part], weight, bias), part)
            total += loss
            gradient = gradient.to(weight.dtype)
            if wanted[0]:
                torch.mm(gradient, weight, out=back[part])
            if wanted[1]:
                sums[0] += gradient.T @ hidden[part]
            if wanted[2]:
                sums[1] += gradient.sum(0)
        ctx.save_for_backward(back, *sums)
        ctx.dtypes = [None if t is None else t.dtype for t in (hidden, weight, bias)]
        return total

    @staticmethod
    def backward(ctx, outer: torch.Tensor):
        pairs = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        found = [None if t is None else (t * outer).to(dtype) for t, dtype in pairs]
        return *found, None, None


class ChunkedLoss:
    """Sum of the loss over a microbatch, differentiable in the student.

    Args:
        student: causal language model under training.
        teacher: None for the loss "ce".
        chunk: tokens of a chunk.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module | None, chunk: int):
        self.student, self.teacher, self.chunk = student, teacher, chunk

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        """The sum over the windows ``ids`` [n, L]; KL scores n*L tokens, CE n*(L-1)."""
        if self.teacher is not None:
            teach = self.teacher.get_output_embeddings()
            with torch.no_grad():
                reference = hidden_states(self.teacher, ids)

            def of_chunk(logits: torch.Tensor, part: slice):
                return kl_and_gradient(logits, teach(reference[part]))
        else:
            labels = labels_of(ids)

            def of_chunk(logits: torch.Tensor, part: slice):
                return nll_and_gradient(logits, labels[part])

        head = self.student.get_output_embeddings()
        hidden = hidden_states(self.student, ids)
        return HeadLoss.apply(hidden, head.weight, head.bias, of_chunk, self.chunk)

    def scored(self, windows: int, length: int) -> int:
        """Tokens that the sum runs over."""
        return windows * (length if self.teacher is not None else length - 1)


@torch.no_grad()
def score(
    student: nn.Module, teacher: nn.Module | None, windows: torch.Tensor, batch: int, chunk: int
) -> dict[str, float]:
    """Mean negative log-likelihood ``nll`` over ``windows`` [n, L] as ``evaluation.perplexity``
    defines it, and against a teacher the mean ``kl`` and the share ``top1`` of equal choices."""
    device = next(student.parameters()).device
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    for group in windows.split(batch):
        sums += score_sums(student, teacher, group.to(device), chunk)
    return score_means(sums, *windows.shape, teacher is not None)


def score_means(sums: torch.Tensor, windows: int, length: int, taught: bool) -> dict[str, float]:
    """The means of ``score_sums`` over so many windows of this length."""
    nll, kl, same = sums.tolist()
    found = {"nll": nll / (windows * (length - 1))}
    return found | (
        {"kl": kl / (windows * length), "top1": same / (windows * length)} if taught else {}
    )


@torch.no_grad()
def score_sums(
    student: nn.Module, teacher: nn.Module | None, ids: torch.Tensor, chunk: int
) -> torch.Tensor:
    """Sums over the windows ``ids`` [n, L] of (nll, kl, equal choices), float64 [3]."""
    nll = torch.zeros((), dtype=torch.float64, device=ids.device)
    kl, same = nll.clone(), nll.clone()
    labels = labels_of(ids).split(chunk)
    hidden = hidden_states(student, ids).split(chunk)
    if teacher is not None:
        reference = hidden_states(teacher, ids).split(chunk)
    for place, (h, label) in enumerate(zip(hidden, labels, strict=True)):
        logits = student.get_output_embeddings()(h)
        nll += token_nll(logits, label)
        if teacher is not None:
            target = teacher.get_output_embeddings()(reference[place])
            kl += token_kl(logits, target)
            same += (logits.argmax(-1) == target.argmax(-1)).sum()
    return torch.stack([nll, kl, same])
