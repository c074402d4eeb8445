"""The timing harness: what is timed, what a row holds, and the tables made from rows."""

import importlib.util
import json
import sys
from itertools import product
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_model
from torch import nn

from aqlm_infer.backends import native
from aqlm_infer.bench import BenchError, append_rows, bench_matmul, matmul_cases, time_calls
from aqlm_infer.bench.generate import Dense, bench_generate, quantized_copy
from aqlm_infer.bench.layers import DRAM_BYTES, copies_for, random_tensors, verified_error
from aqlm_infer.bench.matmul import cpu_isa, num_threads
from aqlm_infer.bench.plot import plot_generate
from aqlm_infer.bench.shapes import SHAPES, random_model, shape_config
from aqlm_infer.bench.timing import GRAPH_CALLS, summarize, time_graph
from aqlm_infer.formats import FormatError, parse_scheme
from aqlm_infer.layers import FusedPart

MATMUL_KEYS = {
    "bench", "date", "commit", "device", "device_name", "backend", "scheme", "precision", "dtype",
    "threads", "cache", "N", "K", "M", "median_us", "p20_us", "p80_us", "min_us", "gb_per_s",
    "read_gb_per_s", "dense_us", "dense_bf16_us", "command",
}  # fmt: skip
GENERATE_KEYS = {
    "bench", "date", "commit", "device", "backend", "model", "scheme", "batch", "tokens_per_s",
    "dense_tokens_per_s", "ttft_ms", "dense_ttft_ms", "bytes", "threads", "dtype", "mode",
    "dense_compiled_tokens_per_s", "dense_compiled_ttft_ms", "prompt_tokens", "new_tokens",
    "lm_head", "peak_bytes",
}  # fmt: skip

needs_native = pytest.mark.skipif(native.cpu is None, reason="the CPU module is not built")


def test_calls_rotate_after_three_untimed_ones():
    seen = []
    calls = [lambda i=i: seen.append(i) for i in range(4)]
    timing = time_calls(calls, min_calls=10, min_seconds=0.0)
    assert timing.calls == 10
    assert seen == [0, 1, 2, *(i % 4 for i in range(10))]
    assert timing.min_us <= timing.p20_us <= timing.median_us <= timing.p80_us


def test_a_slow_case_stops_early():
    timing = time_calls([lambda: None], min_calls=10**9, min_seconds=1e9, max_seconds=0.01)
    assert 3 <= timing.calls < 10**9


def test_summary():
    timing = summarize([n * 1000 for n in range(1, 12)])
    assert (timing.min_us, timing.p20_us, timing.median_us, timing.p80_us) == (1, 3, 6, 9)


def test_copies_outrun_the_caches():
    assert copies_for("warm", 4 << 20) == 1
    assert copies_for("dram", 4 << 20) * (4 << 20) == DRAM_BYTES
    assert copies_for("dram", DRAM_BYTES * 2) == 2


def test_a_wrong_result_is_never_timed():
    x, weight = torch.randn(2, 32), torch.randn(16, 32, dtype=torch.float64)
    right = (x.double() @ weight.T).float()
    assert verified_error(right, x, weight, "exact", "case") < 1e-6
    for wrong in (right * 1.001, right * float("nan")):
        with pytest.raises(BenchError, match="nothing timed"):
            verified_error(wrong, x, weight, "exact", "case")


@pytest.mark.parametrize(
    "scheme", ["aqlm-2x8-g8", "aqlm-1x12-g8", "aqlm-1x16-g8", "aqlm-3x5-g4-o2"]
)
def test_random_layers_are_valid(scheme):
    format = parse_scheme(scheme)
    tensors = random_tensors(format, 48, 64, torch.float16, seed=1)
    format.check_tensors(tensors, 48, 64)
    codes = format.unpack_codes(tensors["codes"])
    assert codes.max() > format.entries // 2


def short_timing(monkeypatch):
    """Time few calls: the tests look at rows, not at speed."""
    monkeypatch.setattr(time_calls, "__kwdefaults__", {
        **time_calls.__kwdefaults__, "min_calls": 3, "min_seconds": 0.0
    })  # fmt: skip


def test_matmul_rows(monkeypatch, tmp_path):
    short_timing(monkeypatch)
    monkeypatch.setattr("aqlm_infer.bench.layers.DRAM_BYTES", 1 << 18)
    cases = matmul_cases(["aqlm-2x8-g8"], [(256, 128)], (1, 3), (1, 2), ("warm", "dram"))
    rows = list(bench_matmul(cases))
    assert len(rows) == 8
    for row in rows:
        assert row.keys() >= MATMUL_KEYS
        assert row["backend"] == ("ref" if native.cpu is None else "cpu")
        assert row["median_us"] > 0 and row["dense_us"] > 0 and row["dense_bf16_us"] > 0
        assert row["device"].startswith("cpu-")
    assert [(r["cache"], r["threads"], r["M"]) for r in rows[:4]] == [
        ("warm", 1, 1), ("warm", 1, 3), ("warm", 2, 1), ("warm", 2, 3),
    ]  # fmt: skip
    out = tmp_path / "deep" / "rows.jsonl"
    append_rows(out, rows[:3])
    append_rows(out, rows[3:])
    assert [json.loads(line) for line in out.read_text().splitlines()] == rows


