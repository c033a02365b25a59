"""tests/ops in Triton's interpreter, in a process of its own: there the kernels cannot be compiled."""

import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

from cxv_kernels._triton import TRITON_MISSING, interpreting


def release(package: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in version(package).split(".")[:2])
    except PackageNotFoundError:
        return (99,)


BROKEN = release("triton") < (3, 7) and release("numpy") >= (2, 4)


@pytest.mark.slow
@pytest.mark.skipif(BROKEN, reason="Triton before 3.7 interprets nothing with NumPy from 2.4 on")
@pytest.mark.skipif(TRITON_MISSING is not None or interpreting(), reason=f"Triton: {TRITON_MISSING or 'interpreting'}")
def test_ops_in_the_interpreter():
    here = Path(__file__).parent
    command = [sys.executable, "-m", "pytest", "-n", "0", "-p", "no:cacheprovider", "-k", "triton", here / "ops"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(
        command,
        env=environment | {"TRITON_INTERPRET": "1"},
        cwd=here.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout.splitlines()[-1]
