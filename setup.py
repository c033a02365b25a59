"""Build the C++ and CUDA libraries. pyproject.toml has all other settings.

If the machine lacks something, a library is skipped with one line on stderr, and the package works without it:
no compiler → no C++ kernels; no nvcc, a CPU-only torch or another CUDA major than torch's → no CUDA kernels.

CXV_CUDA=0 skips CUDA, CXV_CUDA=1 makes a missing CUDA an error. TORCH_CUDA_ARCH_LIST is honored from sm_75 on; its
default does not look at the machine, so that a wheel runs on every card from the T4 on.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent.resolve()
TORCH_TARGET = "0x020a000000000000"  # the stable ABI of torch 2.10: newer ones load the same library
CUDA_OPS = ("conv_norm", "linear_attention", "performer_attention")  # those with CUDA kernels
DEFAULT_ARCHS = "7.5+PTX"  # newer cards can run the PTX, in float16 and float32; there Triton is preferred


def say(message: str) -> None:
    print(f"cxv: {message}", file=sys.stderr, flush=True)


def sources(pattern: str) -> list[str]:
    return sorted(str(p.relative_to(ROOT)) for p in ROOT.glob(pattern))


def find_cuda_home(nvcc: str) -> str:
    """Return the root of the toolkit as nvcc reports it, because the nvcc on PATH can be a wrapper."""
    dryrun = subprocess.run([nvcc, "-dryrun", "-x", "cu", os.devnull], capture_output=True, text=True, check=False)
    top = re.search(r"TOP=(\S+)", dryrun.stderr)
    return str(Path(top.group(1)).resolve()) if top else str(Path(nvcc).resolve().parent.parent)


def why_not_cpp() -> str | None:
    compiler = os.environ.get("CXX", "c++").split()[0]
    if not (shutil.which(compiler) or shutil.which("g++")):
        return f"no C++ compiler ({compiler}) was found"
    try:
        import torch
    except ImportError:
        return "torch is not installed where this is built"
    if tuple(map(int, re.findall(r"\d+", torch.__version__)[:2])) < (2, 10):
        return f"torch {torch.__version__} is older than 2.10"
    return None


def find_cuda() -> tuple[str | None, str | None]:
    """Return (version of nvcc, None) and set CUDA_HOME, or (None, reason why the CUDA library cannot be built)."""
    if os.environ.get("CXV_CUDA") == "0":
        return None, "CXV_CUDA=0"
    nvcc = shutil.which("nvcc", path=os.environ.get("CUDA_HOME", "") + "/bin") or shutil.which("nvcc")
    if nvcc is None:
        return None, "no nvcc was found"
    import torch

    if torch.version.cuda is None:
        return None, f"torch {torch.__version__} is a CPU build"
    answer = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False)
    release = re.search(r"release (\d+)\.(\d+)", answer.stdout)
    if release is None:
        return None, f"{nvcc} does not tell its version"
    if release.group(1) != torch.version.cuda.split(".")[0]:
        return None, f"nvcc is CUDA {'.'.join(release.groups())}, torch was built with {torch.version.cuda}"
    os.environ["CUDA_HOME"] = find_cuda_home(nvcc)
    return ".".join(release.groups()), None


def architectures() -> str:
    """Set TORCH_CUDA_ARCH_LIST, which images set for other packages, to its part from sm_75 on, and return it."""
    wanted = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(" ", ";").split(";")
    older = [arch for arch in wanted if (v := re.match(r"(\d+)\.(\d)", arch)) and (int(v[1]), int(v[2])) < (7, 5)]
    if older:
        say(f"The CUDA kernels need the tensor cores of sm_75: {', '.join(older)} in TORCH_CUDA_ARCH_LIST is skipped.")
    os.environ["TORCH_CUDA_ARCH_LIST"] = ";".join(a for a in wanted if a and a not in older) or DEFAULT_ARCHS
    return os.environ["TORCH_CUDA_ARCH_LIST"]


def extensions() -> tuple[list[Extension], dict]:
    reason = why_not_cpp()
    if reason:
        if os.environ.get("CXV_CUDA") == "1":
            raise SystemExit(f"cxv: CXV_CUDA=1, but {reason}")
        say(f"C++ kernels are skipped: {reason}. Plain PyTorch is used for every op.")
        return [], {}
    if os.environ.get("CXV_CUDA", "") not in ("", "0", "1"):
        raise SystemExit(f"cxv: CXV_CUDA must be 0 or 1, got {os.environ['CXV_CUDA']!r}")
    cuda, reason = find_cuda()  # before torch.utils.cpp_extension, which reads CUDA_HOME when imported
    if reason and os.environ.get("CXV_CUDA") == "1":
        raise SystemExit(f"cxv: CXV_CUDA=1, but {reason}")
    if reason:
        say(f"CUDA kernels are skipped: {reason}.")

    import torch
    from torch.utils.cpp_extension import CppExtension, CUDAExtension

    target = f"-DTORCH_TARGET_VERSION={TORCH_TARGET}"
    cxx = ["-O3", "-g0", "-std=c++20", "-fvisibility=hidden", target]
    archs = "" if reason else architectures()
    facts = {
        "torch_target": "2.10",
        "torch_built_with": torch.__version__,
        "cuda": cuda or "",
        "cuda_arch_list": archs,
        "cuda_missing": reason or "",
    }
    lines = "\n".join(f"{name}={value}" for name, value in facts.items())
    extensions = [
        CppExtension(
            "cxv_kernels._cpu",
            ["csrc/ops.cpp", *sources("csrc/host/*.cpp"), *sources("csrc/cpu/**/*.cpp")],
            extra_compile_args={"cxx": [*cxx, "-DCXV_DEVICE=CPU", f"-DCXV_BUILD_INFO={json.dumps(lines)}"]},
            py_limited_api=True,
        )
    ]
    if not reason:
        extensions.append(
            CUDAExtension(
                "cxv_kernels._cuda",
                [*(f"csrc/host/{op}.cpp" for op in CUDA_OPS), *sources("csrc/cuda/**/*.cu")],
                extra_compile_args={
                    "cxx": [*cxx, "-DCXV_DEVICE=CUDA"],
                    "nvcc": ["-O3", "-std=c++20", "-Xcompiler=-fvisibility=hidden", "-DUSE_CUDA", target],
                },
                py_limited_api=True,
            )
        )

    return extensions, {"build_ext": build_command()}


def build_command() -> type:
    from torch.utils.cpp_extension import BuildExtension

    class Build(BuildExtension):
        """Build the libraries. If a library fails, the package is installed without it."""

        def build_extensions(self) -> None:
            self.built: list[str] = []
            self.all_temporary = self.build_temp
            try:
                super().build_extensions()
            except Exception as error:  # a toolchain that does not even tell its version
                self.leave_out("the compiled libraries", error)

        def build_extension(self, ext: Extension) -> None:
            self.build_temp = str(Path(self.all_temporary, ext.name))  # csrc/host is compiled for each device
            try:
                super().build_extension(ext)
                self.built.append(ext.name)
            except Exception as error:
                self.leave_out(ext.name, error)

        def leave_out(self, what: str, error: Exception) -> None:
            if os.environ.get("CXV_CUDA") == "1":
                raise SystemExit(f"cxv: CXV_CUDA=1, but {what} cannot be built: {error}") from None
            say(f"{what} cannot be built and will be missing: {error}")

        def copy_extensions_to_source(self) -> None:
            wanted, self.extensions = self.extensions, [e for e in self.extensions if e.name in self.built]
            super().copy_extensions_to_source()
            self.extensions = wanted

    return Build


class Wheel(bdist_wheel):
    """Tag one wheel per platform. The libraries do not depend on Python."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


class Modules(build_py):
    """Copy the schemas of csrc/ops.cpp into the package, where cxv_kernels/library.py reads them."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            self.copy_file("csrc/ops.cpp", str(Path(self.build_lib) / "cxv_kernels" / "ops.cpp"))


ext_modules, cmdclass = extensions()
cmdclass |= {"bdist_wheel": Wheel, "build_py": Modules}
setup(ext_modules=ext_modules, cmdclass=cmdclass)