@needs_native
def test_forced_kernels_and_instruction_sets(monkeypatch):
    short_timing(monkeypatch)
    chosen = native.cpu.isa()
    cases = matmul_cases(["aqlm-2x8-g8"], [(64, 64)], kernel="ref.dequant")
    (row,) = bench_matmul(cases)
    assert (row["backend"], row["kernel"]) == ("ref", "ref.dequant")
    cases = matmul_cases(["aqlm-2x8-g8"], [(64, 64)])
    (row,) = bench_matmul(cases, isa="portable")
    assert row["device"] == "cpu-portable"
    assert native.cpu.isa() == chosen
    with pytest.raises(ValueError, match="nonsense"), cpu_isa("nonsense"):
        pass


def test_thread_count_is_restored():
    before = torch.get_num_threads()
    with num_threads(1):
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before


def test_matmul_cases_are_checked():
    with pytest.raises(FormatError, match="K=100 is not a multiple of 8"):
        matmul_cases(["aqlm-2x8-g8"], [(64, 100)])
    with pytest.raises(FormatError, match="unknown scheme"):
        matmul_cases(["int3"], [(64, 64)])
    with pytest.raises(BenchError, match="not 0"):
        matmul_cases(["aqlm-2x8-g8"], [(64, 64)], (0,))


def test_generate_rows():
    dense = tiny_model()
    quantized = quantized_copy(dense, "aqlm-1x4-g8", "exact", progress=False)
    options = {"new_tokens": 4, "modes": ("eager", "no-graph", "prepared"), "prompt_tokens": (3, 5)}
    rows = list(bench_generate("tiny", quantized, Dense(dense), batches=(1, 2), **options))
    cases = [(row["mode"], row["batch"], row["prompt_tokens"]) for row in rows]
    assert cases == list(product(("eager", "no-graph", "prepared"), (1, 2), (3, 5)))
    for row in rows:
        assert row.keys() >= GENERATE_KEYS
        assert (row["model"], row["scheme"]) == ("tiny", "aqlm-1x4-g8")
        assert row["context"] == row["prompt_tokens"] + 4
        assert 0 < row["p20_tokens_per_s"] <= row["tokens_per_s"] <= row["p80_tokens_per_s"]
        assert row["dense_tokens_per_s"] > 0 and row["dense_compiled_tokens_per_s"] is None
        assert 0 < row["bytes"] < row["dense_bytes"]
        assert ("times_dense" in row) == (row["mode"] != "prepared")
    rounds = [ours / theirs for ours, theirs in rows[0]["rounds"]]
    assert len(rounds) == 5
    assert 0.99 * min(rounds) <= rows[0]["times_dense"] <= 1.01 * max(rounds)
    assert not hasattr(quantized, "aqlm_generation")
    (row,) = bench_generate("tiny", quantized, None, new_tokens=4, lm_head="rtn-int8-g32")
    assert row["dense_tokens_per_s"] is row["dense_bytes"] is None
    assert row["lm_head"] == "rtn-int8-g32" and row["bytes"] != rows[0]["bytes"]
    with pytest.raises(BenchError, match="exceed the model's context of 64"):
        next(bench_generate("tiny", quantized, None, new_tokens=33))
    with pytest.raises(BenchError, match="unknown mode 'fast'"):
        next(bench_generate("tiny", quantized, None, new_tokens=3, modes=["fast"]))
    with pytest.raises(BenchError, match="needs mode prepared"):
        next(bench_generate("tiny", quantized, None, new_tokens=3, modes=["eager"], lm_head="x"))


def test_generate_plot(tmp_path):
    quantized = quantized_copy(tiny_model(), "aqlm-1x4-g8", "exact", progress=False)
    rows = list(bench_generate("tiny", quantized, None, batches=(1, 2), new_tokens=3))
    plot_generate(rows, tmp_path / "deep" / "plot.svg")
    assert "aqlm-1x4-g8, prepared" in (tmp_path / "deep" / "plot.svg").read_text()


