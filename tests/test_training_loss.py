"""Loss and gradient of a tuning step on tiny models, and the kernels behind them."""

import pytest
import torch
import torch.nn.functional as F
from tiny_models import tiny_model
from tuning_cases import (
    gradients,
    make_trainer,
    quantized_model,
    random_windows,
    wide_config,
)

from aqlm_infer.formats.e8p import grid_x4
from aqlm_infer.quantizers import lattice
from aqlm_infer.training import (
    TuningError,
)
from aqlm_infer.training.additive import summed
from aqlm_infer.training.loss import ChunkedLoss, score

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*slow reference kernel"),
]


@pytest.mark.parametrize("loss", ["kl", "ce"])
def test_chunked_loss_equals_the_whole(loss):
    model, teacher = tiny_model(wide_config()), tiny_model(wide_config(), seed=1)
    ids = random_windows(3, 10, seed=0)
    logits, target = model(ids).logits, teacher(ids).logits.detach()
    if loss == "kl":
        p = target.double().softmax(-1)
        direct = (p * (p.log() - logits.double().log_softmax(-1))).sum()
    else:
        direct = F.cross_entropy(
            logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"
        ).double()
    expected = torch.autograd.grad(direct, list(model.parameters()))
    for chunk in (1, 7, 1000):
        chunked = ChunkedLoss(model, teacher if loss == "kl" else None, chunk)
        total = chunked(ids)
        assert float(total.detach()) == pytest.approx(float(direct.detach()), rel=1e-5)
        found = torch.autograd.grad(total, list(model.parameters()))
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert chunked.scored(3, 10) == (30 if loss == "kl" else 27)


@pytest.mark.parametrize("columns", [50, 4096, 5000])
def test_divergence_kernel(columns):
    """In Triton's interpreter without a GPU: against float64, and the gradient in place."""
    divergence = pytest.importorskip("aqlm_infer.triton_kernels.divergence").divergence
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rng = torch.Generator().manual_seed(0)
    student, teacher = 5 * torch.randn(2, 6, columns, generator=rng)
    teacher[0] = student[0]
    p, q = teacher.double().softmax(1), student.double().softmax(1)
    expected = (p * (p.log() - q.log())).sum(1)
    logits = student.to(device).clone()
    found = divergence(logits, teacher.to(device)).cpu().double()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits.cpu().double(), q - p, rtol=1e-5, atol=1e-7)
    again = student.to(device).clone()
    assert torch.equal(divergence(again, teacher.to(device)).cpu().double(), found)
    assert torch.equal(again, logits)


@pytest.mark.parametrize("shape", [(3, 2, 16, 8), (1, 1, 300, 8), (2, 3, 8, 6)])
def test_codewords_kernel(shape):
    """In Triton's interpreter without a GPU: the bits of the sums that torch makes."""
    codewords = pytest.importorskip("aqlm_infer.triton_kernels.codewords").codewords
    device = "cuda" if torch.cuda.is_available() else "cpu"
    L, books, count, _ = shape
    rng = torch.Generator().manual_seed(0)
    tables = torch.randn(shape, generator=rng)
    dtype = torch.uint8 if count <= 256 else torch.int32
    codes = torch.randint(0, count, (L, 150, books), generator=rng).to(dtype)
    scales = torch.randn(L, 50, generator=rng)
    index = torch.randint(0, 150, (L, 150), generator=rng)
    expected = summed(tables, codes)
    given = [t.to(device) for t in (tables, codes, scales, index)]
    assert torch.equal(codewords(*given[:2]).cpu(), expected)
    found = codewords(*given[:3], 3).cpu()
    assert torch.equal(found, expected * scales.repeat_interleave(3, 1)[..., None])
    found = codewords(*given[:3], 3, given[3]).cpu()
    assert torch.equal(found, expected * scales.gather(1, index // 3)[..., None])


def test_points_kernel():
    """In Triton's interpreter without a GPU: as near as the nearest of all words."""
    nearest = pytest.importorskip("aqlm_infer.triton_kernels.points").nearest_points
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(150, 8, generator=rng) * torch.rand(150, 1, generator=rng) * 3
    words = grid_x4().double() / 4
    x[:9] = words[:9]  # a word is its own nearest, bit for bit
    codes = nearest(x.to(device), lattice._tables(device)).cpu().long()
    assert torch.equal(codes[:9], torch.arange(9))
    found = (words[codes] - x.double()).norm(dim=1)
    torch.testing.assert_close(found, torch.cdist(x.double(), words).amin(1), atol=1e-6, rtol=0)


def test_score_is_the_perplexity_of_evaluation():
    from aqlm_infer.evaluation import perplexity

    model, teacher = tiny_model(wide_config()), tiny_model(wide_config(), seed=1)
    windows = random_windows(5, 12, seed=3)
    found = score(model, teacher, windows, 2, 7)
    expected = perplexity(model, windows.flatten(), window=12)
    assert found["nll"] == pytest.approx(expected.nll, rel=1e-6)
    p, q = (m(windows).logits.double().log_softmax(-1) for m in (teacher, model))
    kl = (p.exp() * (p - q)).sum(-1).mean()
    assert found["kl"] == pytest.approx(float(kl.detach()), rel=1e-5)
    agree = (p.argmax(-1) == q.argmax(-1)).double().mean()
    assert found["top1"] == pytest.approx(float(agree))


@pytest.mark.parametrize("changes", [{"microbatch": 1}, {"gradient_checkpointing": True}])
def test_accumulation_and_checkpointing_change_nothing(tmp_path, changes):
    plain = make_trainer(tmp_path / "a", method="ste", code_lr=0.02)
    other = make_trainer(tmp_path / "b", method="ste", code_lr=0.02, **changes)
    losses = [float(sum(t._gradients(0)[0])) for t in (plain, other)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    for one in (plain, other):
        one.student.model.zero_grad()
    one, two = gradients(plain), gradients(other)
    assert one.keys() == two.keys()
    for name, a in one.items():
        error = (a - two[name]).norm() / a.norm()
        assert error < 1e-5, f"{name}: {error:.1e}"


def test_tied_embeddings_train_through_both_uses(tmp_path):
    model = quantized_model("aqlm-2x4-g8", tie_word_embeddings=True)
    trainer = make_trainer(tmp_path, model=model)
    assert trainer.student.tied and "lm_head.weight" not in trainer.student.others
    trainer._gradients(0)
    table = trainer.student.others["model.embed_tokens.weight"]
    used = trainer.train[trainer.order[0]].flatten().unique()
    unused = torch.tensor([i for i in range(64) if i not in used.tolist()])
    assert len(unused) and table.grad[unused].abs().min(1).values.max() > 0  # through the head
    with pytest.raises(TuningError, match="name both or neither"):
        make_trainer(tmp_path, model=quantized_model(
            "aqlm-2x4-g8", tie_word_embeddings=True), train=["head"])  # fmt: skip


def test_what_trains(tmp_path):
    for kinds, expected in (
        ([], set()),
        (["norms"], {"norm"}),
        (["embeddings"], {"embed_tokens"}),
        (["head"], {"lm_head"}),
    ):
        student = make_trainer(tmp_path, train=kinds).student
        found = set(student.others)
        assert all(any(word in n for word in expected) for n in found)
        assert bool(found) == bool(expected)
