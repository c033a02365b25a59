"""Which backend computes an op, and why; imports without side effects; the report of ``python -m cxv_kernels``."""

import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from conftest import heads, needs_cpp

import cxv_kernels
from cxv_kernels import dispatch, library, testing
from cxv_kernels.ops.linear_attention.op import linear_attention_op


def test_checks_fail_on_a_wrong_result():
    case = testing.cases()[0]

    def wrong_in_float32(q, k, v, backend):
        return case.function(q, k, v if v.dtype == torch.float64 else v * (1 + 1e-4), backend=backend)

    assert testing.run(case, "reference", "cpu", torch.float32).passed
    wrong = testing.Case(case.op, "wrong", wrong_in_float32, case.shapes, case.depth)
    assert not testing.run(wrong, "reference", "cpu", torch.float32).passed


def test_use_backend_nests_and_restores():
    assert cxv_kernels.get_backend() == "auto"
    with cxv_kernels.use_backend("reference"):
        with pytest.raises(ValueError, match="q must have 4"), cxv_kernels.use_backend("cpu"):
            cxv_kernels.linear_attention(torch.zeros(1), torch.zeros(1), torch.zeros(1))
        with cxv_kernels.use_backend("auto"):
            assert cxv_kernels.get_backend() == "auto"
        assert cxv_kernels.get_backend() == "reference"
    assert cxv_kernels.get_backend() == "auto"


def test_the_first_of_several_that_can():
    q = heads(1, 1, 4, 4, grad=True)
    with cxv_kernels.use_backend("cuda,reference"):
        assert cxv_kernels.linear_attention(q, q, q).grad_fn.name() != "LinearAttentionFunctionBackward"
    with pytest.raises(RuntimeError, match=r"backend 'cuda,triton' does not support .*: cuda .*; triton "):
        cxv_kernels.linear_attention(q, q, q, backend="cuda,triton")
    with cxv_kernels.use_backend("cuda, reference"):
        assert cxv_kernels.get_backend() == "cuda,reference"
    with pytest.raises(ValueError, match="got 'cuda,auto'"):
        cxv_kernels.linear_attention(q, q, q, backend="cuda,auto")


def test_unknown_names():
    for name in ("fast", "cpp"):
        with (
            pytest.raises(ValueError, match=rf"backend must be one of 'auto', 'reference', 'cpu', .* got '{name}'"),
            cxv_kernels.use_backend(name),
        ):
            pass
    with pytest.raises(ValueError, match=r"op must be one of 'conv_norm', .* got 'attention'"):
        cxv_kernels.explain_backend("attention")
    with pytest.raises(ValueError, match=r"backend must be one of .* got 1"):
        cxv_kernels.dropout(torch.zeros(1), 0.1, cxv_kernels.dropout_seed(), backend=1)
    with pytest.raises(TypeError, match=r"dtype must be float64, .* got torch.int32"):
        cxv_kernels.explain_backend("dropout", "cpu", torch.int32)


@needs_cpp
def test_auto_takes_the_fused_op_and_reference_does_not():
    q = heads(1, 1, 4, 4, grad=True)
    assert cxv_kernels.linear_attention(q, q, q).grad_fn.name() == "LinearAttentionFunctionBackward"
    with cxv_kernels.use_backend("reference"):
        assert cxv_kernels.linear_attention(q, q, q).grad_fn.name() != "LinearAttentionFunctionBackward"
    assert (
        cxv_kernels.linear_attention(q, q, q, backend="reference").grad_fn.name() != "LinearAttentionFunctionBackward"
    )


class Subclass(torch.Tensor):
    """A subclass without a behavior of its own, as torchvision's images."""


@pytest.mark.parametrize("kind", [torch.Tensor, Subclass])
@pytest.mark.parametrize("op", cxv_kernels.OPS)
def test_a_named_backend_that_cannot_serve_says_why(op, kind):
    case = next(case for case in testing.cases() if case.op == op)
    reason = re.escape(cxv_kernels.explain_backend(op)["triton"])
    with pytest.raises(RuntimeError, match=f"backend 'triton' does not support {op} .*: triton {reason}"):
        case.function(*(torch.zeros(shape).as_subclass(kind) for shape in case.shapes), backend="triton")


@needs_cpp
def test_out_of_memory_with_a_tensor_subclass_keeps_its_class(monkeypatch):
    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setitem(linear_attention_op.kernels, "cpu", (fail, fail))
    q = heads(1, 1, 4, 4).as_subclass(Subclass)
    with pytest.raises(torch.OutOfMemoryError, match=r"^CUDA out of memory$"):
        cxv_kernels.linear_attention(q, q, q, backend="cpu")


