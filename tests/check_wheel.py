"""Checks a built wheel: its contents, and whether it works installed, with no source in reach.

    python tests/check_wheel.py dist/aqlm_infer-0.1.0+cpu-*.whl      (make test-wheel WHEEL=...)

The wheel goes into a fresh virtual environment through pip. Its dependencies are links to those of
the Python that runs this program, all but the editable install of the package itself. Tests and
example files are copied to a temporary folder and run there. ``--contents-only`` stops after the
first part. Any failure ends the program with status 1 and one line that says what is wrong.
"""

from __future__ import annotations

import argparse
import io
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import venv
import zipfile
from pathlib import Path

from elftools.elf.dynamic import DynamicSection
from elftools.elf.elffile import ELFFile

ROOT = Path(__file__).resolve().parents[1]
PIP = (sys.executable, "-m", "pip")
MEGABYTES = {"cpu": 5, "cuda": 60}
"""Limit of a wheel's size."""

NAME = re.compile(
    r"aqlm_infer-[\d.]+\+(?P<local>cpu|cu\d+)-(?P<python>cp\d+)-(?P<abi>cp\d+|abi3)-"
    r"manylinux_2_(?P<glibc>\d+)_(?P<machine>\w+)\.whl"
)
OURS = re.compile(
    r"aqlm_infer/((\w+/)*(\w+\.pyi?|py\.typed)|_(cpu|cuda)\.[\w.-]+\.so"
    r"|triton_kernels/configs/[\w-]+\.json)"
)
METADATA = re.compile(r"aqlm_infer-[\d.+\w]+\.dist-info/[\w./-]+")

SYSTEM = {"libc.so.6", "libm.so.6", "libgcc_s.so.1", "libstdc++.so.6", "ld-linux-x86-64.so.2"}
NEEDED = {"cpu": SYSTEM | {"libgomp.so.1"}, "cuda": SYSTEM | {"libtorch_cpu.so", "libc10.so"}}
"""Libraries that a native module may ask for: those of manylinux, and those that torch brings."""

SUITES = {
    "cpu": ["test_registry.py", "test_kernels_cpu.py", "test_kernels_cpu_rotated.py"],
    "cuda": ["test_kernels_cuda.py", "test_kernels_cuda_rotated.py"],
}
COMMON = ["installed_checks.py", "test_transformers.py::test_golden_logits"]


def fail(message: str) -> None:
    sys.exit(f"error: {message}")


def flavour(wheel: Path) -> str:
    """``cpu`` or ``cuda``. Fails for a name without a manylinux tag or a local version."""
    match = NAME.fullmatch(wheel.name)
    if match is None:
        fail(f"{wheel.name} is not named like a repaired wheel: {NAME.pattern}")
    kind = "cpu" if match["local"] == "cpu" else "cuda"
    if (match["abi"] == "abi3") != (kind == "cuda"):
        fail(f"{wheel.name}: the {kind} wheel has ABI tag {match['abi']}")
    return kind


SOURCES = (".py", ".pyi", ".json")


def source_files() -> set[str]:
    """The Python and data files that a wheel of this tree must hold, by their name in it."""
    trees = {
        ROOT / "aqlm_infer": "aqlm_infer",
        ROOT / "triton_kernels": "aqlm_infer/triton_kernels",
    }
    return {
        f"{name}/{file.relative_to(folder)}"
        for folder, name in trees.items()
        for file in (ROOT / folder).rglob("*")
        if file.suffix in SOURCES
    }


def check_native(name: str, data: bytes, kind: str) -> None:
    """A native module is stripped, needs nothing unusual and looks for it nowhere in particular."""
    elf = ELFFile(io.BytesIO(data))
    sections = {section.name for section in elf.iter_sections()}
    extra = sorted(s for s in sections if s == ".symtab" or s.startswith(".debug"))
    if extra:
        fail(f"{name} is not stripped: it has {', '.join(extra)}")
    tags = [
        tag
        for section in elf.iter_sections()
        if isinstance(section, DynamicSection)
        for tag in section.iter_tags()
    ]
    needed = {tag.needed for tag in tags if tag.entry.d_tag == "DT_NEEDED"}
    if needed - NEEDED[kind]:
        fail(f"{name} needs {sorted(needed - NEEDED[kind])}")
    paths = [tag.entry.d_tag for tag in tags if tag.entry.d_tag in ("DT_RPATH", "DT_RUNPATH")]
    if paths:
        fail(f"{name} has {paths}")


