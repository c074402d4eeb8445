"""``prepare_for_generation``: decode steps, ``generate``, and undoing it."""

import copy
import inspect
import io
from collections import Counter
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_config, tiny_model, wide_config
from transformers import AutoModelForCausalLM, MistralConfig, Qwen2Config, StaticCache, TextStreamer

from aqlm_infer import prepare_for_generation, undo_prepare_for_generation
from aqlm_infer.bench.generate import quantized_copy
from aqlm_infer.bench.shapes import random_model
from aqlm_infer.evaluation import load_model, load_tokenizer
from aqlm_infer.generation import GenerationSetupError, ops, prepare
from aqlm_infer.generation.cache import StepCache, StepLayer
from aqlm_infer.generation.compiled import ForwardStep
from aqlm_infer.generation.llama import LlamaStep, why_not_llama
from aqlm_infer.generation.prepare import check_capability
from aqlm_infer.generation.runner import StepRunner
from aqlm_infer.generation.stack import stack_siblings
from aqlm_infer.layers import quantized_layers, replace_linears, share_rotations

LM7 = Path(__file__).parents[1] / "examples" / "lm7"
GOLDEN = Path(__file__).parent / "golden"
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(scope="module")
def quantized_lm7():
    return quantized_copy(load_model(LM7), "aqlm-1x4-g8", "exact", progress=False)


@pytest.fixture
def stepping():
    """Install a runner whose steps are not captured: what the graph computes, on any device."""
    installed = []

    def install(model, **options):
        runner = StepRunner(model, **{"max_length": None, "max_graphs": 4, "compile": False,
                                      "capture": False, **options})  # fmt: skip
        runner.install()
        installed.append(runner)
        return runner

    yield install
    for runner in installed:
        if getattr(vars(runner.model).get("forward"), "runner", None) is runner:
            runner.uninstall()


def prompts(device="cpu"):
    ids = torch.tensor([[0, 0, 5, 9, 33, 60, 2, 17], [3, 3, 8, 40, 1, 0, 63, 7]], device=device)
    return {"input_ids": ids, "attention_mask": (ids.cumsum(1) > 0).long()}


GREEDY = {"do_sample": False, "max_new_tokens": 12, "pad_token_id": 0}


# -- steps -----------------------------------------------------------------------------------------


FAMILIES = {
    "llama": wide_config(),
    "llama-bias": wide_config(attention_bias=True, num_key_value_heads=4),
    "mistral": MistralConfig(**{**wide_config().to_dict(), "model_type": "mistral",
                                "sliding_window": None, "architectures": None}),
    "qwen2": Qwen2Config(**{**wide_config().to_dict(), "model_type": "qwen2",
                            "architectures": None}),
}  # fmt: skip