@pytest.mark.parametrize("scheme", ["aqlm-2x8-g8", "quip-e8p-2bit", "gptq-int2-g128", None])
def test_models_of_a_shape(scheme, monkeypatch):
    monkeypatch.setitem(SHAPES["llama-3.2-1b"], "vocab_size", 100)
    config = shape_config("llama-3.2-1b", 1)
    model = random_model(config, scheme, torch.bfloat16)
    block = model.model.layers[0]
    parts = [block.self_attn.q_proj, block.self_attn.v_proj, block.mlp.gate_proj]
    assert [part.out_features for part in parts] == [2048, 512, 8192]
    assert sum(isinstance(m, nn.Linear) for m in block.modules()) == (7 if scheme is None else 0)
    assert isinstance(block.mlp.gate_proj, FusedPart) == (scheme == "quip-e8p-2bit")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    with torch.inference_mode():
        logits = model(torch.tensor([[1, 2, 3]])).logits
    assert torch.isfinite(logits).all() and 0.3 < logits.float().std() < 3
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))


def test_shapes_are_checked():
    assert shape_config("llama-3-70b").num_hidden_layers == 80
    with pytest.raises(BenchError, match="unknown shape 'llama-9'; known: llama-3-8b"):
        shape_config("llama-9")
    with pytest.raises(BenchError, match=r"layers=33 is outside 1\.\.32"):
        shape_config("llama-3-8b", 33)


def load_program(name):
    path = Path(__file__).parents[1] / "benchmarks" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def program(monkeypatch):
    """benchmarks/bench_matmul.py, with an ``aqlm`` that is not installed."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    module = load_program("bench_matmul")
    monkeypatch.setattr(module.peers, "missing_aqlm", lambda: "left out")
    return module


def run_program(program, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["bench_matmul.py", *map(str, arguments)])
    program.main()


def test_the_matmul_program_writes_rows(program, monkeypatch, tmp_path):
    short_timing(monkeypatch)
    monkeypatch.setattr("aqlm_infer.bench.layers.DRAM_BYTES", 1 << 18)
    out = tmp_path / "rows.jsonl"
    options = ("--shape", "64x128", "--m", 1, 3, "--threads", 1, "--scheme", "aqlm-2x8-g8")
    run_program(program, monkeypatch, "--out", out, *options)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    ours = [row for row in rows if row["scheme"] == "aqlm-2x8-g8"]
    assert {row["M"] for row in ours} == {1, 3} and {row["cache"] for row in ours} == {
        "warm", "dram",
    }  # fmt: skip
    assert all(row["aqlm_us"] is None and row["median_us"] > 0 for row in ours)
    assert {row["dtype"] for row in rows if row["scheme"] == "dense"} == {"float32", "bfloat16"}


def test_the_gpu_suite(program, monkeypatch):
    """Every scheme and M; peers before ours; int8 for few tokens; large batches last."""
    monkeypatch.setattr(program.peers, "missing_aqlm", lambda: None)
    schemes = ["aqlm-2x8-g8", "aqlm-4x8-g8"]
    arguments = program.argparse.Namespace(
        dtype="float16", device="cuda", m=(1, 2, 512), scheme=schemes, backend=[None]
    )
    steps = program.cuda_suite(arguments, [(256, 128), (512, 128)])
    assert all(case.cache == "dram" and isa is None for _, case, isa in steps)
    assert [case.M for _, case, _ in steps] == sorted(
        (case.M for _, case, _ in steps), key=lambda m: m > program.INT8_TOKENS
    )
    ours = {(c.scheme, c.N, c.M, c.precision) for what, c, _ in steps if what == "ours"}
    exact = {(s, n, m, "exact") for s in schemes for n in (256, 512) for m in (1, 2, 512)}
    assert ours == exact | {("aqlm-2x8-g8", n, m, "int8") for n in (256, 512) for m in (1, 2)}
    first = [what for what, c, _ in steps if (c.scheme, c.N, c.M) == ("aqlm-2x8-g8", 256, 1)]
    assert first == ["aqlm", "ours", "ours"]
    arguments.backend = ["tpu"]
    with pytest.raises(BenchError, match="--backend tpu: no kernel for aqlm-2x8-g8 .*no such"):
        program.cuda_suite(arguments, [(256, 128)])


@pytest.mark.gpu
def test_graph_timing_and_gpu_rows(monkeypatch):
    seen = []
    x = torch.ones(8, device="cuda")
    timing = time_graph([lambda: seen.append(x + 1)], replays=3)
    assert timing.calls == 3 and timing.median_us > 0
    assert len(seen) == 2 + GRAPH_CALLS
    monkeypatch.setattr("aqlm_infer.bench.layers.DRAM_BYTES", 1 << 18)
    monkeypatch.setattr("aqlm_infer.bench.matmul.copy_bandwidth", lambda device: 1000.0)
    fixed = {"dtype": "float16", "device": "cuda"}
    for precision in ("exact", "int8"):
        cases = matmul_cases(
            ["aqlm-2x8-g8"], [(256, 128)], (1, 70), caches=("dram",), precision=precision, **fixed
        )
        for row in bench_matmul(cases):
            assert row.keys() >= MATMUL_KEYS
            assert row["backend"] == "cuda" and row["copy_gb_per_s"] == 1000.0
            assert row["dense_us"] > 0 and row["dense_bf16_us"] is None
