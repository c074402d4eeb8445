"""Tables and plots from rows, and whether the documents are what the committed rows say."""

import json
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from aqlm_infer.bench import append_rows

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))  # its programs import one another as neighbours

import report  # noqa: E402
from reporting.models import generate  # noqa: E402
from reporting.plots import PLOTS  # noqa: E402
from reporting.rows import one_cpu, read_rows  # noqa: E402
from reporting.tables import TABLES  # noqa: E402


def matmul_row(**changes):
    row = {
        "bench": "matmul", "date": "2026-01-01T00:00:00+00:00", "commit": "0123456789abcdef",
        "device": "cpu-avx512vbmi", "device_name": "Test CPU", "cores": 2, "backend": "cpu",
        "scheme": "aqlm-2x8-g8", "precision": "exact", "dtype": "float32", "threads": 1,
        "cache": "dram", "N": 4096, "K": 4096, "M": 1, "median_us": 300.0, "min_us": 290.0,
        "gb_per_s": 14.0, "read_gb_per_s": 16.0, "dense_us": 2500.0, "dense_bf16_us": 1300.0,
    }  # fmt: skip
    return {**row, **changes}


def gpu_row(**changes):
    gpu = {"device": "cuda-sm90", "device_name": "Test GPU", "backend": "cuda", "cache": "dram"}
    return matmul_row(**{**gpu, "N": 28672, "K": 8192, "dtype": "float16", **changes})


def generate_row(**changes):
    row = {
        "bench": "generate", "date": "2026-01-01T00:00:00+00:00", "commit": None,
        "device": "cuda-sm90", "device_name": "Test GPU", "cores": 2, "backend": "cuda",
        "model": "llama-3-8b", "scheme": "aqlm-2x8-g8", "bits_per_weight": 2.01, "batch": 1,
        "threads": 1, "dtype": "float16", "tokens_per_s": 512.0, "dense_tokens_per_s": 111.0,
        "ttft_ms": 20.0, "dense_ttft_ms": 19.0,
    }  # fmt: skip
    return {**row, **changes}


@pytest.fixture
def run(monkeypatch, tmp_path):
    """The program on a document of ``tmp_path``, its rows and its plots."""

    def run_report(*arguments):
        folders = ("--results", tmp_path / "results", "--plots", tmp_path / "plots")
        monkeypatch.setattr(sys, "argv", ["report.py", *map(str, (*arguments, *folders))])
        report.main()

    (tmp_path / "results").mkdir()
    return run_report


def marked(kind: str, names) -> str:
    return "".join(f"<!-- {kind}:{n} -->\nold\n<!-- /{kind} -->\ntext {n}\n" for n in names)


def test_round_trip(run, tmp_path):
    rows = [
        matmul_row(median_us=999.0),
        matmul_row(date="2026-01-02T00:00:00+00:00"),
        matmul_row(precision="fast", median_us=160.0, gb_per_s=15.0),
        matmul_row(backend="aqlm", cache="warm", median_us=1500.0),
        matmul_row(M=16, cache="warm", median_us=900.0),
        matmul_row(cache="warm", median_us=222.0),
        matmul_row(device="cpu-portable", cache="warm", median_us=8888.0),
        matmul_row(device="cpu-avx2", date="2026-01-03T00:00:00+00:00", median_us=1111.0),
    ]
    document = tmp_path / "README.md"
    append_rows(tmp_path / "results" / "a.jsonl", rows)
    document.write_text(f"# Title\n{marked('table', TABLES)}end\n")
    with pytest.raises(SystemExit, match="out of date"):
        run("--check", document)
    assert "old" in document.read_text()
    run(document)
    text = document.read_text()
    assert "| `aqlm-2x8-g8` | 2.01 | 0.300 | 1.30 | 4.3x | 0.222 | 1.50 |" in text
    line = "| aqlm-2x8-g8 | 1 | dram | 0.300 | 0.160 |  | 2.50 | 1.30 | 14.0 | 94 % |"
    assert line in text
    assert "| aqlm-2x8-g8 | float32 | 16 | 0.900 |" in text
    assert "| aqlm-2x8-g8 | avx512vbmi | 0.222 |\n| aqlm-2x8-g8 | portable | 8.89 |" in text
    assert "old" not in text and "1.11" not in text and text.endswith("end\n")
    assert "Test CPU (2 cores, avx512vbmi). 2026-01-02, 012345678." in text
    run("--check", document)
    newer = matmul_row(date="2026-02-01T00:00:00+00:00", median_us=1.0)
    append_rows(tmp_path / "results" / "b.jsonl", [newer])
    with pytest.raises(SystemExit, match="out of date"):
        run("--check", document)


