"""What every benchmark row says about where it was measured, and how rows are kept."""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterable, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from ..backends import native
from ..version import __version__

Row = dict[str, Any]


def commit() -> str | None:
    """The commit of the checkout that this package runs from, "-dirty" appended when tracked files
    differ from it. An installed package has none, but what AQLM_COMMIT says it was built from.
    """
    if os.environ.get("AQLM_COMMIT"):
        return os.environ["AQLM_COMMIT"]
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def cpu_isa() -> str:
    """The instruction set that the CPU kernels run, torch's when they are not built."""
    if native.cpu is not None:
        return native.cpu.isa()
    return torch.backends.cpu.get_cpu_capability().lower().replace(" ", "")


def device_id(device: str = "cpu") -> str:
    """Short name of the device class: ``cpu-avx512vbmi``, ``cuda-sm90``."""
    if device == "cpu":
        return f"cpu-{cpu_isa()}"
    major, minor = torch.cuda.get_device_capability(device)
    return f"cuda-sm{major}{minor}"


def device_name(device: str = "cpu") -> str:
    """The product name of the processor or GPU."""
    if device != "cpu":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def command() -> str:
    """The command line that is running."""
    program = Path(sys.argv[0]).name
    return shlex.join(["aqlm-infer" if program == "__main__.py" else program, *sys.argv[1:]])


def environment(bench: str, device: str = "cpu") -> Row:
    """The fields that every row of one run shares."""
    return {
        "bench": bench,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "version": __version__,
        "torch": torch.__version__,
        "device": device_id(device),
        "device_name": device_name(device),
        "cores": os.cpu_count(),
        "command": command(),
    }


def rounded(row: Mapping[str, Any], digits: int = 4) -> Row:
    """The row with its floats cut to ``digits`` significant digits, which timings do not exceed."""
    return {k: float(f"{v:.{digits}g}") if isinstance(v, float) else v for k, v in row.items()}


def append_rows(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Append rows to a JSON-lines file, making its folder."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row) + "\n")
