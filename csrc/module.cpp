// cxv_kernels._C: information about the build. It does not link against PyTorch, so it can always be imported.
#include <pybind11/pybind11.h>

#include <string>

#include "cpu/isa/isa.h"

#define CXV_STRING_(...) #__VA_ARGS__  // a reason may have commas
#define CXV_STRING(...) CXV_STRING_(__VA_ARGS__)

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build facts of cxv_kernels.";
  m.def(
      "build_info",
      [] {
        py::dict info;
#if defined(__clang__)
        info["compiler"] = "clang " __clang_version__;
#elif defined(__GNUC__)
        info["compiler"] = "gcc " __VERSION__;
#else
        info["compiler"] = "unknown";
#endif
        info["torch_target"] = CXV_STRING(CXV_TORCH_TARGET);
        info["torch_built_with"] = CXV_STRING(CXV_TORCH_BUILT_WITH);
        info["cuda"] = CXV_STRING(CXV_CUDA_VERSION);
        info["cuda_arch_list"] = CXV_STRING(CXV_CUDA_ARCHS);
        info["cuda_missing"] = CXV_STRING(CXV_CUDA_MISSING);
        return info;
      },
      "dict[str, str]: compiler, oldest supported torch, torch built with, CUDA version and architectures (empty: "
      "none, "
      "and cuda_missing says why).");
  m.def(
      "cpu_isa",
      [] {
        switch (cxv::cpu_isa()) {
          case cxv::Isa::kAvx512:
            return "avx512";
          case cxv::Isa::kAvx2:
            return "avx2";
          default:
            return "baseline";
        }
      },
      "The instruction set that the CPU kernels use here: avx512, avx2 or baseline.");
}