def test_tables_of_a_gpu():
    """A rotated layer has its rotations in it; what the ladder timed without them is apart."""
    rows = [gpu_row(M=M, median_us=M + 30.0, dense_us=100.0) for M in (1, 64)]
    e8p = {"scheme": "quip-e8p-2bit", "dense_us": 100.0}
    rows += [gpu_row(**e8p, median_us=23.0), gpu_row(**e8p, bench="layer", median_us=36.0)]
    rows.append(gpu_row(N=4096, K=4096, median_us=6.5, precision="int8"))
    rows.append(gpu_row(N=4096, K=4096, median_us=9.5, backend="triton"))
    text = TABLES["cuda-matmul"](rows)
    assert "| quip-e8p-2bit | 36.0 |  |" in text and "| aqlm-2x8-g8 | 31.0 | 94.0 |" in text
    assert "| dense fp16 (cuBLAS) | 100 | 100 |" in text
    assert text.index("4096 x 4096:") < text.index("28672 x 8192:")
    assert "| aqlm-2x8-g8 int8 | 6.50 |" in text and "| aqlm-2x8-g8 Triton | 9.50 |" in text
    alone = TABLES["cuda-alone"](rows)
    assert "| quip-e8p-2bit | 23.0 |" in alone and "aqlm" not in alone
    assert TABLES["cuda-short"](rows) == "No rows yet.\n"  # no scheme at all three shapes
    rows += [gpu_row(N=N, K=4096, median_us=7.0) for N in (4096, 14336)]
    assert "| `aqlm-2x8-g8` | 2.00 | 7.00 | 7.00 | 31.0 |" in TABLES["cuda-short"](rows)


def test_what_bench_matmul_times_is_a_layer(tmp_path):
    rows = [gpu_row(scheme="quip-int2", kernel="cuda.scalar.rotated"), gpu_row(kernel="cuda.x")]
    append_rows(tmp_path / "a.jsonl", [*rows, matmul_row(scheme="quip-int2", kernel="cpu.x")])
    assert [row["bench"] for row in read_rows(tmp_path)] == ["layer", "matmul", "matmul"]


def test_generation_shows_what_rows_have():
    """Columns without a value are left out; a head, a mode and another package are named."""
    rows = [
        generate_row(),
        generate_row(lm_head="int8", tokens_per_s=640.0, dense_compiled_tokens_per_s=188.0),
        generate_row(backend="aqlm", tokens_per_s=156.0, dense_tokens_per_s=None),
    ]
    text = generate(rows, cpu=False)
    assert "aqlm-2x8-g8, head int8 | 2.01 | float16 | 1 | 640 | 111 | 188 |" in text
    assert "aqlm-2x8-g8, aqlm | 2.01 | float16 | 1 | 156 |  |" in text
    assert "compiled" not in generate([generate_row()], cpu=False)
    assert generate(rows, cpu=True) == "No rows yet.\n"


def test_rows_of_an_unknown_bench_are_listed():
    text = TABLES["others"]([{**matmul_row(), "bench": "new"}, matmul_row()])
    assert "| new | Test CPU | 1 | 2026-01-01 |" in text and "matmul" not in text


def test_a_table_shows_one_cpu(run, tmp_path):
    many = [matmul_row(), matmul_row(cache="warm")]
    append_rows(tmp_path / "results" / "a.jsonl", [*many, matmul_row(device_name="Other Xeon")])
    rows = read_rows(tmp_path / "results")
    assert {r["device_name"] for r in one_cpu(rows)} == {"Test CPU"}
    document = tmp_path / "page.md"
    document.write_text("<!-- table:cpu-matmul on:Xeon -->\n<!-- /table -->\n")
    run(document)
    assert "Other Xeon" in document.read_text() and "Test CPU" not in document.read_text()


