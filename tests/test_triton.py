"""The Triton kernels in Triton's interpreter, in a process of its own: there they cannot be compiled."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cxv_kernels._triton import TRITON_MISSING, interpreting


@pytest.mark.slow
@pytest.mark.skipif(TRITON_MISSING is not None or interpreting(), reason=f"Triton: {TRITON_MISSING or 'interpreting'}")
def test_kernels_in_the_interpreter():
    here = Path(__file__).parent
    command = [sys.executable, "-m", "pytest", "-n", "0", "-p", "no:cacheprovider", str(here / "interpreter")]
    child = subprocess.run(
        command, env=os.environ | {"TRITON_INTERPRET": "1"}, cwd=here.parent, capture_output=True, text=True
    )
    assert child.returncode == 0, child.stdout + child.stderr
    summary = child.stdout.splitlines()[-1]
    assert "passed" in summary
    assert "skipped" not in summary
