"""The checks of a wheel, on wheels made up for them; ``make test-wheel`` runs them on real ones."""

import shutil
import sys
import zipfile
from pathlib import Path

import check_wheel
import pytest
from check_wheel import check_contents, check_native, clean_variables, flavour, source_files

from aqlm_infer.backends import native

NAME = "aqlm_infer-0.1.0+cpu-cp311-cp311-manylinux_2_34_x86_64.whl"
MODULE = "aqlm_infer/_cpu.cpython-311-x86_64-linux-gnu.so"
SOURCES = {"aqlm_infer/__init__.py", "aqlm_infer/triton_kernels/configs/gpu.json"}


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """Writes a wheel of these files; what stands in it for the native module is not looked into."""
    monkeypatch.setattr(check_wheel, "check_native", lambda *arguments: None)

    def write(*names: str, name: str = NAME, bulk: int = 0) -> Path:
        path = tmp_path / name
        with zipfile.ZipFile(path, "w") as archive:
            for one in (*SOURCES, "aqlm_infer-0.1.0+cpu.dist-info/RECORD", *names):
                archive.writestr(one, "x" * bulk)
        return path

    return write


def test_a_good_wheel(wheel, capsys):
    assert check_contents(wheel(MODULE), SOURCES) == "cpu"
    assert "MB of at most 5" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("extra", "complaint"),
    [
        (["aqlm_infer/kernel.cpp"], "holds aqlm_infer/kernel.cpp"),
        (["tests/test_x.py"], "holds tests/test_x.py"),
        (["aqlm_infer.libs/libgomp.so.1"], "holds aqlm_infer.libs/libgomp.so.1"),
        (["aqlm_infer/old.py"], "missing or left over: aqlm_infer/old.py"),
        (["aqlm_infer/_cuda.abi3.so"], "not one module aqlm_infer/_cpu"),
    ],
)
def test_what_does_not_belong_is_named(wheel, extra, complaint):
    with pytest.raises(SystemExit, match=complaint):
        check_contents(wheel(MODULE, *extra), SOURCES)


def test_what_is_missing_is_named(wheel):
    with pytest.raises(SystemExit, match=r"left over: aqlm_infer/new\.py"):
        check_contents(wheel(MODULE), SOURCES | {"aqlm_infer/new.py"})
    with pytest.raises(SystemExit, match="not one module"):
        check_contents(wheel(), SOURCES)


def test_a_large_wheel_is_refused(wheel):
    with pytest.raises(SystemExit, match=r"has 8\.00 MB, more than 5"):
        check_contents(wheel(MODULE, bulk=2_000_000), SOURCES)


@pytest.mark.parametrize(
    "name",
    [
        NAME.replace("manylinux_2_34", "linux"),
        NAME.replace("+cpu", ""),
        NAME.replace("+cpu", "+cu130"),
        NAME.replace("cp311-manylinux", "abi3-manylinux"),
    ],
)
def test_wrong_names_are_refused(name):
    with pytest.raises(SystemExit, match="error: aqlm_infer-0.1.0"):
        flavour(Path(name))


def test_a_module_with_symbols_or_strange_libraries_is_refused():
    """On libraries that are at hand: Python's interpreter needs libraries that no wheel may."""
    module = Path(native.cpu.__file__).read_bytes()
    check_native("_cpu", module, "cpu")
    with pytest.raises(SystemExit, match=r"_cuda needs \['libgomp.so.1'\]"):
        check_native("_cuda", module, "cuda")


def test_the_source_tree_is_what_a_wheel_holds():
    files = source_files()
    assert {"aqlm_infer/cli/app.py", "aqlm_infer/triton_kernels/additive.py"} <= files
    assert "aqlm_infer/_cpu.pyi" in files and not any("tests" in name for name in files)


def test_the_source_tree_is_out_of_reach(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/src")
    monkeypatch.setenv("AQLM_KERNEL", "ref.dequant")
    variables = clean_variables(Path("/venv/bin/python"))
    assert not {"PYTHONPATH", "AQLM_KERNEL"} & set(variables)
    assert variables["PATH"].startswith("/venv/bin:")


def test_a_module_for_another_torch_is_explained(monkeypatch):
    """What a torch without the symbols that the module needs leads to."""

    def broken(name):
        raise ImportError("undefined symbol: aoti_torch_call_dispatcher")

    monkeypatch.setattr(native.importlib, "import_module", broken)
    module, problem = native._load("_cuda")
    assert module is None
    assert problem.startswith("aqlm_infer._cuda does not load with torch ")
    assert problem.endswith("undefined symbol: aoti_torch_call_dispatcher")


def test_a_module_for_another_python_is_explained(tmp_path):
    shutil.copy(native.cpu.__file__, tmp_path / "_cpu.cpython-399-x86_64-linux-gnu.so")
    reason = native._why_absent("_cpu", tmp_path)
    assert "another Python (_cpu.cpython-399-x86_64-linux-gnu.so)" in reason
    assert f"not {sys.version_info.major}.{sys.version_info.minor}" in reason
    assert native._why_absent("_cuda", tmp_path) == "is not built"
