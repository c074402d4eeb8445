"""Warpgroup MMAs whose A registers are overwritten while they may still be read, in an object file.

    python benchmarks/ladder/cuda/mma_hazards.py build/cuda/obj/wgmma_f16.o

An asynchronous MMA reads its A registers until a ``wait_group`` covers it. ptxas (13.0) moves plain
register copies to before that wait, without a warning, where the copied value lives on in a loop:
the first int8 body (2026-11-28) gave wrong sums on an H200 so. This reads the disassembly (of the
cuobjdump that triton ships), walks each loop of MMAs three times and prints every write to a
register of an unfinished MMA. It exits with 1 if there are any.
"""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

NO_RESULT = ("ST", "BRA", "SYNCS", "WARP", "BAR", "ISETP", "FSETP", "PLOP", "UBLK", "NOP", "RED")


def disassemble(path: Path) -> dict[str, list[tuple[int, str]]]:
    """(address, instruction) of each kernel."""
    tool = Path(find_spec("triton").origin).parent / "backends/nvidia/bin/cuobjdump"
    text = subprocess.run([tool, "--dump-sass", path], capture_output=True, text=True, check=True)
    kernels = {}
    for part in text.stdout.split("Function : ")[1:]:
        found = re.findall(r"^\s+/\*([0-9a-f]{4,5})\*/\s+(.*?);", part, re.M)
        kernels[part.split("\n")[0]] = [(int(a, 16), i.strip()) for a, i in found]
    return kernels


def written(instruction: str) -> set[int]:
    """Registers that an instruction writes."""
    words = re.match(
        r"([A-Z0-9_.]+)\s+R(\d+)\b", re.sub(r"^@!?U?P\d+\s+|^@!?PT\s+", "", instruction)
    )
    if not words or words[1].startswith(NO_RESULT) or "GMMA" in words[1]:
        return set()
    wide = ".64" in words[1] or "WIDE" in words[1] or words[1].startswith("CS2R")
    first, count = int(words[2]), 4 if ".128" in words[1] else 2 if wide else 1
    return set(range(first, first + count))


def mma_loop(code: list[tuple[int, str]]) -> range | None:
    """The shortest loop that holds a warpgroup MMA, as indices."""
    index = {address: i for i, (address, _) in enumerate(code)}
    loops = []
    for i, (address, instruction) in enumerate(code):
        jump = re.search(r"BRA.* 0x([0-9a-f]+)$", instruction)
        if jump and int(jump[1], 16) < address:
            body = range(index[int(jump[1], 16)], i + 1)
            if any("GMMA" in code[j][1] for j in body):
                loops.append(body)
    return min(loops, key=len, default=None)


def hazards(code: list[tuple[int, str]], loop: range) -> set[tuple[str, str]]:
    """(writing instruction, MMA) pairs."""
    unfinished: list[list[int]] = []  # committed groups, oldest first
    group: list[int] = []
    found = set()
    for i in [*loop] * 3:
        instruction = code[i][1]
        if "GMMA" in instruction:
            group.append(i)
            if "gsb0" in instruction:
                unfinished.append(group)
                group = []
        elif "WARPGROUP.DEPBAR" in instruction:
            left = int(re.search(r"gsb0, 0x(\w+)", instruction)[1], 16)
            unfinished = unfinished[max(0, len(unfinished) - left) :]
        else:
            registers = written(instruction)
            for mma in (m for one in [*unfinished, group] for m in one):
                a = re.search(r"GMMA\.\S+ R\d+, R(\d+), gdesc", code[mma][1])
                if a and registers & set(range(int(a[1]), int(a[1]) + 4)):
                    found.add((instruction, code[mma][1]))
    return found


def main() -> None:
    bad = 0
    for path in sys.argv[1:]:
        for name, code in disassemble(Path(path)).items():
            loop = mma_loop(code)
            if loop is None:
                continue
            found = sorted(hazards(code, loop))
            bad += len(found)
            print(f"{name}: {len(loop)} instructions, {len(found)} hazards", *found[:3], sep="\n  ")
    sys.exit(bad > 0)


if __name__ == "__main__":
    main()
