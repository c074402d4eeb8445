"""Captured decode steps on a GPU: the same tokens as the model gives, graph after graph."""

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_config, write_checkpoint

from aqlm_infer import prepare_for_generation, undo_prepare_for_generation
from aqlm_infer.bench.generate import quantized_copy
from aqlm_infer.bench.shapes import random_model
from aqlm_infer.evaluation import load_model, load_tokenizer
from aqlm_infer.generation import GenerationSetupError
from aqlm_infer.generation.prepare import captured
from aqlm_infer.layers import quantized_layers

LM7 = Path(__file__).parents[1] / "examples" / "lm7"
SCHEMES = ["aqlm-2x8-g8", "aqlm-1x16-g8", "quip-e8p-2bit", "quip-int4", "rtn-int4-g32"]

pytestmark = pytest.mark.gpu


def config(**changes):
    fields = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4,
              "num_key_value_heads": 2, "head_dim": 64, "eos_token_id": None,
              "max_position_embeddings": 1024, "vocab_size": 512,
              "num_hidden_layers": 3}  # fmt: skip
    return tiny_config(**{**fields, **changes})


def greedy(model, ids, mask=None, **options):
    settings = {"do_sample": False, "max_new_tokens": 24, "pad_token_id": 0, **options}
    mask = torch.ones_like(ids) if mask is None else mask
    return model.generate(ids, attention_mask=mask, **settings)


def assert_same_tokens(model, got, expected, mask):
    """Equal tokens; where they part, the eager model must have held both for equally likely.

    Stacked layers and steps sum in another order: a tie to 1e-3 may be decided either way.
    """
    for row, other, seen in zip(got, expected, mask, strict=True):
        parted = (row != other).nonzero()
        if not len(parted):
            continue
        at = int(parted[0])
        rest = torch.ones(at - len(seen), dtype=seen.dtype, device=seen.device)
        with torch.inference_mode():
            whole = torch.cat([seen, rest])[None]
            places = (whole.cumsum(1) - 1).clamp(min=0)
            logits = model(row[None, :at], attention_mask=whole, position_ids=places).logits[0, -1]
        gap = float(logits[other[at]] - logits[row[at]])
        assert abs(gap) < 1e-3 * float(logits.std()), f"token {at}: {gap} apart"


@pytest.fixture(scope="module")
def quantized_lm7():
    return quantized_copy(load_model(LM7), "aqlm-1x4-g8", "exact", progress=False)


def test_greedy_tokens_on_lm7(quantized_lm7):
    """float32: padded and single prompts, twice each."""
    model = quantized_lm7.cuda()
    tokenizer = load_tokenizer(LM7)
    tokenizer.padding_side, tokenizer.pad_token = "left", tokenizer.eos_token
    batches = [
        tokenizer(texts, return_tensors="pt", padding=True).to("cuda")
        for texts in (["The old man", "Once upon a time there was a"], ["The little"])
    ]
    arguments = [(b["input_ids"], b["attention_mask"]) for b in batches]
    expected = [greedy(model, *each, max_new_tokens=60) for each in arguments]
    prepare_for_generation(model)
    runner = model.aqlm_generation.runner
    got = [greedy(model, *each, max_new_tokens=60) for each in (*arguments, *arguments)]
    assert runner.counts["bodies"] == 2 and runner.counts["replays"]
    undo_prepare_for_generation(model)
    for tokens, other, (_, mask) in zip(got, expected * 2, arguments * 2, strict=True):
        assert_same_tokens(model, tokens, other, mask)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_step_logits(scheme, dtype):
    """Every step's logits are the eager model's on the same tokens, within the dtype's rounding."""
    model = random_model(config(), scheme, dtype, "cuda")
    ids = torch.randint(1, 512, (3, 9), generator=torch.Generator().manual_seed(1)).cuda()
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    prepare_for_generation(model)
    out = greedy(model, ids, mask, return_dict_in_generate=True, output_logits=True)
    assert model.aqlm_generation.runner.counts["replays"] == 23
    undo_prepare_for_generation(model)
    whole = torch.cat([mask, torch.ones_like(out.sequences[:, 9:])], 1)
    places = (whole.cumsum(1) - 1).clamp(min=0)
    with torch.inference_mode():
        expected = model(out.sequences, attention_mask=whole, position_ids=places).logits[:, 8:-1]
    got = torch.stack(out.logits, 1)
    error = (got.double() - expected.double()).norm() / expected.double().norm()
    assert error < (2e-2 if dtype == torch.float16 else 8e-2), f"{error:.1e}"


