"""The CUDA backend and whole ops on a fake CUDA device (fake_device.py)."""

import subprocess
import sys
from pathlib import Path

import fake_device
import pytest
import torch

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(fake_device.missing() is not None, reason=f"the fake CUDA device {fake_device.missing()}"),
]
HERE = Path(__file__).parent
TRIED = (2, 15)  # the newest PyTorch that is known to find a GPU in it


@pytest.fixture(scope="module")
def run(tmp_path_factory, csrc, attention):
    """A function that runs Python in a process with a fake device of a compute capability."""
    folder = tmp_path_factory.mktemp("fake_device")
    built = fake_device.build(folder, csrc, attention)

    def call(arch, *command, **environment):
        return subprocess.run(
            [sys.executable, *map(str, command)],
            env=built | {"FAKE_DEVICE_ARCH": str(arch)} | environment,
            cwd=folder,
            capture_output=True,
            text=True,
            check=False,
        )

    probe = call(75, "-c", "import torch; assert (torch.ones(3, device='cuda') + 1).sum().item() == 6")
    if probe.returncode != 0 and tuple(map(int, torch.__version__.split(".")[:2])) > TRIED:
        pytest.skip(f"the fake CUDA device does not suit PyTorch {torch.__version__}: {probe.stderr.splitlines()[-1:]}")
    assert probe.returncode == 0, probe.stderr
    return call


@pytest.mark.parametrize("arch", [75, 90])
def test_ops(run, arch):
    """The kernels, which both have in common, on the older one, with a guard behind each tensor; the rest on the newer
    one. Both validate kernels on their first use."""
    only, environment = "not (float64 or strides)", {}
    if arch < 80:
        only, environment = "float64 or strides or first_use", {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    tests = HERE / "on_fake_device.py"
    done = run(arch, "-m", "pytest", "-n", "0", "-p", "no:cacheprovider", "-k", only, tests, **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout.splitlines()[-1]


FIRST_USE = """
import sys, torch, cxv_kernels
from cxv_kernels import self_check, testing
op = sys.modules["cxv_kernels.ops.linear_attention.op"]
forward, backward = op.kv_state_op.kernels["cuda"]
op.kv_state_op.kernels["cuda"] = (lambda *args: tuple(2 * t for t in forward(*args)), backward)
self_check._cases = lambda op: [case for case in testing.cases(1, 1, 40, 16) if case.op == op]
k = torch.randn(1, 1, 8, 16, device="cuda").half()
found = cxv_kernels.kv_state(k, k)[0]
expected = cxv_kernels.kv_state(k, k, backend="reference")[0]
print((found - expected).abs().max().item() < 1e-2)
"""


def test_a_second_process_reads_the_verdict(run, tmp_path):
    """Of wrong kernels, which the reference replaces; of right ones and without the check: tests/test_self_check.py."""
    for count in (1, 0):
        done = run(75, "-c", FIRST_USE, CXV_CACHE=str(tmp_path))
        assert done.returncode == 0, done.stderr
        assert done.stdout.split() == ["True"]
        assert done.stderr.count("validating kv_state, float16, on ") == count
        assert done.stderr.count("kv_state: cuda is not used on ") == 1
        assert "failed its self-check in float16 (softmax: error " in done.stderr
