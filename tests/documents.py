"""The commands and programs that the documents show, and what stands in for their placeholders."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "benchmarks" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
LANGUAGES = {"sh", "python", "yaml", "text"}

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)

SKIPPED = {
    "--device cuda": "needs a GPU",
    "--resume": "needs a killed run; tests/test_training_cli.py kills one",
    "torchrun": "needs two GPUs; tests/test_training_parallel.py runs it on two processes",
    "make test-wheel": "minutes; .ci/run does it",
    "make wheel": "minutes; .ci/run does it",
    "make demo": "a minute; .ci/run does it",
    "make lint": ".ci/run does it",
    "make test": "this suite",
    "sanitize_cpu.py": "minutes: another build of the CPU kernels",
    "pip install": "changes the environment; .ci/run installs the wheel in a fresh one",
    "bench_matmul.py": "minutes; tests/test_bench.py runs the program on small layers",
    "bench_generate.py": "minutes; tests/test_bench.py runs the measurement",
    "report.py": "writes the documents; tests/test_report.py runs it",
    "convert relaxml": "needs a QuIP# checkpoint; tests/test_cli_convert.py makes one",
}
"""Commands with this in them are not run, and why."""

STANDS_FOR = {
    # names
    "ISTA-DASLab/Llama-2-7b-AQLM-2Bit-2x8-hf": "published",
    # less of everything: a one-block model, few and short windows, small codebooks, small layers
    "aqlm-2x8-g8 --calibration": "aqlm-1x3-g8 --calibration",
    "--samples 256": "--samples 2 --seq-len 64",
    "--target-bits 3.2": "--target-bits 3.2 --samples 2 --seq-len 64",
    "--fine-tune": "--fine-tune --epochs 1",
    "--teacher": "--steps 2 --batch 2 --seq-len 32 --valid-windows 2 --teacher",
    " --steps 300": "",
    "held-out.txt": "books.txt",
    "--text ": "--windows 1 --text ",
    "--prompt": "--max-new-tokens 4 --prompt",
    "max_new_tokens=64": "max_new_tokens=4",
    "4096x4096 --m": "128x256 --m",
    "1024x1024": "128x256",
    "--new-tokens 32": "--new-tokens 4",
}
"""What a document says, and what is run in its place; all else is run as it stands."""


@dataclass(frozen=True)
class Snippet:
    """One shell command, or one Python block, of a document."""

    document: Path
    line: int
    language: str
    text: str

    @property
    def id(self) -> str:
        words = " ".join(self.text.split())
        shown = "python" if self.language == "python" else words[:60]
        return f"{self.document.relative_to(ROOT)}:{self.line} {shown}"

    @property
    def skip_reason(self) -> str | None:
        return next((why for part, why in SKIPPED.items() if part in self.text), None)

    @property
    def runnable(self) -> str:
        """The text with what stands for its placeholders."""
        text = self.text
        for shown, run in STANDS_FOR.items():
            text = text.replace(shown, run)
        return text


def fences(document: Path) -> list[tuple[int, str, str]]:
    """(line, language, body) of every fenced block."""
    text = document.read_text(encoding="utf-8")
    return [(text.count("\n", 0, m.start()) + 2, m[1], m[2]) for m in _FENCE.finditer(text)]


def snippets(document: Path) -> list[Snippet]:
    """Python blocks whole, shell blocks command by command, in the document's order."""
    found = []
    for line, language, body in fences(document):
        if language == "python":
            found.append(Snippet(document, line, language, body))
        elif language == "sh":
            for offset, command in enumerate(body.splitlines()):
                if shlex.split(command, comments=True):
                    found.append(Snippet(document, line + offset, language, command))
    return found
