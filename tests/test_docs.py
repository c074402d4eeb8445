"""Every command and program that the documents show runs, or is listed with the reason why not."""

import contextlib
import os
import re
import shlex
import subprocess
import sys
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
import torch
from documents import DOCUMENTS, LANGUAGES, ROOT, SKIPPED, STANDS_FOR, Snippet, fences, snippets

from aqlm_infer.backends import KERNELS
from aqlm_infer.calibration import quantize_checkpoint
from aqlm_infer.cli.app import main

SNIPPETS = [snippet for document in DOCUMENTS for snippet in snippets(document)]
LM7 = ROOT / "examples" / "lm7"
PLAN = re.compile(r"`plan\.yaml`:\n\n```yaml\n(.*?)```", re.DOTALL)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """What the documents take for granted: my-llama, its quantized form, a published one, a text.

    The models are the first block of ``examples/lm7``.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("world")
    model = AutoModelForCausalLM.from_pretrained(LM7, num_hidden_layers=1)
    model.save_pretrained(folder / "my-llama")
    AutoTokenizer.from_pretrained(LM7).save_pretrained(folder / "my-llama")
    for name in ("published", "my-llama-2bit"):
        quantize_checkpoint(folder / "my-llama", folder / name, "aqlm-1x4-g8")
    text = (ROOT / "examples" / "text" / "valid.txt").read_text(encoding="utf-8")
    (folder / "books.txt").write_text(text[:20_000], encoding="utf-8")
    plan = PLAN.search((ROOT / "docs" / "quantize.md").read_text(encoding="utf-8"))
    (folder / "plan.yaml").write_text(plan[1], encoding="utf-8")
    return folder


class Reader:
    """Follows one document from its top, in a folder of its own."""

    def __init__(self, document: Path, world: Path, folder: Path):
        self.steps = [s for s in snippets(document) if s.skip_reason is None]
        self.folder, self.names, self.done = folder, {"__name__": "__main__"}, 0
        for entry in world.iterdir():
            (folder / entry.name).symlink_to(entry)

    def run_up_to(self, snippet: Snippet) -> None:
        while self.done <= self.steps.index(snippet):
            step = self.steps[self.done]
            self.done += 1
            if step.language == "python":
                exec(compile(step.runnable, step.id, "exec"), self.names)
            else:
                run_command(step.runnable, self.folder)


def run_command(command: str, folder: Path) -> None:
    """``NAME=value ... aqlm-infer ARGUMENTS``, in this process where no variable is set."""
    words = shlex.split(command, comments=True)
    variables = dict(word.split("=", 1) for word in words if re.match(r"[A-Z_]+=", word))
    program, *arguments = words[len(variables) :]
    assert program == "aqlm-infer", f"{command}: neither aqlm-infer nor listed in SKIPPED"
    clear_target(arguments, folder)
    if variables:
        alone = [sys.executable, "-m", "aqlm_infer", *arguments]
        done = subprocess.run(
            alone, env={**os.environ, **variables}, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return
    with pytest.raises(SystemExit) as exit:  # a process of its own would import torch anew
        main(arguments)
    assert exit.value.code == 0, command


def clear_target(arguments: list[str], folder: Path) -> None:
    """--out of a document may be what its reader is assumed to have already: replace that."""
    if "--out" in arguments:
        target = folder / arguments[arguments.index("--out") + 1]
        if target.is_symlink():
            target.unlink()


@pytest.fixture(scope="module")
def readers(world, tmp_path_factory):
    """One reader a document; kernels that they register are forgotten afterwards."""
    kernels, threads = dict(KERNELS), torch.get_num_threads()
    yield {d: Reader(d, world, tmp_path_factory.mktemp(d.stem)) for d in DOCUMENTS}
    KERNELS.clear()
    KERNELS.update(kernels)
    torch.set_num_threads(threads)


@pytest.mark.parametrize("snippet", SNIPPETS, ids=lambda snippet: snippet.id)
def test_snippet(snippet, readers, capsys):
    if snippet.skip_reason:
        pytest.skip(snippet.skip_reason)
    reader = readers[snippet.document]
    with inside(reader.folder):
        reader.run_up_to(snippet)


@contextlib.contextmanager
def inside(folder: Path):
    """``contextlib.chdir``, which Python 3.10 lacks."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def test_every_block_has_a_language():
    for document in DOCUMENTS:
        for line, language, _ in fences(document):
            assert language in LANGUAGES, f"{document.name}:{line} has language {language!r}"


def test_nothing_is_listed_in_vain():
    """Each skip and each stand-in is for something that a document shows."""
    shown = "\n".join(snippet.text for snippet in SNIPPETS)
    for part in (*SKIPPED, *STANDS_FOR):
        assert part in shown, f"{part!r} is in no document"


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    named = {t for s in SNIPPETS for t in re.findall(r"^make ([\w-]+)", s.text)}
    assert {"demo", "test", "wheel-cpu", "wheel-cuda"} <= named
    for target in named:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_the_matrix_of_formats_names_every_kernel_and_no_other():
    text = (ROOT / "docs" / "formats.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`((?:cpu|cuda|triton|ref)\.[\w.*]+)`", text))
    kernels = [kernel for kernel in KERNELS if not kernel.startswith("demo.")]
    for kernel in kernels:
        assert any(fnmatchcase(kernel, pattern) for pattern in named), kernel
    for pattern in named:
        assert any(fnmatchcase(kernel, pattern) for kernel in kernels), pattern


def test_links_lead_somewhere():
    """Relative links of the documents: the file exists, and the heading where one is named."""
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", text):
            path, _, anchor = link.partition("#")
            target = document.parent / path if path else document
            assert target.exists(), f"{document.name}: {link}"
            if anchor:
                headings = re.findall(
                    r"^#+ (.+)$", target.read_text(encoding="utf-8"), re.MULTILINE
                )
                assert anchor in {h.lower().replace(" ", "-") for h in headings}, link
