"""What several test files share."""

import contextlib
import os
import runpy
import signal
import sys
import traceback
from pathlib import Path

# PyTorch reads these at import. Several processes share the cores: threads that wait must not spin.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch
from filelock import FileLock
from PIL import Image

from cxv_kernels._triton import interpreting
from cxv_kernels.library import CPP_MISSING
from cxv_kernels.testing import without_tf32

sys.path.append(str(Path(__file__).parent / "ops"))  # its cases.py and its extreme values are used elsewhere, too
# tests/test_triton.py runs these in processes of its own
ON_FAKE_DEVICE = "FAKE_DEVICE_ATEN" in os.environ
collect_ignore_glob = () if interpreting() else ("ops/test_triton_*.py",)
ON_GPU = "CXV_TEST_GPU" in os.environ  # tests/ops with the kernels of a real GPU: CXV_TEST_GPU=1 pytest -m gpu
if ON_GPU:
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # which PyTorch's deterministic mode demands
if not (ON_FAKE_DEVICE or ON_GPU):
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the other tests are the same on every machine
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell has its background processes ignore
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # a pool of processes costs more than these graphs
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")  # the CPU says it; nothing is compiled to try
os.environ["CXV_CACHE"] = "none"  # tests leave nothing in the user's; those of the cache have their own
# The files that take longest, in this order: the others fill up what the processes have left.
LONGEST = (
    *("test_triton.py", "test_fake_device.py", "test_compile_gate.py", "test_export.py", "test_benchmarks.py"),
    *("test_docs.py", "test_lean.py", "test_cuda_attention.py", "test_trainer.py", "test_distributed.py"),
)
ROOT = Path(__file__).parent.parent
needs_cpp = pytest.mark.skipif(CPP_MISSING is not None, reason=f"the C++ kernels: {CPP_MISSING}")


def pytest_collection_modifyitems(items):
    rank = {name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.name, len(rank)))


@pytest.fixture(autouse=True)
def _seeded_on_one_thread():
    """The tests' tensors are small: more threads would only wait for one another."""
    torch.manual_seed(0)
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _float32_is_float32_on_a_gpu():
    """cuDNN rounds the factors of convolutions to TF32 by default, for which no tolerance here has room."""
    with without_tf32() if ON_GPU else contextlib.nullcontext():
        yield


@pytest.fixture(scope="session", autouse=True)
def _fast_interpreter():
    with pytest.MonkeyPatch.context() as monkeypatch:
        if interpreting():
            from fast_interpreter import speed_up

            speed_up(monkeypatch)
        yield


@pytest.fixture
def run_script(monkeypatch, capsys):
    """A function that runs a script as ``python SCRIPT ARGUMENTS`` does and returns what it prints.

    It runs in this process: one of its own would spend seconds on its imports.
    """

    def run(script, *arguments, status=0):
        path = ROOT / script
        monkeypatch.setattr(sys, "argv", [str(path), *map(str, arguments)])
        monkeypatch.setattr(sys, "path", [str(path.parent), *sys.path])
        if os.name == "posix":  # a limit of the benchmarks' memory, which would stay
            monkeypatch.setattr("resource.setrlimit", lambda *_: None)
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            runpy.run_path(str(path), run_name="__main__")
        printed = capsys.readouterr()
        assert stopped.value.code == status, printed.out + printed.err
        return printed.out + printed.err

    return run


def heads(*shape: int, dtype: torch.dtype = torch.float64, grad: bool = False) -> torch.Tensor:
    """A normal random tensor (B, H, N, D), drawn in float64 and rounded."""
    return torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_(grad)


def layouts(x: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same (B, H, N, D) values in the layouts that models make, none of them contiguous."""
    batch, num_heads, tokens, dim = x.shape
    chunk = x.new_zeros(batch, tokens, 3, num_heads, dim)
    chunk[:, :, 1] = x.transpose(1, 2)
    return {
        "(B, N, H, D)": x.transpose(1, 2).contiguous().transpose(1, 2),
        "a chunk of qkv": chunk[:, :, 1].transpose(1, 2),
        "NCHW": x.transpose(2, 3).contiguous().transpose(2, 3),
        "every other token": torch.stack([x, x], dim=3).flatten(2, 3)[:, :, ::2],
        "expanded batch": x[:1].expand_as(x),
    }


def qkv(batch=2, num_heads=3, queries=70, keys=150, dim=32, value_dim=32, dtype=torch.float64, grad=False):
    """q (B, H, N_q, D), k (B, H, N_k, D) and v (B, H, N_k, E), normal random."""
    shapes = ((queries, dim), (keys, dim), (keys, value_dim))
    return [heads(batch, num_heads, n, d, dtype=dtype, grad=grad) for n, d in shapes]


@pytest.fixture(scope="session")
def augmented(tmp_path_factory):
    """A training run through every phase, that nothing interrupts: RandAugment, post-training, held-out images."""
    from training_support import AUGMENTED, run

    torch.set_num_threads(1)
    output = tmp_path_factory.mktemp("runs") / "augmented"
    result, log = run(output, **AUGMENTED)
    return output, result, log


@pytest.fixture(scope="module", autouse=True)
def _short_runs_draw_no_curves(request):
    """The picture takes up to half of the time of a run in tests/training; elsewhere runs draw it."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        if request.path.parent.name == "training":
            draw = "cxv.training.trainer.plot_curves"
            monkeypatch.setattr(draw, lambda history, title: f"{len(history)} epochs of {title}".encode())
        yield


def fork(function):
    """Call the function, which must not call backward(), in a fork of this process; returns the id of the fork.

    PyTorch refuses backward passes in forks of a process in which a backward pass has started threads.
    """
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            function()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    return pid


def exit_status(pid):
    """Wait for a process and return its exit status; minus the number of the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@contextlib.contextmanager
def file_limit(nbytes):
    """Refuse to let files grow beyond this size, as a quota does."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def write_image(path, seed=0, size=(8, 8), mode="RGB"):
    """An image file of random pixels, which are returned."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).convert(mode).save(path, **({"lossless": True} if path.suffix == ".webp" else {}))
    return pixels


@pytest.fixture
def folder(tmp_path):
    """A folder of images: three classes of 4 training and 2 test images, 8×8."""
    for split, n in (("train", 4), ("test", 2)):
        for c, name in enumerate(("ant", "bee", "cow")):
            for i in range(n):
                suffix = ("webp", "png", "bmp")[c]
                write_image(tmp_path / split / name / f"{i}.{suffix}", seed=100 * (split == "test") + 10 * c + i)
    return tmp_path


@pytest.fixture(scope="session")
def csrc(tmp_path_factory):
    """A copy of csrc that launches its kernels in the emulator."""
    from cuda_emulator import copy_sources

    return copy_sources(tmp_path_factory.mktemp("emulated"))


@pytest.fixture(scope="session")
def attention(csrc, tmp_path_factory):
    """Its linear_attention as object files, which take long: the first of pytest's processes compiles them for all."""
    from cuda_emulator import compile_sources

    folder = tmp_path_factory.getbasetemp()
    folder = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "linear_attention"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            partial = tmp_path_factory.mktemp("partial")
            compile_sources(list((csrc / "cuda" / "linear_attention").glob("*.cu")), partial)
            partial.rename(folder)
    return list(folder.glob("*.o"))
