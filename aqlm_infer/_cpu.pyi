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
def dense_matvec(
    x: int,
    weight: int,
    row_stride: int,
    bias: int,
    y: int,
    dtype: str,
    N: int,
    K: int,
    num_threads: int,
) -> None: ...
def add_norm(
    x: int,
    x_stride: int,
    delta: int,
    delta_stride: int,
    weight: int,
    eps: float,
    total: int,
    y: int,
    dtype: str,
    M: int,
    N: int,
    num_threads: int,
) -> None: ...
def swiglu(
    gate: int,
    gate_stride: int,
    up: int,
    up_stride: int,
    y: int,
    dtype: str,
    M: int,
    N: int,
    num_threads: int,
) -> None: ...
def argmax(scores: int, stride: int, dtype: str, M: int, N: int, best: int) -> None: ...
def rope_attention(
    q: int,
    q_stride: tuple[int, int],
    key: int,
    key_stride: tuple[int, int],
    value: int,
    value_stride: tuple[int, int],
    cos: int,
    sin: int,
    ids: int,
    filled: int,
    keys: int,
    keys_stride: tuple[int, int, int],
    values: int,
    values_stride: tuple[int, int, int],
    mask: int,
    mask_stride: int,
    scale: float,
    y: int,
    dtype: str,
    sizes: tuple[int, int, int, int, int],
    num_threads: int,
) -> None:
    """``sizes``: sequences, query heads, key/value heads, head dimension, cached positions."""

class AdditivePlan:
    """Sizes and types of calls on layers that share x. Holds no addresses, so it never goes stale.

    ``prepare`` fills ``prepared_bytes`` bytes with forms of the codebooks that ``matmul`` would
    otherwise compute in every call; it compares them with the codebooks it is given. ``matmul``
    returns False, having done nothing, for an M at which decoding and a dense GEMM is faster.
    """

    def __init__(
        self,
        partitions: list[int],
        K: int,
        num_codebooks: int,
        nbits: int,
        in_group_size: int,
        out_group_size: int,
        param_dtype: str,
        x_dtype: str,
        precision: str,
    ) -> None: ...
    @property
    def packed_bytes(self) -> int: ...
    @property
    def prepared_bytes(self) -> int: ...
    def prepare(self, codebooks: int, prepared: int) -> None: ...
    def matmul(
        self,
        x: int,
        x_row_stride: int,
        packed: int,
        codebooks: int,
        scales: int,
        bias: int,
        prepared: int,
        y: int,
        y_row_stride: int,
        M: int,
        num_threads: int,
    ) -> bool: ...

class TiledWeight:
    """An E8P or scalar weight: sizes, and its products and decoding (csrc/cpu/tiled.h).

    ``scales``, ``zeros`` [N, groups] belong to scalar weights; ``zeros`` 0: the grid's middle.
    ``h``, ``factor``, ``block`` are the rotation of the outputs (factor 0: none).
    """

    @staticmethod
    def e8p(bits: int, residual: float, N: int, K: int) -> TiledWeight: ...
    @staticmethod
    def scalar(bits: int, group_size: int, N: int, K: int) -> TiledWeight: ...
    @property
    def packed_bytes(self) -> int: ...
    def matmul(
        self,
        x: int,
        x_row_stride: int,
        x_dtype: str,
        packed: int,
        scales: int,
        zeros: int,
        values_dtype: str,
        sv: int,
        bias: int,
        bias_dtype: str,
        h: int,
        factor: int,
        block: int,
        y: int,
        M: int,
        precision: str,
        num_threads: int,
    ) -> None: ...
    def decode(
        self,
        packed: int,
        scales: int,
        zeros: int,
        values_dtype: str,
        out: int,
        out_row_stride: int,
        out_dtype: str,
        row_begin: int,
        row_end: int,
        num_threads: int,
    ) -> None: ...

def e8p_pack(weight: TiledWeight, words: int, rest: int, packed: int, num_threads: int) -> None: ...
def e8p_unpack(
    weight: TiledWeight, packed: int, words: int, rest: int, num_threads: int
) -> None: ...
def scalar_pack(weight: TiledWeight, qweight: int, packed: int, num_threads: int) -> None: ...
def scalar_unpack(weight: TiledWeight, packed: int, qweight: int, num_threads: int) -> None: ...
def hadamard(
    x: int,
    x_row_stride: int,
    dtype: str,
    pre: int,
    post: int,
    h: int,
    factor: int,
    block: int,
    transpose: bool,
    y: int,
    M: int,
    n: int,
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