@pytest.mark.parametrize("kind", ["fused", "forward", "compiled"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_computes_what_the_model_does(family, kind):
    if kind == "compiled" and family != "llama":
        pytest.skip("one compile is enough")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FAMILIES[family], dtype=torch.float32).eval()
    replace_linears(model, "aqlm-1x4-g8", progress=False)
    stack_siblings(model)
    batch = prompts()
    ids, mask = batch["input_ids"], batch["attention_mask"]
    places = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        expected = model(ids, attention_mask=mask, position_ids=places).logits
        cache = StepCache(model.config, 20, torch.device("cpu"))
        model(ids[:, :6], attention_mask=mask[:, :6], position_ids=places[:, :6],
              past_key_values=cache, use_cache=True)  # fmt: skip
        if kind == "fused":
            assert why_not_llama(model) is None
            step = LlamaStep(model, cache, 2)
        else:
            step = ForwardStep(model, model.forward, cache, kind == "compiled")
        valid = torch.ones(2, 20, dtype=torch.bool)
        valid[:, :8] = mask.bool()
        for t in (6, 7):
            logits = step(ids[:, t : t + 1], places[:, t : t + 1], valid)
            torch.testing.assert_close(logits[:, 0], expected[:, t], rtol=1e-3, atol=1e-3)
            assert cache.lengths.tolist() == [t] * model.config.num_hidden_layers
            cache.lengths.add_(1)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("tokens", [1, 8])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_of_known_blocks(family, tokens, stepping):
    """The logits of the last token, the cache and the step after it are the model's."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FAMILIES[family], dtype=torch.float32).eval()
    replace_linears(model, "aqlm-1x4-g8", progress=False)
    ids = torch.randint(1, 97, (2, tokens + 1))
    with torch.no_grad():
        plain = StaticCache(config=model.config, max_cache_len=20)
        expected = model(ids[:, :tokens], past_key_values=plain).logits[:, -1:]
        after = model(ids[:, tokens:], past_key_values=plain).logits
        stack_siblings(model)
        runner = stepping(model)
        cache = runner.cache(2, 20)
        given = {"past_key_values": cache, "use_cache": True, "logits_to_keep": 1}
        logits = model(input_ids=ids[:, :tokens], **given).logits
        torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)
        assert cache.get_seq_length() == cache.filled == tokens
        torch.testing.assert_close(
            model(input_ids=ids[:, tokens:], **given).logits, after, rtol=1e-3, atol=1e-3
        )
    for layer, other in zip(cache.layers, plain.layers, strict=True):
        keys, values = layer.keys[:, :, : tokens + 1], layer.values[:, :, : tokens + 1]
        torch.testing.assert_close(keys, other.keys[:, :, : tokens + 1], rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(values, other.values[:, :, : tokens + 1], rtol=1e-3, atol=1e-3)
    assert runner.counts == {"bodies": 1, "prompts": 1, "replays": 1}


def test_prompts_that_the_model_itself_runs(stepping):
    """Padded ones, all logits, a cache that is not empty; a prompt that is not padded is ours."""
    model = random_model(wide_config(), "aqlm-1x8-g8", torch.float32)
    runner = stepping(model)
    batch = prompts()
    whole = {**batch, "attention_mask": torch.ones_like(batch["attention_mask"])}
    given = {"use_cache": True, "logits_to_keep": 1}
    with torch.no_grad():
        model(**batch, past_key_values=runner.cache(2, 20), **given)
        model(**whole, past_key_values=runner.cache(2, 20), use_cache=True)
        cache = runner.cache(2, 20)
        first = model(**whole, past_key_values=cache, use_cache=True).logits[:, -1:]
        model(input_ids=batch["input_ids"], past_key_values=cache, **given)
        assert runner.counts["prompts"] == 0
        second = model(**whole, past_key_values=runner.cache(2, 20), **given).logits
    assert runner.counts["prompts"] == 1
    torch.testing.assert_close(first, second, rtol=1e-3, atol=1e-3)


def test_steps_without_a_graph(monkeypatch):
    """graphs=False where a GPU could capture: the same operators, launched one by one."""
    monkeypatch.setattr(prepare, "_why_not_captured", lambda model, devices: None)
    model = random_model(wide_config(), "aqlm-1x8-g8", torch.float32)
    ids = prompts()["input_ids"] + 1
    expected = model.generate(ids, **GREEDY)
    prepare_for_generation(model, graphs=False)
    prepared = model.aqlm_generation
    assert prepared.reason == "graphs=False" and not prepared.runner.capture
    assert torch.equal(model.generate(ids, **GREEDY), expected)
    assert prepared.runner.counts == {"bodies": 1, "prompts": 1, "replays": 11}
    undo_prepare_for_generation(model)
    model.config.hidden_act = "gelu"
    prepare_for_generation(model, graphs=False)
    assert model.aqlm_generation.runner is None


@pytest.mark.parametrize(
    ("scheme", "joined"), [("quip-e8p-2bit", False), ("quip-e8p-2bit", True), ("quip-int4", False)]
)
def test_a_step_rotates_where_it_norms(scheme, joined, monkeypatch):
    """Fused parts (E8P) and layers that share a rotation take it with the norm, as on a GPU, and
    where matmuls are joined with what follows they are not called."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
    model = random_model(wide_config(**sizes), scheme, torch.float32)
    with torch.no_grad():
        for block in model.model.layers if scheme == "quip-int4" else ():
            for layers in ((block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj),
                           (block.mlp.gate_proj, block.mlp.up_proj)):  # fmt: skip
                for layer in layers[1:]:
                    layer.SU.copy_(layers[0].SU)
        expected = model(prompts()["input_ids"]).logits[:, -1]
    share_rotations(model)
    kernels = {layer.kernel_id for _, layer in quantized_layers(model)}
    monkeypatch.setattr("aqlm_infer.generation.siblings._KERNELS", tuple(kernels))
    if joined:
        monkeypatch.setattr("aqlm_infer.generation.siblings._JOINED", tuple(kernels))
    calls = Counter()

    def counted(name):
        run = getattr(ops, name)
        return lambda *given: calls.update([name]) or run(*given)

    for name in ("rotated_norm", "add_rms_norm", "swiglu"):
        monkeypatch.setattr(ops, name, counted(name))
    ids = prompts()["input_ids"]
    with torch.no_grad():
        cache = StepCache(model.config, 20, torch.device("cpu"))
        model(ids[:, :7], past_key_values=cache, use_cache=True)
        step = LlamaStep(model, cache, 2)
        logits = step(ids[:, 7:], torch.full((2, 1), 7), torch.ones(2, 20, dtype=torch.bool))
    torch.testing.assert_close(logits[:, 0], expected, rtol=1e-3, atol=1e-3)
    apart = {} if joined else {"rotated_norm": 3, "swiglu": 2}
    assert calls == {"add_rms_norm": 1, **apart}


def test_models_without_a_step_of_fused_operators():
    model = tiny_model()
    model.config.rope_parameters = {"rope_type": "dynamic"}
    assert "rotary embedding (dynamic)" in why_not_llama(model)
    model.config.hidden_act = "gelu"
    assert why_not_llama(model) == "its activation is gelu"
    assert "is none of LlamaForCausalLM" in why_not_llama(torch.nn.Module().apply(give_config))


def give_config(module):
    module.config = tiny_config()


# -- generate --------------------------------------------------------------------------------------


def test_greedy_tokens_on_lm7(quantized_lm7):
    """Padded prompts of two lengths, one prompt, a second call: the same tokens, one cache each."""
    tokenizer = load_tokenizer(LM7)
    tokenizer.padding_side, tokenizer.pad_token = "left", tokenizer.eos_token
    model = copy.deepcopy(quantized_lm7)
    two = tokenizer(["The old man", "Once upon a time there was a"], return_tensors="pt",
                    padding=True)  # fmt: skip
    one = tokenizer("The little", return_tensors="pt")
    options = {"do_sample": False, "max_new_tokens": 40, "pad_token_id": tokenizer.pad_token_id}
    expected = [model.generate(**batch, **options) for batch in (two, one)]
    prepare_for_generation(model)
    assert len(model.aqlm_generation.stacked) == 2 * model.config.num_hidden_layers
    runner = model.aqlm_generation.runner
    assert not runner.capture and "CUDA" in model.aqlm_generation.reason
    for _ in range(2):
        for batch, tokens in zip((two, one), expected, strict=True):
            assert torch.equal(model.generate(**batch, **options), tokens)
    assert runner.counts["bodies"] == 2
    assert runner.counts["replays"] == 2 * sum(
        tokens.shape[1] - batch["input_ids"].shape[1] - 1
        for batch, tokens in zip((two, one), expected, strict=True)
    )


@pytest.mark.parametrize("batch", [1, 16, 64])
def test_batches(stepping, batch):
    model = random_model(wide_config(), "aqlm-1x8-g8", torch.float32)
    ids = torch.randint(1, 97, (batch, 5), generator=torch.Generator().manual_seed(0))
    expected = model.generate(ids, **GREEDY)
    runner = stepping(model)
    assert torch.equal(model.generate(ids, **GREEDY), expected)
    assert runner.counts["replays"] == 11


def test_sampling_and_streaming(stepping, quantized_lm7):
    model = copy.deepcopy(quantized_lm7)
    tokenizer = load_tokenizer(LM7)
    ids = tokenizer("The old", return_tensors="pt")
    options = {"do_sample": True, "top_k": 20, "temperature": 0.8, "max_new_tokens": 20,
               "pad_token_id": 0}  # fmt: skip

    def run() -> tuple[torch.Tensor, str]:
        written = io.StringIO()
        streamer = TextStreamer(tokenizer, skip_prompt=True)
        streamer.on_finalized_text = lambda text, stream_end=False: written.write(text)
        torch.manual_seed(3)
        return model.generate(**ids, **options, streamer=streamer), written.getvalue()

    tokens, text = run()
    assert text
    runner = stepping(model)
    again, same_text = run()
    assert torch.equal(again, tokens) and same_text == text and runner.counts["replays"]


@pytest.mark.parametrize("device", DEVICES)
def test_sequences_that_end_early(stepping, device, monkeypatch):
    """End tokens, padding after them, and a step queued in vain; transformers' loop is not used."""
    model = random_model(wide_config(), "aqlm-1x8-g8", torch.float32, device)
    batch = prompts(device)
    free = model.generate(**batch, **GREEDY)[:, 8:]
    early, late = int(free[0, 3]), int(free[1, 7])
    for ends in ([early], [late], [early, late]):
        options = {**GREEDY, "eos_token_id": ends}
        expected = model.generate(**batch, **options)
        with monkeypatch.context() as patch:
            patch.setattr(type(model), "_sample", None)
            runner = stepping(model)
            assert torch.equal(model.generate(**batch, **options), expected)
            in_vain = device != "cpu"  # where the host does not wait for the step
            assert runner.counts["replays"] == min(expected.shape[1] - 9 + in_vain, 11)
            runner.uninstall()


def test_masks_of_earlier_calls_are_forgotten(stepping):
    model = random_model(wide_config(), "aqlm-1x8-g8", torch.float32)
    long = {"input_ids": torch.arange(1, 17)[None], "attention_mask": torch.ones(1, 16).long()}
    long["attention_mask"][0, :14] = 0
    short = {"input_ids": torch.arange(1, 7)[None], "attention_mask": torch.ones(1, 6).long()}
    short["attention_mask"][0, :2] = 0
    expected = [model.generate(**batch, **GREEDY) for batch in (long, short)]
    stepping(model)
    for batch, tokens in zip((long, short, long), (*expected, expected[0]), strict=True):
        assert torch.equal(model.generate(**batch, **GREEDY), tokens)


def test_what_a_step_cannot_answer_runs_in_the_model(stepping):
    model = random_model(wide_config(), "aqlm-1x8-g8", torch.float32)
    batch = prompts()
    beams = model.generate(**batch, **GREEDY, num_beams=2)
    states = model.generate(**batch, **GREEDY, output_hidden_states=True,
                            return_dict_in_generate=True)  # fmt: skip
    runner = stepping(model)
    assert torch.equal(model.generate(**batch, **GREEDY, num_beams=2), beams)
    assert runner.counts["replays"] == runner.counts["bodies"] == 0
    again = model.generate(**batch, **GREEDY, output_hidden_states=True,
                           return_dict_in_generate=True)  # fmt: skip
    assert torch.equal(again.sequences, states.sequences)
    assert len(again.hidden_states) == 12 and runner.counts["replays"] == 0
    with torch.no_grad():  # a plain call, and one of several tokens on a cache of ours
        model(batch["input_ids"])
    assert runner.counts["replays"] == 0


def test_embedded_prompts_and_methods_put_in_front(stepping):
    """Prompts as embeddings; methods that others set on the model (accelerate does) are kept."""
    model = random_model(wide_config(), "aqlm-1x8-g8", torch.float32)
    own = model.forward
    seen = []

    def forward(*args, **kwargs):
        seen.append(kwargs)
        return own(*args, **kwargs)

    forward.__signature__ = inspect.signature(own)
    model.forward = forward
    embedded = model.get_input_embeddings()(prompts()["input_ids"]).detach()
    mask = prompts()["attention_mask"]
    expected = model.generate(inputs_embeds=embedded, attention_mask=mask, **GREEDY)
    runner = stepping(model)
    seen.clear()
    again = model.generate(inputs_embeds=embedded, attention_mask=mask, **GREEDY)
    assert torch.equal(again, expected)
    assert len(seen) == 1 and runner.counts["replays"] == 11
    runner.uninstall()
    assert model.forward is forward


def test_caches_are_reused_unless_somebody_holds_them(stepping):
    model = random_model(wide_config(), "aqlm-1x8-g8", torch.float32)
    runner = stepping(model, max_graphs=2)
    batch = prompts()
    kept = model.generate(**batch, **GREEDY, return_dict_in_generate=True)
    assert isinstance(kept.past_key_values, StepCache)
    assert kept.past_key_values.filled == kept.past_key_values.get_seq_length() == 19
    keys = kept.past_key_values.layers[0].keys.clone()
    model.generate(**batch, **GREEDY)
    assert runner.counts["bodies"] == 2
    assert torch.equal(kept.past_key_values.layers[0].keys, keys)
    # Going on from a cache: the model sees the rest of the tokens, then steps again.
    longer = model.generate(
        kept.sequences, attention_mask=torch.ones_like(kept.sequences),
        past_key_values=kept.past_key_values, **GREEDY,
    )  # fmt: skip
    assert longer.shape[1] == kept.sequences.shape[1] + 12
    del kept
    for _ in range(3):
        model.generate(**batch, **GREEDY)
    assert runner.counts["bodies"] == 2
    model.generate(batch["input_ids"][:1], **GREEDY)
    assert runner.counts["bodies"] == 3 and len(runner._slots) == 2


def test_new_weights_drop_the_graphs(stepping):
    model = random_model(wide_config(), "aqlm-1x8-g8", torch.float32)
    runner = stepping(model)
    batch = prompts()
    model.generate(**batch, **GREEDY)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.roll(1, 0))
    expected = type(model).generate(copy.deepcopy(model), **batch, **GREEDY)
    assert torch.equal(model.generate(**batch, **GREEDY), expected)
    assert runner.counts["bodies"] == 2


