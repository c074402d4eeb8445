"""KL(teacher || student) of rows of logits and its gradient: two passes over a row, one launch.

In torch it is a dozen passes over float32 copies of the logits.
"""

import torch
import triton
import triton.language as tl

from .devices import on_its_device

BLOCK = 4096
"""Most columns at a time: a row of 8192 is read twice, the second time from the cache."""


@triton.jit
def _rows(student_ptr, teacher_ptr, loss_ptr, V, BLOCK: tl.constexpr):
    """A program a row. The student's logits are overwritten by the gradient."""
    row = tl.program_id(0)
    student_ptr += row.to(tl.int64) * V
    teacher_ptr += row.to(tl.int64) * V
    columns = tl.arange(0, BLOCK)
    top_s = -float("inf")
    top_t = -float("inf")
    sum_s = 0.0
    sum_t = 0.0
    for first in range(0, V, BLOCK):
        inside = first + columns < V
        s = tl.load(student_ptr + first + columns, mask=inside, other=-float("inf")).to(tl.float32)
        t = tl.load(teacher_ptr + first + columns, mask=inside, other=-float("inf")).to(tl.float32)
        new_s = tl.maximum(top_s, tl.max(s, 0))
        new_t = tl.maximum(top_t, tl.max(t, 0))
        sum_s = sum_s * tl.exp(top_s - new_s) + tl.sum(tl.exp(s - new_s), 0)
        sum_t = sum_t * tl.exp(top_t - new_t) + tl.sum(tl.exp(t - new_t), 0)
        top_s = new_s
        top_t = new_t
    norm_s = top_s + tl.log(sum_s)
    norm_t = top_t + tl.log(sum_t)
    loss = 0.0
    for first in range(0, V, BLOCK):
        inside = first + columns < V
        s = tl.load(student_ptr + first + columns, mask=inside, other=0.0).to(tl.float32) - norm_s
        t = tl.load(teacher_ptr + first + columns, mask=inside, other=0.0).to(tl.float32) - norm_t
        likely = tl.exp(t)
        loss += tl.sum(tl.where(inside, likely * (t - s), 0.0), 0)
        gradient = (tl.exp(s) - likely).to(student_ptr.dtype.element_ty)
        tl.store(student_ptr + first + columns, gradient, mask=inside)
    tl.store(loss_ptr + row, loss)


@on_its_device
def divergence(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """KL of each row, float32 [n]; the logits ``student`` [n, V] become its gradient, in place.

    ``teacher`` [n, V]; both contiguous, of any floating dtype, no -inf.
    """
    n, V = student.shape
    loss = torch.empty(n, dtype=torch.float32, device=student.device)
    block = min(BLOCK, triton.next_power_of_2(V))
    _rows[(n,)](student, teacher, loss, V, BLOCK=block, num_warps=8)
    return loss
