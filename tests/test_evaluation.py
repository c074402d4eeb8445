"""Perplexity against an independent computation, token streams, generation, complete loading."""

import io
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model, write_checkpoint

from aqlm_infer.backends import native
from aqlm_infer.checkpoint import CheckpointError
from aqlm_infer.evaluation import (
    ModelError,
    TokenError,
    load_model,
    load_tokenizer,
    perplexity,
    read_text_file,
    read_token_file,
    resolve_model,
    set_precision,
)
from aqlm_infer.evaluation.generation import GenerationError, generate
from aqlm_infer.layers import quantized_layers

ROOT = Path(__file__).parents[1]
LM7 = ROOT / "examples" / "lm7"
TEXT = ROOT / "examples" / "text"


@pytest.fixture(scope="module")
def lm7():
    return load_model(LM7)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(LM7)


@torch.no_grad()
def ppl_float64(model, ids, window, windows):
    """exp of the mean negative log-likelihood, one window and one token at a time, in float64."""
    model = model.double()
    losses = []
    for w in range(windows):
        part = ids[w * window : (w + 1) * window]
        scores = model(part[None]).logits[0].numpy()
        for position in range(window - 1):
            row = scores[position]
            top = row.max()
            log_sum = top + math.log(np.exp(row - top).sum())
            losses.append(log_sum - row[part[position + 1]])
    model.float()
    return math.exp(math.fsum(losses) / len(losses)), len(losses)


@pytest.mark.parametrize("window, windows, batch", [(16, None, 8), (16, 3, 2), (64, None, 1)])
def test_perplexity_is_that_of_the_definition(window, windows, batch):
    model = tiny_model()
    ids = torch.randint(0, 64, (197,), generator=torch.Generator().manual_seed(1))
    result = perplexity(model, ids, window=window, windows=windows, batch=batch)
    expected, scored = ppl_float64(model, ids, window, windows or 197 // window)
    assert result.tokens == scored
    assert result.ppl == pytest.approx(expected, rel=1e-5)


def test_perplexity_of_the_demo_model(lm7):
    ids = read_token_file(TEXT / "valid.bin", 8192)
    assert len(ids) == 100_000
    expected, scored = ppl_float64(lm7, ids, 512, 2)
    result = perplexity(lm7, ids, windows=2)
    assert (result.tokens, scored) == (1022, 1022)
    assert result.ppl == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    "count, options, message",
    [
        (10, {"window": 16}, r"10 tokens are too few: 1 windows of 16 need 16"),
        (40, {"window": 16, "windows": 3}, r"40 tokens are too few: 3 windows of 16 need 48"),
        (40, {"window": 1}, "window=1"),
        (400, {"window": 65}, "window=65 is longer than the model's context of 64"),
        (40, {"window": 16, "batch": 0}, "batch=0"),
        (40, {"window": 16, "windows": 0}, "windows=0"),
    ],
)
def test_perplexity_refuses(count, options, message):
    with pytest.raises(TokenError, match=message):
        perplexity(tiny_model(), torch.zeros(count, dtype=torch.int64), **options)


def test_perplexity_refuses_nan():
    model = tiny_model()
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    with pytest.raises(TokenError, match="not finite in batch 0"):
        perplexity(model, torch.zeros(32, dtype=torch.int64), window=16)


def test_text_file_gives_the_tokens_of_the_token_file(tokenizer):
    ids = read_text_file(TEXT / "valid.txt", tokenizer)
    assert len(ids) == 63_126
    assert torch.equal(ids, read_token_file(TEXT / "valid.bin", 8192)[-len(ids) :])


