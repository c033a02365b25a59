"""The Triton kernels in Triton's interpreter, in a process of its own: there they cannot be compiled."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cxv_kernels._triton import TRITON_MISSING, interpreting

sys.path.insert(0, str(Path(__file__).parent))

from interpreter_support import INTERPRETER_BROKEN


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETER_BROKEN is not None, reason=str(INTERPRETER_BROKEN))
@pytest.mark.skipif(TRITON_MISSING is not None or interpreting(), reason=f"Triton: {TRITON_MISSING or 'interpreting'}")
def test_kernels_in_the_interpreter():
    here = Path(__file__).parent
    files = sorted((here / "interpreter").glob("test_*.py"))
    attention = [file for file in files if "attention" in file.name]  # as long as all the rest
    running = []
    for part in (attention, [file for file in files if file not in attention]):
        command = [sys.executable, "-m", "pytest", "-n", "0", "-p", "no:cacheprovider", *map(str, part)]
        environment = os.environ | {"TRITON_INTERPRET": "1"}
        pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        running.append(subprocess.Popen(command, env=environment, cwd=here.parent, **pipe))
    for child in running:
        printed, _ = child.communicate()
        assert child.returncode == 0, printed
        summary = printed.splitlines()[-1]
        assert "passed" in summary
        assert "skipped" not in summary
