"""The suite itself: what a GPU with the CUDA wheel must be able to read of it."""

import subprocess
import sys
from pathlib import Path


def test_the_suite_can_be_read_without_the_cpu_module():
    """As on a GPU with the CUDA wheel: the tests of a file that cannot be read are lost."""
    code = (
        "import sys; sys.modules['aqlm_infer._cpu'] = None\n"
        "import pytest\n"
        "sys.exit(pytest.main(['--collect-only', '-q', '-m', 'gpu', sys.argv[1]]))\n"
    )
    here = str(Path(__file__).parent)
    run = subprocess.run([sys.executable, "-c", code, here], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
