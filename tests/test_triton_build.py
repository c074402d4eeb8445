"""Triton kernels compile without a GPU, and the table of measured configurations is well formed."""

import json
import os
import subprocess
import sys
from importlib import resources

import pytest

pytest.importorskip("triton")

from aqlm_infer.triton_kernels import tuning

COMPILE = """
import sys, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from aqlm_infer.triton_kernels import additive, e8p, first, hadamard, partial, planes, scalar
from aqlm_infer.triton_kernels import scalar_integers as integers, words

A = {"B": 2, "ENTRIES": 256, "G": 8, "GP": 8}
S = {"BITS": 3, "C": 4, "NB": 2, "GROUPED": False, "ZEROS": True}
CASES = {
    "additive": [
        (additive._gemv, {**A, "BLOCK_N": 128, "BLOCK_G": 2}),
        (additive._dot, {**A, "OG": 1, "BLOCK_N": 64, "BLOCK_G": 8, "BLOCK_M": 16, "NATIVE": True,
                          "PRECISION": "ieee"}),
        (words._arrange, {"TILES": 1}),
        (words._words_dot, {"B": 2, "BOOKS": 1, "ENTRIES": 65536, "COPIES": 0, "BYTES": 0,
                            "ROWS": 2, "WIDTH": 4, "WIDE": True, "Q": 4, "FIRST": False,
                            "DEALT": True, "ASM": True, "WARPS": 4, "FEW": False, "BLOCK_M": 16}),
        (words._dequantize, {"B": 2, "ENTRIES": 256, "COPIES": 4, "BYTES": 32768, "ROWS": 2,
                             "ASM": True, "WARPS": 8}),
        (planes._planes, {"BLOCK": 256}),
        (planes._planes_dot, {"B": 1, "ROWS": 2, "WIDTH": 4, "WIDE": True, "Q": 4, "TILES": 1,
                              "ASM": True, "WARPS": 16, "FEW": True}),
        (additive._tables, {**A, "GROUPS": 8, "CHUNK": 1024}),
        (additive._lookup, {**A, "BLOCK_N": 512}),
        (additive._dequantize, {**A, "OG": 1, "BLOCK_N": 32, "BLOCK_G": 16}),
        (partial._finish, {"OG": 1, "UNIT": True, "SCALES": True, "BIAS": True, "BLOCK": 256}),
        (partial._sums, {"BLOCK": 1024}),
    ],
    "rotated": [
        (e8p._prepare, {"BLOCK": 1024}),
        (e8p._gemv, {"BITS": 3, "BLOCK_N": 256, "BLOCK_G": 4, "SHARED": True}),
        (e8p._dot, {"BITS": 4, "EXACT": False, "BLOCK_N": 64, "BLOCK_G": 8, "BLOCK_M": 16,
                    "SHARED": False, "FIRST": True, "PRECISION": "ieee"}),
        (e8p._dequantize, {"BITS": 3, "BLOCK_N": 64, "BLOCK_G": 8}),
        (e8p._quantize, {"TILES": 1, "BLOCK": 128, "CHUNK_K": 4096}),
        (e8p._integers, {"BITS": 2, "SHARED": False, "COPIES": 16, "ASM": True, "BLOCK_N": 64,
                         "BLOCK_G": 32}),
        (e8p._first_dot, {"BITS": 3, "COPIES": 0, "ASM": True, "BLOCK_N": 64, "BLOCK_M": 16}),
        (e8p._integer_dot, {"BITS": 4, "COPIES": 8, "ASM": True, "TILES": 1, "BLOCK_N": 64,
                            "BLOCK_M": 16}),
        (hadamard._rows, {"A": 32, "B": 32, "BP": 32, "PRE": True, "POST": False, "BIAS": False,
                          "EXACT": False, "TF32": True, "BLOCK_R": 32, "STEPS": 8}),
        (hadamard._mix, {"F": 28, "TRANSPOSE": False, "POST": True, "BIAS": True,
                         "TF32": True, "BLOCK_Q": 32, "BLOCK_J": 32, "BLOCK_B": 64, "STEPS": 8}),
    ],
    "scalar": [
        (scalar._prepare, {"BITS": 2, "C": 4, "TOGETHER": 4}),
        (scalar._gemv, {**S, "TOGETHER": 2, "BLOCK_N": 32}),
        (scalar._dot, {**S, "EVEN": False, "EXACT": False, "FIRST": False, "PRECISION": "ieee",
                       "BLOCK_N": 64,
                       "BLOCK_M": 32}),
        (scalar._dequantize, {"BITS": 3, "ZEROS": True, "ALIGNED": True, "BLOCK_N": 16}),
        (integers._quantize, {"BITS": 4, "C": 2, "GROUPED": False, "TILES": 2, "NB": 2,
                            "CHUNK": 4096}),
        (integers._integers, {"BITS": 2, "C": 2, "NB": 1, "GROUPED": True, "ZEROS": True,
                            "ASM": True, "BLOCK_N": 64}),
        (scalar._first_dot, {"BITS": 4, "C": 4, "GROUPED": True, "ZEROS": True, "ASM": True,
                             "BLOCK_N": 64, "BLOCK_M": 32}),
        (first._spread, {"FIELDS": True, "STEP": 4, "CHUNK": 128, "BLOCK_M": 32}),
        (integers._integer_dot, {"BITS": 2, "C": 2, "GROUPED": True, "ZEROS": True,
                               "PAIRED": True, "ASM": True, "TILES": 1, "BLOCK_N": 64,
                               "BLOCK_M": 16}),
    ],
}[sys.argv[1]]
TYPES = {
    "codes_ptr": "*i16", "rest_ptr": "*u8", "tables_ptr": "*i32", "words_ptr": "*i32",
    "partial_ptr": "*fp32", "unit_ptr": "*fp32", "widest_ptr": "*fp32", "sums_ptr": "*fp32",
    "out_ptr": "*fp32", "t_ptr": "*fp32", "h_ptr": "*i8", "residual": "fp32", "factor": "fp32",
    "scale": "fp32", "planes_ptr": "*i32",
}
for body, constants in CASES:
    values = {name: constants[name] for name in body.arg_names if name in constants}
    default = {n: "*fp16" if n.endswith("_ptr") else "i32" for n in body.arg_names}
    types = {n: "constexpr" if n in values else TYPES.get(n, t) for n, t in default.items()}
    if body is additive._lookup:
        types["tables_ptr"] = "*fp16"
    if body.__name__ == "_spread":
        types["out_ptr"] = "*fp16"
    elif body.__name__ in ("_quantize", "_arrange", "_planes"):
        types["out_ptr"] = "*i32"
    elif body.__name__.startswith("_integer") or body in (words._words_dot, planes._planes_dot):
        types["x_ptr"] = "*i32"
    at = {(body.arg_names.index(name),): value for name, value in values.items()}
    source = ASTSource(fn=body, signature=types, constexprs=at)
    target = GPUTarget("cuda", int(sys.argv[2]), 32)
    kernel = triton.compile(source, target=target, options={"num_warps": values.get("WARPS", 4)})
    assert kernel.asm["cubin"]
    if body is planes._planes_dot:
        # The buffers fill all of Triton's share: they begin where the table is put. The loop over
        # it must not move anything through shared memory.
        assert kernel.metadata.shared == 4 * (planes.BUFFERS * planes.BUFFER).value
        lines = kernel.asm["ttgir"].splitlines()
        dots = [i for i, line in enumerate(lines) if "tt.dot" in line]
        first = max(i for i in range(dots[0]) if "scf.for" in lines[i])
        moved = [line for line in lines[first : dots[-1]] if "convert_layout" in line]
        assert not moved, moved
print("compiled", len(CASES))
"""