def test_token_files_that_are_refused(tmp_path, tokenizer):
    odd, high, text = tmp_path / "odd.bin", tmp_path / "high.bin", tmp_path / "latin.txt"
    odd.write_bytes(b"\x00" * 7)
    high.write_bytes(np.array([1, 2, 8192, 3], "<u2").tobytes())
    text.write_bytes(b"caf\xe9")
    with pytest.raises(TokenError, match="7 bytes, an odd number"):
        read_token_file(odd, 8192)
    with pytest.raises(TokenError, match=r"token id 8192 at position 2, .* has 8192"):
        read_token_file(high, 8192)
    with pytest.raises(FileNotFoundError):
        read_token_file(tmp_path / "none.bin", 8192)
    with pytest.raises(TokenError, match="not UTF-8"):
        read_text_file(text, tokenizer)


@torch.no_grad()
def test_greedy_generation_is_argmax(lm7, tokenizer):
    stream = io.StringIO()
    result = generate(lm7, tokenizer, "The old man", max_new_tokens=6, stream=stream)
    ids = tokenizer("The old man", return_tensors="pt").input_ids
    prompt = ids.shape[1]
    for _ in range(6):
        ids = torch.cat([ids, lm7(ids).logits[:, -1:].argmax(-1)], 1)
    assert result.text == tokenizer.decode(ids[0, prompt:], skip_special_tokens=True)
    assert stream.getvalue().strip() == result.text.strip()
    assert (result.prompt_tokens, result.new_tokens) == (prompt, 6)
    assert result.decode_tokens_per_s > 0 and 0 < result.ttft_s < result.seconds


def test_sampling_is_repeatable_and_leaves_the_generator_alone(lm7, tokenizer):
    state = torch.random.get_rng_state()
    options = {"max_new_tokens": 8, "temperature": 1.5, "top_p": 0.95}
    texts = [generate(lm7, tokenizer, "It was", seed=s, **options).text for s in (3, 3, 4)]
    assert texts[0] == texts[1] != texts[2]
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize(
    "options, message",
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"max_new_tokens": 1024}, "exceed the model's context of 1024"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"top_p": 0.0}, "top_p=0.0"),
    ],
)
def test_generation_refuses(lm7, tokenizer, options, message):
    with pytest.raises(GenerationError, match=message):
        generate(lm7, tokenizer, "It was", **options)


def test_names_of_models(tmp_path):
    assert resolve_model(LM7) == (str(LM7), True)
    assert resolve_model("some-organisation/a-model") == ("some-organisation/a-model", False)
    (tmp_path / "file").write_text("")
    for name, message in (
        (str(tmp_path), "has no config.json"),
        (str(tmp_path / "file"), "is a file"),
        (str(tmp_path / "nothing"), "no local folder, and no hub id"),
        ("tests/lm8", "no local folder, and no hub id"),
        ("lm8", "no local folder, and no hub id"),
        ("../a/b", "no local folder, and no hub id"),
    ):
        with pytest.raises(ModelError, match=message):
            resolve_model(name)


def test_incomplete_models_are_refused(tmp_path):
    folder = tmp_path / "model"
    tiny_model().save_pretrained(folder)
    file = folder / "model.safetensors"
    whole, tensors = file.read_bytes(), load_file(file)
    missing = "model.layers.1.mlp.up_proj.weight"
    save_file({k: v for k, v in tensors.items() if k != missing}, file, {"format": "pt"})
    with pytest.raises(ModelError, match=f"1 missing keys, {missing}"):
        load_model(folder)
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is not a readable"):
        load_model(folder)


def test_load_model_dtypes(tmp_path):
    written = write_checkpoint(tmp_path / "quantized")
    assert load_model(written.folder).dtype == torch.float32
    assert load_model(written.folder, torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.skipif(native.cpu is None, reason="the CPU module is not built")
def test_set_precision(tmp_path):
    written = write_checkpoint(tmp_path / "quantized")
    model = load_model(written.folder)
    set_precision(model, "fast")
    assert {layer.precision for _, layer in quantized_layers(model)} == {"fast"}
    assert all(layer.kernel_id for _, layer in quantized_layers(model))
    with pytest.raises(ModelError, match="no quantized layer"):
        set_precision(tiny_model(), "fast")
