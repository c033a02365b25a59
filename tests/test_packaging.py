"""setup.py on machines that lack something: a clear line, and never a traceback."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cxv_kernels import library

ROOT = Path(__file__).parent.parent


def setup_py(*arguments: str, path: Path, cwd: Path = ROOT, **env: str) -> subprocess.CompletedProcess:
    """Run setup.py with PATH holding nothing but ``path``."""
    clean = {k: v for k, v in os.environ.items() if k not in ("CXX", "CC", "CUDA_HOME", "CUDA_PATH", "CXV_CUDA")}
    return subprocess.run(
        [sys.executable, "setup.py", *arguments],
        cwd=cwd,
        env=clean | {"PATH": str(path)} | env,
        capture_output=True,
        text=True,
        check=False,
    )


def executable(path: Path, script: str) -> None:
    path.write_text("#!/bin/sh\n" + script)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.fixture
def execute(monkeypatch, capsys):
    """A function that executes setup.py in this process, with PATH holding nothing but ``path``.

    It returns the words with which setup.py refuses to go on, or None, and what it says.
    """

    def run(path, namespace=None, **environment):
        monkeypatch.setattr("setuptools.setup", lambda **_: None)
        for name in ("CXX", "CC", "CUDA_HOME", "CUDA_PATH", "CXV_CUDA"):
            monkeypatch.delenv(name, raising=False)
        for name, value in {"PATH": str(path), **environment}.items():
            monkeypatch.setenv(name, value)
        refused, namespace = None, {} if namespace is None else namespace
        namespace["__file__"] = str(ROOT / "setup.py")
        try:
            exec(compile((ROOT / "setup.py").read_text(), "setup.py", "exec"), namespace)
        except SystemExit as stopped:
            refused = stopped.code
        return refused, capsys.readouterr().err

    return run


def test_no_compiler(execute, tmp_path):
    refused, said = execute(tmp_path)
    assert refused is None
    assert "cxv: C++ kernels are skipped: no C++ compiler (c++) was found. Plain PyTorch" in said


def test_no_nvcc(execute, tmp_path):
    executable(tmp_path / "c++", "exit 0")
    refused, said = execute(tmp_path)
    assert refused is None
    assert "cxv: CUDA kernels are skipped: no nvcc was found." in said
    refused, _ = execute(tmp_path, CXV_CUDA="1")
    assert refused == "cxv: CXV_CUDA=1, but no nvcc was found"


@pytest.mark.parametrize(
    ("given", "built", "skipped"),
    [
        ("", "7.5+PTX", ""),
        ("6.0 7.0+PTX", "7.5+PTX", "6.0, 7.0+PTX in"),
        ("7.0;7.5;10.0a", "7.5;10.0a", ": 7.0 in"),
        ("Turing 9.0", "Turing;9.0", ""),
    ],
)
def test_architectures_without_our_tensor_cores_are_skipped(
    execute, tmp_path, monkeypatch, capsys, given, built, skipped
):
    execute(tmp_path, namespace := {})
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", given)
    assert namespace["architectures"]() == os.environ["TORCH_CUDA_ARCH_LIST"] == built
    said = capsys.readouterr().err
    assert (skipped in said) if skipped else said == ""


@pytest.mark.skipif(torch.version.cuda is None, reason="a CPU build of torch is refused before nvcc is asked")
def test_nvcc_of_another_cuda_major(execute, tmp_path):
    executable(tmp_path / "c++", "exit 0")
    executable(tmp_path / "nvcc", "echo 'Cuda compilation tools, release 9.2, V9.2.148'")
    refused, said = execute(tmp_path)
    assert refused is None
    assert f"skipped: nvcc is CUDA 9.2, torch was built with {torch.version.cuda}" in said


def test_cxv_cuda_is_honored(execute, tmp_path):
    executable(tmp_path / "c++", "exit 0")
    assert "CUDA kernels are skipped: CXV_CUDA=0" in execute(tmp_path, CXV_CUDA="0")[1]
    assert "CXV_CUDA must be 0 or 1, got 'yes'" in execute(tmp_path, CXV_CUDA="yes")[0]


@pytest.fixture
def code(monkeypatch):
    """What setup.py defines."""
    monkeypatch.setattr("setuptools.setup", lambda **_: None)
    monkeypatch.setenv("CXV_CUDA", "0")
    names = {"__file__": str(ROOT / "setup.py"), "__name__": "setup"}
    exec(compile((ROOT / "setup.py").read_text(), "setup.py", "exec"), names)
    return names


def test_libraries_that_can_be_built_exist(code, monkeypatch):
    assert code["why_not_cpp"]() is not None or library.CPP_MISSING is None
    monkeypatch.delenv("CXV_CUDA")
    monkeypatch.setenv("CUDA_HOME", os.environ.get("CUDA_HOME", ""))  # find_cuda sets it
    version, reason = code["find_cuda"]()
    assert reason or library.CUDA_MISSING is None, f"nvcc {version} is here: {library.CUDA_MISSING}"


def test_cuda_home_of_a_wrapped_nvcc(code, tmp_path):
    """An nvcc on PATH may be a wrapper elsewhere."""
    executable(tmp_path / "nvcc", "echo '#$ TOP=/opt/some/cuda' >&2")
    assert code["find_cuda_home"](str(tmp_path / "nvcc")) == "/opt/some/cuda"
    executable(tmp_path / "nvcc", "exit 1")
    assert code["find_cuda_home"](str(tmp_path / "nvcc")) == str(tmp_path.parent)


def test_package_has_its_data(tmp_path):
    """The pretrained weights and the kernels' configurations are in the wheel."""
    done = setup_py("build_py", "--build-lib", str(tmp_path / "lib"), path=tmp_path)
    assert done.returncode == 0, done.stderr
    for package in ("cxv", "cxv_kernels"):
        files = [*(ROOT / package).rglob("*.safetensors"), *(ROOT / package).rglob("*.json")]
        assert files
        assert all((tmp_path / "lib" / file.relative_to(ROOT)).is_file() for file in files)


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("exit 1", "cxv: the compiled libraries cannot be built and will be missing"),
        (
            'case "$1" in -*version) exec g++ "$@";; *) exit 1;; esac',
            "cxv: cxv_kernels._cpu cannot be built and will be",
        ),
    ],
)
def test_failing_compiler_leaves_a_working_package(tmp_path, script, message):
    tree = tmp_path / "tree"
    tree.mkdir()
    for name in ("setup.py", "pyproject.toml", "csrc", "README.md", "LICENSE"):
        (tree / name).symlink_to(ROOT / name)
    for name in ("cxv", "cxv_kernels"):
        (tree / name).mkdir()
        (tree / name / "__init__.py").touch()
    programs = tmp_path / "bin"
    programs.mkdir()
    executable(programs / "c++", script)
    tools = os.pathsep.join([str(programs), str(Path(sys.executable).parent), "/usr/bin", "/bin"])
    done = setup_py(
        *("build_ext", "--inplace", "--build-lib", str(tmp_path / "lib"), "--build-temp", str(tmp_path / "obj")),
        path=tools,
        cwd=tree,
        CXV_CUDA="0",
        CXX=str(programs / "c++"),
    )
    assert done.returncode == 0, done.stderr
    assert message in done.stderr