@pytest.mark.parametrize(
    ("family", "arch", "count"),
    [("additive", 90, 12), ("rotated", 80, 10), ("scalar", 90, 9)],
)
def test_bodies_compile_without_a_gpu(family, arch, count, tmp_path):
    env = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    env.pop("TRITON_INTERPRET", None)
    run = subprocess.run(
        [sys.executable, "-c", COMPILE, family, str(arch)],
        env=env, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert run.stdout.strip() == f"compiled {count}", run.stderr[-2000:]


WRITTEN = """
import torch
import torch._higher_order_ops.triton_kernel_wrap as wrap
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from aqlm_infer.triton_kernels import e8p, planes, scalar_integers as integers, words

class NoGpu:
    def get_current_target(self): return GPUTarget("cuda", 90, 32)
    def get_current_device(self): return 0
    def get_active_torch_device(self): return torch.device("cpu")

if not torch.cuda.is_available():
    driver.set_active(NoGpu())
W = {"B": 2, "ENTRIES": 256, "BYTES": 32768, "ROWS": 4, "ASM": True}
E = {"BITS": 2, "COPIES": 16, "ASM": True, "residual": 0.0}
CASES = [
    (words._words_dot, {**W, "BOOKS": 1, "COPIES": 8, "WIDTH": 4, "WIDE": True, "Q": 4,
                        "FIRST": False, "DEALT": False, "WARPS": 4, "FEW": True, "BLOCK_M": 16}),
    (words._dequantize, {**W, "COPIES": 4, "WARPS": 8}),
    (planes._planes_dot, {"B": 1, "ROWS": 2, "WIDTH": 2, "WIDE": True, "Q": 4, "TILES": 2,
                          "ASM": True, "WARPS": 16, "FEW": False}),
    (e8p._integers, {**E, "SHARED": False, "BLOCK_N": 64, "BLOCK_G": 32}),
    (e8p._integer_dot, {**E, "TILES": 1, "BLOCK_N": 128, "BLOCK_M": 16}),
    (integers._integer_dot, {"BITS": 2, "C": 2, "GROUPED": True, "ZEROS": True, "PAIRED": True,
                           "ASM": True, "TILES": 1, "BLOCK_N": 64, "BLOCK_M": 16}),
    (e8p._first_dot, {**E, "BLOCK_N": 128, "BLOCK_M": 64, "x_ptr": torch.zeros(64).half()}),
]
TYPES = {
    "x_ptr": torch.int32, "tables_ptr": torch.int32, "words_ptr": torch.int32,
    "codes_ptr": torch.int16, "rest_ptr": torch.int16, "partial_ptr": torch.float32,
    "unit_ptr": torch.float32, "sums_ptr": torch.float32, "planes_ptr": torch.int32,
}
for body, constants in CASES:
    values = {n: torch.zeros(64, dtype=TYPES.get(n, torch.float16)) if n.endswith("_ptr") else 64
              for n in body.arg_names}
    if body is words._words_dot or body is words._dequantize:
        values["codes_ptr"] = torch.zeros(64, dtype=torch.int8)
    values |= constants
    if hasattr(wrap, "identify_accessed_tensors"):
        written = wrap.identify_accessed_tensors(body, values, {}).read_writes.writes
        print(body.__name__, *[dep.name for dep in written])
    else:
        print(body.__name__, *wrap.identify_mutated_tensors(body, values, {}))
"""


def test_torch_compile_sees_that_kernels_write_their_results_only(tmp_path):
    """An argument that it takes for written is copied in every compiled call, weights too."""
    env = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    env.pop("TRITON_INTERPRET", None)
    run = subprocess.run(
        [sys.executable, "-c", WRITTEN], env=env, capture_output=True, text=True, timeout=300
    )
    expected = ["_words_dot partial_ptr", "_dequantize w_ptr", "_planes_dot partial_ptr"]
    expected += ["_integers partial_ptr"] + ["_integer_dot partial_ptr"] * 2
    expected += ["_first_dot partial_ptr"]
    assert run.stdout.splitlines() == expected, run.stderr[-2000:]


NAMES = """
import sys
from aqlm_infer.backends.triton import kernels
for family in sys.argv[1:]:
    kernels(family)
from aqlm_infer.triton_kernels import e8p, planes, scalar, scalar_integers as integers, words
bodies = [e8p._integers, planes._planes_dot, scalar._dot, integers._integers, words._words_dot]
keys = {body: body.cache_key for body in (bodies if sys.argv[1] == "e8p" else bodies[::-1])}
print(*[keys[body] for body in bodies])
"""


def test_a_kernel_has_one_name_on_disk_whatever_was_loaded_first():
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    found = []
    for families in (["e8p", "additive", "scalar"], ["scalar", "e8p", "additive"]):
        run = subprocess.run(
            [sys.executable, "-c", NAMES, *families], env=env, capture_output=True, text=True
        )
        found.append(run.stdout.split())
    assert len(found[0]) == 5 and found[0] == found[1], run.stderr


ROWS = [
    {"scheme": "2bit", "N": 4096, "K": 4096, "M": 1, "config": {"body": "gemv", "BLOCK_N": 7}},
    {"scheme": "2bit", "N": 28672, "K": 8192, "M": 1, "config": {"body": "gemv", "BLOCK_N": 9}},
    {"scheme": "2bit", "N": 4096, "K": 4096, "M": 16, "config": {"body": "dot", "BLOCK_N": 3}},
]


@pytest.mark.parametrize(
    ("shape", "M", "found"),
    [((4096, 4096), 1, 7), ((14336, 4096), 1, 7), ((14336, 8192), 1, 9), ((57344, 16384), 1, 9),
     ((28672, 8192), 2, 3), ((28672, 8192), 16, 3)],
)  # fmt: skip
def test_the_nearest_shape_with_as_many_tokens_is_taken(shape, M, found):
    assert tuning.nearest(ROWS, "2bit", *shape, M)["BLOCK_N"] == found


def test_without_a_row_the_default_of_the_asked_body_is_taken(monkeypatch):
    assert tuning.nearest(ROWS, "2bit", 4096, 4096, 17) is None
    assert tuning.nearest(ROWS, "3bit", 4096, 4096, 1) is None
    monkeypatch.setattr(tuning, "device_name", lambda: "unknown-device")
    found = tuning.config("e8p", "2bit", 4096, 4096, 16, "dot")
    assert found == {**tuning.DEFAULTS["e8p.dot"], "body": "dot"}


def test_a_forced_config_fills_its_bodys_defaults():
    with tuning.forced({"body": "gemv", "BLOCK_N": 32}):
        found = tuning.config("scalar", "int2", 64, 64, 1, "dot")
    assert found == {**tuning.DEFAULTS["scalar.gemv"], "body": "gemv", "BLOCK_N": 32}


def test_shipped_tables_name_known_bodies_and_options():
    files = list(resources.files("aqlm_infer.triton_kernels").joinpath("configs").iterdir())
    assert files, "no table ships"
    for file in files:
        for family, rows in json.loads(file.read_text()).items():
            for row in rows:
                assert row["us"] > 0 and (row["M"] == 1 or row["config"]["body"].endswith("dot")), (
                    row
                )
                options = set(row["config"]) - {"body"}
                assert options <= set(tuning.DEFAULTS[f"{family}.{row['config']['body']}"]), row
