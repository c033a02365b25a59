// Runs a model of `cxv export --format aoti` without Python: libtorch and, for fused models, cxv_kernels/_cpu.abi3.so.
//
//   classify MODEL.pt2 KERNELS.so|- IMAGES.f32 BATCH CHANNELS HEIGHT WIDTH
//
// IMAGES.f32: the normalized pixels, float32, in that order. Prints the logits, one line an image. docs/deploy.md has
// the command that compiles it.
#include <ATen/ops/empty.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <cstdio>
#include <fstream>
#include <string>
#include <vector>

int main(int argc, char** argv) {
  if (argc != 8) {
    std::fprintf(stderr, "usage: %s MODEL.pt2 KERNELS.so|- IMAGES.f32 BATCH CHANNELS HEIGHT WIDTH\n", argv[0]);
    return 2;
  }
  // loading the library registers its ops with libtorch
  if (std::string(argv[2]) != "-" && !dlopen(argv[2], RTLD_NOW | RTLD_GLOBAL)) {
    std::fprintf(stderr, "%s\n", dlerror());
    return 1;
  }
  std::vector<int64_t> shape;
  for (int i = 4; i < 8; ++i) shape.push_back(std::stoll(argv[i]));
  at::Tensor images = at::empty(shape);
  std::ifstream file(argv[3], std::ios::binary);
  if (!file.read(static_cast<char*>(images.data_ptr()), images.nbytes())) {
    std::fprintf(stderr, "%s: fewer than %zu bytes\n", argv[3], images.nbytes());
    return 1;
  }
  torch::inductor::AOTIModelPackageLoader model(argv[1]);
  at::Tensor logits = model.run({images})[0].contiguous();
  const float* value = logits.const_data_ptr<float>();
  for (int64_t i = 0; i < logits.size(0); ++i) {
    for (int64_t j = 0; j < logits.size(1); ++j) std::printf("%.9g ", *value++);
    std::printf("\n");
  }
  return 0;
}
