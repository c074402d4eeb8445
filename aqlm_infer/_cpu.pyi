"""Torch-free CPU kernels on raw buffers (csrc/bindings_cpu.cpp).

Pointers are ints (0: absent), strides are in elements, dtypes are "float32", "bfloat16" or
"float16". Functions raise ValueError, with the values, for what they cannot take.
"""

from typing import TypedDict

class KernelRow(TypedDict):
    id: str
    nbits: tuple[int, int]
    isas: list[str]

def features() -> dict[str, bool]: ...
def isa() -> str: ...
def set_isa(name: str) -> None: ...
def supported_isas() -> list[str]: ...
def kernel_table() -> list[KernelRow]: ...
def packed_nbytes(out_groups: int, in_groups: int, num_codebooks: int, nbits: int) -> int: ...
def matmul_max_m(
    num_codebooks: int, nbits: int, in_group_size: int, out_group_size: int, K: int
) -> int: ...
def advise_huge_pages(ptr: int, nbytes: int) -> bool: ...
def measure_read_bandwidth(ptr: int, nbytes: int, num_threads: int) -> float: ...
def additive_pack(
    codes: int,
    code_bytes: int,
    out_groups: int,
    in_groups: int,
    num_codebooks: int,
    nbits: int,
    packed: int,
    num_threads: int,
) -> None: ...
def additive_unpack(
    packed: int,
    out_groups: int,
    in_groups: int,
    num_codebooks: int,
    nbits: int,
    codes: int,
    code_bytes: int,
    num_threads: int,
) -> None: ...
def additive_matmul(
    x: int,
    x_row_stride: int,
    x_dtype: str,
    packed: int,
    codebooks: int,
    scales: int,
    bias: int,
    param_dtype: str,
    y: int,
    y_row_stride: int,
    M: int,
    N: int,
    K: int,
    num_codebooks: int,
    nbits: int,
    in_group_size: int,
    out_group_size: int,
    precision: str,
    num_threads: int,
) -> None: ...
def additive_dequantize(
    packed: int,
    codebooks: int,
    scales: int,
    param_dtype: str,
    out: int,
    out_row_stride: int,
    out_dtype: str,
    N: int,
    K: int,
    num_codebooks: int,
    nbits: int,
    in_group_size: int,
    out_group_size: int,
    out_group_begin: int,
    out_group_end: int,
    apply_scales: bool,
    num_threads: int,
) -> None: ...