@pytest.mark.parametrize("tokens", [5, 300])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("scheme", [*SCHEMES, None])
def test_prompt_logits(scheme, dtype, tokens):
    """Of prompts in the operators of a step, and of the step after: the eager model's."""
    model = random_model(config(), scheme, dtype, "cuda")
    ids = torch.randint(1, 512, (2, tokens), generator=torch.Generator().manual_seed(1)).cuda()
    with torch.inference_mode():
        with captured(model) if scheme is None else nullcontext(prepared(model)) as runner:
            out = greedy(model, ids, max_new_tokens=2, return_dict_in_generate=True,
                         output_logits=True)  # fmt: skip
            again = greedy(model, ids, max_new_tokens=2)
        assert runner.counts["prompts"] == 2 and torch.equal(out.sequences, again)
        if scheme is not None:
            undo_prepare_for_generation(model)
        expected = model(out.sequences[:, :-1]).logits[:, -2:]
    error = (torch.stack(out.logits, 1).double() - expected.double()).norm()
    limit = {torch.float16: 2e-2, torch.bfloat16: 8e-2, torch.float32: 5e-3}[dtype]
    assert error < limit * expected.double().norm(), f"{error:.1e}"


def prepared(model, **options):
    return prepare_for_generation(model, **options).aqlm_generation.runner


@pytest.mark.parametrize("scheme", ["aqlm-2x8-g8", "quip-e8p-2bit"])
def test_steps_without_a_graph(scheme):
    model = random_model(config(), scheme, torch.float16, "cuda")
    ids = torch.randint(1, 512, (3, 9), generator=torch.Generator().manual_seed(1)).cuda()
    prepare_for_generation(model)
    expected = greedy(model, ids)
    undo_prepare_for_generation(model)
    runner = prepared(model, graphs=False)
    assert torch.equal(greedy(model, ids), expected)
    assert runner.counts == {"bodies": 1, "prompts": 1, "replays": 23}


@pytest.mark.parametrize("batch", [1, 5, 16, 64])
def test_batches(batch):
    model = random_model(config(), "aqlm-2x8-g8", torch.float32, "cuda")
    ids = torch.randint(1, 512, (batch, 5), generator=torch.Generator().manual_seed(0)).cuda()
    with torch.inference_mode():
        expected = model(ids).logits[:, -1]
        prepare_for_generation(model)
        out = greedy(model, ids[:, :4], max_new_tokens=2, return_dict_in_generate=True,
                     output_logits=True)  # fmt: skip
        cache = model.aqlm_generation.runner.cache(batch, 8)
        model(ids[:, :4], past_key_values=cache, use_cache=True)
        logits = model(input_ids=ids[:, 4:], past_key_values=cache, use_cache=True).logits[:, 0]
    assert out.sequences.shape == (batch, 6) and cache.filled == 5
    error = (logits - expected).norm() / expected.norm()
    assert error < 5e-3, f"{error:.1e}"


def test_sampling_is_repeatable_and_the_models():
    model = random_model(config(), "aqlm-2x8-g8", torch.float32, "cuda")
    ids = torch.randint(1, 512, (2, 7), generator=torch.Generator().manual_seed(2)).cuda()

    def sample():
        torch.manual_seed(5)
        return greedy(model, ids, do_sample=True, top_k=5, temperature=0.7)

    expected = sample()
    prepare_for_generation(model)
    assert torch.equal(sample(), sample())
    # Products are summed in another order: the first tokens are the model's.
    assert torch.equal(sample()[:, :9], expected[:, :9])