def test_step_layers_are_not_registered_with_transformers():
    from transformers.cache_utils import STATIC_LAYER_TYPE_MAPPING

    assert StepLayer not in STATIC_LAYER_TYPE_MAPPING.values()


# -- undoing ---------------------------------------------------------------------------------------


def test_undoing_leaves_no_trace(quantized_lm7):
    model = copy.deepcopy(quantized_lm7)
    before, modules = set(vars(model)), [(n, type(m)) for n, m in model.named_modules()]
    hooks = sum(len(m._forward_hooks) for m in model.modules())
    prepare_for_generation(model, lm_head="rtn-int8-g64")
    copied = copy.deepcopy(model)
    undo_prepare_for_generation(model)
    assert set(vars(model)) == before
    assert [(n, type(m)) for n, m in model.named_modules()] == modules
    assert sum(len(m._forward_hooks) for m in model.modules()) == hooks
    assert copied.aqlm_generation.stacked and copied.lm_head.format.bits == 8


# -- bad input -------------------------------------------------------------------------------------


def test_bad_models_and_options():
    with pytest.raises(GenerationSetupError, match="LlamaForCausalLM has no quantized layer"):
        prepare_for_generation(tiny_model())
    model = random_model(wide_config(), "aqlm-1x8-g8", torch.float32)
    with pytest.raises(GenerationSetupError, match="graphs need a CUDA device"):
        prepare_for_generation(model, graphs=True)
    with pytest.raises(GenerationSetupError, match="max_graphs=0"):
        prepare_for_generation(model, max_graphs=0)
    with pytest.raises(GenerationSetupError, match="is not prepared"):
        undo_prepare_for_generation(model)
    prepare_for_generation(model)
    with pytest.raises(GenerationSetupError, match="prepared already"):
        prepare_for_generation(model)
    meta = random_model(wide_config(), "aqlm-1x8-g8", torch.float32)
    meta.lm_head = torch.nn.Linear(128, 97, bias=False, device="meta")
    with pytest.raises(GenerationSetupError, match="meta device"):
        prepare_for_generation(meta)


