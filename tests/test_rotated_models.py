"""Whole models in every rotated and scalar scheme: quantized, loaded, compared, generating text."""

import copy

import pytest
import torch
from tiny_models import tiny_config, tiny_model
from torch import nn
from transformers import AutoModelForCausalLM

import aqlm_infer  # noqa: F401 (registers the quantization method with transformers)
from aqlm_infer import ops
from aqlm_infer.calibration import TuneOptions, quantize_calibrated
from aqlm_infer.calibration.datafree import quantize_checkpoint
from aqlm_infer.layers import RotatedLinear, quantized_layers, share_rotations

SCHEMES = [
    *(f"quip-e8p-{bits}bit" for bits in (2, 3, 4)),
    "quip-e8p-2bit-b128",
    *(f"quip-int{bits}" for bits in (2, 3, 4)),
    "quip-int4-b128",
    "quip-int3-kron",
    *(f"gptq-int{bits}-g128" for bits in (2, 3, 4, 8)),
    "rtn-int4-g64",
]
SHARING = ("quip-e8p-2bit", "quip-e8p-3bit-b128", "quip-int4", "quip-int2-b128")
PROMPT = torch.tensor([[1, 5, 9, 33, 60, 2, 17, 21]])
BOUNDS = {torch.float32: 1e-3, torch.float16: 1e-2}


def make_dense(folder, hidden, intermediate):
    config = tiny_config(
        hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=1, head_dim=32,
        num_attention_heads=hidden // 32, num_key_value_heads=hidden // 32,
    )  # fmt: skip
    tiny_model(config).half().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return make_dense(tmp_path_factory.mktemp("models") / "small", 128, 384)


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    return make_dense(tmp_path_factory.mktemp("models") / "wide", 256, 768)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    """Calibration tokens."""
    file = tmp_path_factory.mktemp("tokens") / "calib.bin"
    ids = torch.randint(64, (1000,), generator=torch.Generator().manual_seed(0))
    file.write_bytes(ids.to(torch.uint16).numpy().tobytes())
    return file


def quantize(dense, out, scheme, tokens, device="cpu"):
    """Data-free where the scheme can."""
    if scheme.startswith("gptq"):
        settings = {"samples": 8, "seq_len": 32, "device": device}
        quantize_calibrated(dense, out, scheme, tokens, **settings)
    else:
        quantize_checkpoint(dense, out, scheme, device=device)
    return out


def load(folder, dtype, device):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()


def dense_twin(model):
    """The same model with every quantized layer's weight dense, in float32."""
    twin = copy.deepcopy(model)
    for name, layer in list(quantized_layers(twin)):
        linear = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
        linear.weight.data = layer.weight.detach().clone()
        twin.set_submodule(name, linear)
    return nn.Module.float(twin)  # transformers refuses for quantized models


def check_generation(folder, dtype, device):
    model = load(folder, dtype, device)
    assert len(list(quantized_layers(model))) == 7
    twin, prompt = dense_twin(model), PROMPT.to(device)
    with torch.no_grad():
        logits, expected = model(prompt).logits.double(), twin(prompt).logits.double()
        error = (logits - expected).norm() / expected.norm()
        assert error <= BOUNDS[dtype], f"logits differ by {error:.2e}"
        ids = model.generate(prompt, max_new_tokens=8, do_sample=False, pad_token_id=0)
        assert ids.shape[1] > prompt.shape[1] and torch.equal(ids[:, : prompt.shape[1]], prompt)
        # Every token is the twin's best, or as good as its best within the error of the logits.
        scores = twin(ids).logits.double()[0, prompt.shape[1] - 1 : -1]
        chosen = scores.gather(1, ids[0, prompt.shape[1] :, None])[:, 0]
        slack = 4 * BOUNDS[dtype] * scores.square().mean().sqrt()
        assert (scores.amax(1) - chosen).max() <= slack


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_generates_text(small, tokens, tmp_path, scheme):
    out = quantize(small, tmp_path / "q", scheme, tokens)
    check_generation(out, torch.float32, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_generates_text_on_a_gpu(wide, tokens, tmp_path, scheme):
    out = quantize(wide, tmp_path / "q", scheme, tokens, "cuda")
    check_generation(out, torch.float16, "cuda")


# -- sharing one rotation --------------------------------------------------------------------------

GROUPS = [
    tuple(f"model.layers.0.self_attn.{n}_proj" for n in "qkv"),
    tuple(f"model.layers.0.mlp.{n}_proj" for n in ("gate", "up")),
]


def rotations_of(model, monkeypatch):
    """Sizes of the calls of ``ops.hadamard`` in one forward: the input rotations."""
    calls = []
    real = ops.hadamard

    def counted(*arguments):
        calls.append(arguments[0].shape[-1])
        return real(*arguments)

    monkeypatch.setattr(ops, "hadamard", counted)
    with torch.no_grad():
        model(PROMPT)
    monkeypatch.undo()
    return calls


@pytest.mark.parametrize("scheme", SHARING)
def test_own_models_rotate_a_common_input_once(small, tmp_path, monkeypatch, scheme):
    """q, k, v and gate, up: four rotations a block instead of seven."""
    quantize_checkpoint(small, tmp_path / "q", scheme)
    model = load(tmp_path / "q", torch.float32, "cpu")
    assert sorted(share_rotations(model)) == sorted(GROUPS)
    assert sorted(rotations_of(model, monkeypatch)) == [128, 128, 128, 384]


def test_calibration_and_fine_tuning_keep_rotations_shared(small, tokens, tmp_path):
    tune = TuneOptions(epochs=1, batch=4)
    quantize_calibrated(
        small, tmp_path / "q", "quip-e8p-2bit", tokens, samples=8, seq_len=32, tune=tune
    )
    model = load(tmp_path / "q", torch.float32, "cpu")
    assert sorted(share_rotations(model)) == sorted(GROUPS)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, RotatedLinear)}
    for names in GROUPS:
        balance = layers[names[0]].SU.abs()
        assert balance.std() > 0.01 * balance.mean(), "the columns are not balanced"