def test_plots(run, tmp_path):
    """Drawn once, again when a point moves, the same bytes from the same rows."""
    document, picture = tmp_path / "page.md", tmp_path / "plots" / "cuda-tokens.svg"
    document.write_text(marked("plot", PLOTS))
    rows = [gpu_row(M=M, median_us=20.0 + M) for M in (1, 4, 16)]
    rows += [gpu_row(M=1, median_us=300.0, backend="aqlm", dense_us=None), generate_row()]
    append_rows(tmp_path / "results" / "a.jsonl", rows)
    run(document)
    assert "![Test GPU](plots/cuda-tokens.svg)" in document.read_text()
    assert "<!-- plot:cpu-tokens -->\n\nNo rows yet." in document.read_text()
    assert {p.stem for p in picture.parent.iterdir()} == {"peers", "cuda-tokens", "speed-bits"}
    first = picture.read_bytes()
    assert len(first) < 200_000 and b"aqlm-2x8-g8" in first
    run("--check", document)
    picture.unlink()
    with pytest.raises(SystemExit, match="out of date.*cuda-tokens"):
        run("--check", document)
    run(document)
    assert picture.read_bytes() == first
    append_rows(tmp_path / "results" / "b.jsonl", [gpu_row(M=4, median_us=29.0, date="2027-01-01")])
    with pytest.raises(SystemExit, match="out of date.*cuda-tokens"):
        run("--check", document)


def test_every_plot_and_table_stands_any_subset_of_rows():
    """Each bench alone, each device alone, each row alone: a table, or a line that says none."""
    rows = read_rows(BENCHMARKS / "results")
    subsets = [[], *([row] for row in rows[::7])]
    for key in ("bench", "device", "scheme"):
        for value in sorted({row[key] for row in rows if key in row}):
            subsets.append([row for row in rows if row.get(key) == value])
    for subset in subsets:
        for make in TABLES.values():
            assert make(subset).endswith("\n")
        for make in PLOTS.values():
            plot = make(subset)
            assert plot is None or all(panel.series for panel in plot.panels)


def test_unknown_names_and_broken_rows_are_refused(run, tmp_path):
    document = tmp_path / "README.md"
    for kind in ("table", "plot"):
        document.write_text(f"<!-- {kind}:none -->\n<!-- /{kind} -->\n")
        with pytest.raises(SystemExit, match=f"unknown {kind} 'none'"):
            run(document)
    (tmp_path / "results" / "a.jsonl").write_text('{"bench": "matmul", "device": "cpu-x"}\n')
    with pytest.raises(SystemExit, match=r"a\.jsonl:1 has no date"):
        run(document)
    (tmp_path / "results" / "a.jsonl").write_text("{}{\n")
    with pytest.raises(SystemExit, match=r"a\.jsonl:1 is not a JSON row"):
        run(document)


def test_rows_are_ordered_by_date(tmp_path):
    dates = [f"2026-01-0{day}T00:00:00+00:00" for day in (3, 1, 2)]
    append_rows(tmp_path / "a.jsonl", [matmul_row(date=date) for date in dates])
    nested = {
        "bench": "tuning",
        "date": "2026-01-04",
        "device": "cuda-sm90",
        "rows": [{"a": 1}, {}],
    }
    (tmp_path / "b.json").write_text(json.dumps(nested, indent=1))
    found = read_rows(tmp_path)
    assert all(a["date"] <= b["date"] for a, b in pairwise(found)) and len(found) == 5
    assert [row.get("a") for row in found[3:]] == [1, None] and "rows" not in found[3]
    assert found[3]["device_name"] == "cuda-sm90"


def test_the_documents_are_up_to_date(monkeypatch):
    """Tables and pictures of README.md and docs/results.md are what the committed rows say."""
    monkeypatch.setattr(sys, "argv", ["report.py", "--check"])
    report.main()