@needs_cpp
def test_reasons_name_the_device():
    assert cxv_kernels.explain_backend("linear_attention", "meta")["cpu"] == "supports the CPU, not meta"


def test_the_meta_device_and_a_default_one():
    with torch.device("meta"):
        x = heads(1, 2, 4, 8)
        projection = cxv_kernels.orthogonal_projection(4, 8)  # drawn on the CPU all the same
        assert cxv_kernels.linear_attention(x, x, x).device.type == "meta"
    assert projection.device.type == "cpu"


def test_a_fallback_is_announced_once(monkeypatch):
    monkeypatch.setattr(dispatch, "_announced", set())
    monkeypatch.setitem(dispatch._table, "nystrom_attention", {})
    q = heads(1, 1, 4, 4)
    with pytest.warns(
        UserWarning,
        match="nystrom_attention: using the plain PyTorch .* on cpu, because cpu has no .*shown once",
    ):
        cxv_kernels.nystrom_attention(q, q, q)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cxv_kernels.nystrom_attention(q, q, q)
        with cxv_kernels.use_backend("reference"):
            cxv_kernels.kv_state(q, q)  # asked for: nothing to announce
    assert cxv_kernels.explain_backend("nystrom_attention")["auto"] == (
        "reference (cpu has no kernel for nystrom_attention)"
    )


@needs_cpp
def test_each_reason_is_announced(monkeypatch):
    monkeypatch.setattr(dispatch, "_announced", set())
    q, w = heads(1, 1, 4, 4), torch.randn(3, 4, dtype=torch.float64)
    with pytest.warns(UserWarning, match="stabilizer='batch'"):
        cxv_kernels.performer_attention(q, q, q, w, stabilizer="batch")
    with pytest.warns(UserWarning, match="projection"):
        cxv_kernels.performer_attention(q, q, q, w.requires_grad_())
    assert cxv_kernels.explain_backend("performer_attention")["auto"] == "cpu"


def run(code: str, **env: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], env=os.environ | env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_imports_are_light_and_silent():
    loaded = "matplotlib torchvision sklearn tqdm PIL triton torch._inductor"
    out = run(
        "import os, sys; before = dict(os.environ)\n"
        "import torch; torch_only = set(sys.modules)\n"
        "state = torch.get_rng_state(), torch.get_num_threads(), torch.is_grad_enabled()\n"
        "import cxv, cxv_kernels\n"
        f"print([m for m in '{loaded}'.split() if m in set(sys.modules) - torch_only])\n"
        "assert dict(os.environ) == before and torch.equal(state[0], torch.get_rng_state())\n"
        "assert state[1:] == (torch.get_num_threads(), torch.is_grad_enabled()) and not torch.cuda.is_initialized()\n"
    )
    assert out.strip() == "[]"


def test_works_without_the_compiled_libraries(tmp_path):
    """A copy of the Python files alone, as installed without a compiler."""
    package = Path(cxv_kernels.__file__).parent
    shutil.copytree(package, tmp_path / "cxv_kernels", ignore=shutil.ignore_patterns("*.so", "*.pyd", "__pycache__"))
    shutil.copy(package.parent / "csrc" / "ops.cpp", tmp_path / "cxv_kernels")  # as setup.py does
    out = run(
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "import torch, warnings, cxv_kernels\n"
        f"assert cxv_kernels.__file__.startswith({str(tmp_path)!r})\n"
        "q = torch.randn(1, 2, 8, 4, requires_grad=True)\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    cxv_kernels.linear_attention(q, q, q).sum().backward()\n"
        "print(len(caught), caught[0].message)\n"
        "from cxv_kernels.__main__ import main\n"
        "assert main([]) == 0\n"
    )
    assert out.startswith(
        "1 linear_attention: using the plain PyTorch implementation on cpu, because cpu was not built"
    )
    assert "all checks passed" in out


def test_report(capsys):
    from cxv_kernels.__main__ import main

    assert main([]) == 0
    out = capsys.readouterr().out
    assert "all checks passed" in out
    assert "not supported by triton" in out
    assert [op for op in cxv_kernels.OPS if not re.search(rf"^ *{op} .* ok ", out, re.MULTILINE)] == []