@pytest.mark.gpu
def test_mixed_devices():
    model = random_model(wide_config(), "aqlm-1x8-g8", torch.float32, "cuda")
    model.lm_head.cpu()
    with pytest.raises(GenerationSetupError, match="spread over cpu, cuda:0"):
        prepare_for_generation(model)


def test_an_unsupported_gpu(monkeypatch):
    with pytest.raises(GenerationSetupError, match=r"cuda:0 has compute capability 7\.5; the kern"):
        check_capability((7, 5), "cuda:0")
    check_capability((8, 0), "cuda:0")


def test_a_prompt_longer_than_the_cache(stepping):
    model = random_model(wide_config(), "aqlm-1x8-g8", torch.float32)
    runner = stepping(model, max_length=16)
    batch = prompts()
    assert model.generate(**batch, **{**GREEDY, "max_new_tokens": 9}).shape == (2, 17)
    with pytest.raises(GenerationSetupError, match="need 19 cached positions, .* at most 16"):
        model.generate(**batch, **GREEDY)
    cache = runner.cache(2, 10)
    with torch.no_grad():
        with pytest.raises(GenerationSetupError, match="17 new tokens after 0 do not fit"):
            model(torch.ones(2, 17, dtype=torch.long), past_key_values=cache)
        model(torch.ones(2, 16, dtype=torch.long), past_key_values=cache)
        with pytest.raises(GenerationSetupError, match="1 new tokens after 16 do not fit"):
            model(input_ids=torch.ones(2, 1, dtype=torch.long), past_key_values=cache)
        plain = StaticCache(config=model.config, max_cache_len=4)
        with pytest.raises(GenerationSetupError, match="8 new tokens after 0 do not fit"):
            model(batch["input_ids"], past_key_values=plain)


def test_models_that_cannot_be_captured(monkeypatch):
    cuda = {torch.device("cuda", 0)}
    model = tiny_model()
    assert prepare._why_not_captured(model, cuda) is None
    assert "2 devices" in prepare._why_not_captured(model, cuda | {torch.device("cuda", 1)})
    sliding = AutoModelForCausalLM.from_config(
        MistralConfig(**{**tiny_config().to_dict(), "model_type": "mistral",
                         "sliding_window": 8, "architectures": None})
    )  # fmt: skip
    assert "StaticSlidingWindowLayer" in prepare._why_not_captured(sliding, cuda)
    monkeypatch.setattr(type(model), "_can_compile_fullgraph", False)
    assert "cannot be compiled" in prepare._why_not_captured(model, cuda)