@pytest.mark.parametrize("compile", [False, True])
def test_models_without_a_step_of_fused_operators(compile, monkeypatch):
    monkeypatch.setattr("aqlm_infer.generation.runner.why_not_llama", lambda model: "a test")
    model = random_model(config(num_hidden_layers=2), "aqlm-2x8-g8", torch.float32, "cuda")
    ids = torch.randint(1, 512, (2, 7), generator=torch.Generator().manual_seed(2)).cuda()
    expected = greedy(model, ids, max_new_tokens=8)
    prepare_for_generation(model, compile=compile)
    assert torch.equal(greedy(model, ids, max_new_tokens=8), expected)
    assert model.aqlm_generation.runner.counts["replays"] == 7


def test_weights_changed_in_place_and_moved():
    model = random_model(config(), "aqlm-2x8-g8", torch.float32, "cuda")
    ids = torch.randint(1, 512, (1, 7), generator=torch.Generator().manual_seed(2)).cuda()
    prepare_for_generation(model)
    runner = model.aqlm_generation.runner
    greedy(model, ids)
    with torch.no_grad():
        model.lm_head.weight.copy_(model.lm_head.weight.roll(7, 0))
    after = greedy(model, ids)
    assert runner.counts["bodies"] == 1
    model.cpu()
    model.cuda()
    assert torch.equal(greedy(model, ids), after)
    assert runner.counts["bodies"] == 2


def test_dense_models_for_comparison():
    model = random_model(config(), None, torch.float32, "cuda")
    ids = torch.randint(1, 512, (1, 7), generator=torch.Generator().manual_seed(2)).cuda()
    expected = greedy(model, ids)
    with captured(model) as runner:
        assert torch.equal(greedy(model, ids), expected) and runner.counts["replays"] == 23


@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_head(bits):
    model = random_model(config(), "aqlm-2x8-g8", torch.float16, "cuda")
    ids = torch.randint(1, 512, (1, 7), generator=torch.Generator().manual_seed(2)).cuda()
    prepare_for_generation(model, lm_head=f"rtn-int{bits}-g128")
    assert greedy(model, ids).shape == (1, 31) and model.lm_head.kernel_id == "cuda.scalar"


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("graphs", [None, False])
def test_second_device(graphs):
    """A model on a device that is not the current one."""
    model = random_model(config(), "aqlm-2x8-g8", torch.float16, "cuda:1")
    ids = torch.randint(1, 512, (2, 7), generator=torch.Generator().manual_seed(2))
    prepare_for_generation(model, graphs=graphs)
    got = greedy(model, ids.to("cuda:1"))
    undo_prepare_for_generation(model)
    prepare_for_generation(model.to("cuda:0"), graphs=graphs)
    assert torch.cuda.current_device() == 0
    assert torch.equal(greedy(model, ids.to("cuda:0")).cpu(), got.cpu())


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_devices(tmp_path):
    """device_map="auto" spreads a checkpoint over two GPUs: the same tokens, prepared as well."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path / "model"
    write_checkpoint(folder, "aqlm-2x8-g8", config(num_hidden_layers=4))
    one = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).cuda()
    names = [f"model.layers.{i}" for i in range(4)]
    places = {"model.embed_tokens": 0, "model.norm": 1, "lm_head": 1, "model.rotary_emb": 0}
    places |= dict(zip(names, (0, 0, 1, 1), strict=True))
    for device_map in ("auto", places):
        memory = {0: "600KiB", 1: "1GiB"} if device_map == "auto" else None
        two = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, device_map=device_map, max_memory=memory
        )
        devices = {layer.scales.device for _, layer in quantized_layers(two)}
        assert device_map == "auto" or len(devices) == 2
        ids = torch.randint(1, 512, (2, 7), generator=torch.Generator().manual_seed(2)).cuda()
        expected = greedy(one, ids)
        assert torch.equal(greedy(two, ids), expected)
        if len(devices) < 2:
            continue
        with pytest.raises(GenerationSetupError, match="2 devices, a graph runs on one"):
            prepare_for_generation(two, graphs=True)
        with pytest.warns(UserWarning, match="without CUDA graphs: the model is on 2 devices"):
            prepare_for_generation(two)
        assert two.aqlm_generation.stacked
        assert torch.equal(greedy(two, ids), expected)