def test_report_continues_after_a_kernel_that_raises(monkeypatch, capsys):
    """As on a GPU whose kernels do not compile: the report lists each failure, and the ops before and after it."""
    from cxv_kernels import __main__ as report

    def run(case, backend, device, dtype):
        if (backend, dtype) == ("reference", torch.float16):
            raise OSError("no compiler")
        return testing.Result(case, backend, dtype, 2.0 if case.op == "dropout" else 0.5, 1.0)

    monkeypatch.setattr(testing, "run", run)
    monkeypatch.setattr(report, "OPS", ("kv_state", "dropout"))
    assert report.main([]) == 1
    out = capsys.readouterr().out
    assert re.search(r"kv_state +reference +ok 5.0e-01 +ok 5.0e-01 +FAILED inf +ok 5.0e-01", out)
    assert "  FAILED: kv_state (elu), reference, float16: OSError: no compiler\n" in out
    assert "  FAILED: dropout (residual), reference, float32: error 2.0e+00, tolerance 1.0e+00\n" in out


def test_a_library_that_does_not_load_says_why(tmp_path, monkeypatch):
    (tmp_path / "_cpu.abi3.so").write_bytes(b"what a full disk left of it")
    monkeypatch.setattr(library, "_PACKAGE", tmp_path)
    reason = library._load("_cpu")
    assert reason.startswith("was built but does not load: ")
    assert any(words in reason for words in ("file too short", "invalid ELF header")) or sys.platform != "linux"


@needs_cpp
def test_a_library_of_older_sources_is_not_used(monkeypatch):
    for name, schema in (
        ("of_tomorrow", "cxv_kernels::of_tomorrow() -> ()"),
        ("dropout", "cxv_kernels::dropout() -> ()"),
    ):
        with monkeypatch.context() as patch:
            patch.setitem(library.SCHEMAS, name, torch._C.parse_schema(schema))
            assert "was built from another version of the sources" in library._load_cpp()


@pytest.mark.parametrize(
    ("device", "capability", "order"),
    [
        ("cpu", None, ("cpu",)),
        ("cuda", (7, 5), ("cuda", "triton")),
        ("cuda", (8, 0), ("triton", "cuda")),
        ("cuda", (12, 0), ("triton", "cuda")),
        ("cuda", None, ("cuda", "triton")),
        ("meta", None, ()),
        ("mps", None, ()),
    ],
    ids=["cpu", "sm_75", "sm_80", "sm_120", "no-gpu", "meta", "mps"],
)
def test_dispatch_order_of_a_device(device, capability, order, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert dispatch.dispatch_order(torch.device(device)) == order


def test_cuda_kernels_report_what_they_do_not_support(monkeypatch):
    monkeypatch.setattr(dispatch, "CUDA_MISSING", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(dispatch, "_self_check", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(dispatch, "cuda_compiled_for", lambda _: 75)
    ask = lambda op, dtype, dim=0: cxv_kernels.explain_backend(op, "cuda", dtype, dim)["cuda"]  # noqa: E731
    for op in ("linear_attention", "kv_state", "performer_attention", "performer_features", "conv_norm"):
        assert ask(op, torch.float16) == ask(op, torch.float32, 32) == "supported"
        for dtype in (torch.bfloat16, torch.float64):
            assert ask(op, dtype) == f"supports float16 and float32, not {dispatch.dtype_name(dtype)}"
        if op != "conv_norm":
            assert ask(op, torch.float16, 64) == "supported"
            assert ask(op, torch.float16, 65) == "supports 1 to 64 channels, not 65"
    assert ask("conv_norm", torch.float16, 2) == "supports 3 to 3072 channels, not 2"
    with monkeypatch.context() as compiling:
        compiling.setattr(torch.compiler, "is_compiling", lambda: True)
        compiling.setattr(dispatch, "cuda_compiled_for", None)  # it is not asked
        assert ask("linear_attention", torch.float16) == "supported"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    assert ask("performer_attention", torch.float16) == "supported"  # by sm_75's PTX
    monkeypatch.setattr(dispatch, "cuda_compiled_for", lambda _: 0)
    for dtype in (torch.float32, torch.float16):
        reason = "was not built for sm_80, the architecture of this GPU: build it with TORCH_CUDA_ARCH_LIST=8.0"
        assert ask("conv_norm", dtype) == reason
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 0))
    assert ask("conv_norm", torch.float16) == "supports sm_75 and later, not sm_70"


def test_schemas_are_those_of_ops_cpp():
    """Every operator of the file is read, and a pattern that misses one would shorten the table."""
    text = (Path(__file__).parent.parent / "csrc" / "ops.cpp").read_text()
    assert set(library.SCHEMAS) == set(re.findall(r'"(\w+)\(', text))
    assert len(library.SCHEMAS) == text.count("m.def(")