def check_contents(wheel: Path, sources: set[str]) -> str:
    """Fails unless the wheel holds ``sources``, one native module and nothing else; its flavour."""
    kind = flavour(wheel)
    size = wheel.stat().st_size / 1e6
    if size > MEGABYTES[kind]:
        fail(f"{wheel.name} has {size:.2f} MB, more than {MEGABYTES[kind]}")
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if not name.endswith("/")]
        strange = [n for n in names if not (OURS.fullmatch(n) or METADATA.fullmatch(n))]
        if strange:
            fail(f"{wheel.name} holds {', '.join(strange[:5])} ({len(strange)} such files)")
        held = {n for n in names if n.endswith(SOURCES) and OURS.fullmatch(n)}
        if held != sources:
            fail(f"{wheel.name}: missing or left over: {', '.join(sorted(held ^ sources))}")
        native = [n for n in names if n.endswith(".so")]
        if [n.split(".")[0] for n in native] != [f"aqlm_infer/_{kind}"]:
            fail(f"{wheel.name} holds {native}, not one module aqlm_infer/_{kind}")
        check_native(native[0], archive.read(native[0]), kind)
    print(f"{wheel.name}: {size:.2f} MB of at most {MEGABYTES[kind]}, {len(names)} files")
    return kind


def fresh_environment(folder: Path) -> Path:
    """A virtual environment with links to this Python's packages, without ours; its Python."""
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    command = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    site = Path(subprocess.check_output(command, text=True).strip())
    linked = folder / "dependencies"
    linked.mkdir()
    for place in dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib")):
        for entry in Path(place).iterdir():
            ours = "aqlm_infer" in entry.name or entry.suffix == ".pth"
            if not ours and not (linked / entry.name).exists():
                (linked / entry.name).symlink_to(entry)
    (site / "dependencies.pth").write_text(f"{linked}\n", encoding="utf-8")
    return python


def clean_variables(python: Path) -> dict[str, str]:
    """The process's variables without those that could lead to the source tree or the network."""
    dropped = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    kept = {k: v for k, v in os.environ.items() if k not in dropped and not k.startswith("AQLM_")}
    path = f"{python.parent}{os.pathsep}{os.environ['PATH']}"
    return {**kept, "PATH": path, "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "passive"}


def install(python: Path, wheel: Path) -> None:
    """pip, with its check that every dependency is there, and no index to take one from."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        python,
        "install",
        "-q",
        "--no-index",
        wheel,
    ]
    done = subprocess.run(command, env=clean_variables(python), capture_output=True, text=True)
    if done.returncode:
        fail(f"pip does not install {wheel.name}: {done.stderr.strip()[-500:]}")


def check_refused(wheel: Path, kind: str, folder: Path) -> None:
    """pip must not install the wheel for a Python that it was not built for."""
    other = "3.9" if kind == "cuda" else f"3.{sys.version_info.minor + 1}"
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--no-index",
        "--no-deps",
        "--target",
        folder,
    ]
    command += ["--only-binary=:all:", "--python-version", other, wheel]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 0 or "not a supported wheel on this platform" not in done.stderr:
        fail(f"pip installs {wheel.name} for Python {other}, or fails otherwise: {done.stderr}")


def run_suite(python: Path, folder: Path, wheel: Path, kind: str, options: list[str]) -> int:
    """The tests that concern a user of the wheel, in a copy outside the source tree."""
    skip = shutil.ignore_patterns("__pycache__", "*.pyc")
    for name in ("tests", "examples"):
        shutil.copytree(ROOT / name, folder / name, ignore=skip)
    shutil.copy(ROOT / "pyproject.toml", folder)
    tests = [f"tests/{name}" for name in COMMON + SUITES[kind]]
    command = [python, "-P", "-m", "pytest", "-p", "no:cacheprovider", *tests, *options]
    variables = {**clean_variables(python), "WHEEL_UNDER_TEST": wheel.name}
    return subprocess.run(command, cwd=folder, env=variables).returncode


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("wheels", nargs="+", type=Path, metavar="WHEEL")
    parser.add_argument("--contents-only", action="store_true")
    arguments, options = parser.parse_known_args()  # the rest goes to pytest
    for wheel in arguments.wheels:
        if not wheel.is_file():
            fail(f"{wheel} is no file: make wheel-cpu or make wheel-cuda builds one in dist/")
        kind = check_contents(wheel.resolve(), source_files())
        if arguments.contents_only:
            continue
        with tempfile.TemporaryDirectory(prefix="aqlm-wheel-") as temporary:
            folder = Path(temporary)
            python = fresh_environment(folder / "venv")
            check_refused(wheel.resolve(), kind, folder / "refused")
            install(python, wheel.resolve())
            (folder / "work").mkdir()
            status = run_suite(python, folder / "work", wheel, kind, options)
        if status:
            fail(f"{wheel.name}: pytest ended with status {status}")


if __name__ == "__main__":
    main()
