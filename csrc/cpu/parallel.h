// Passes of the CPU's kernels on PyTorch's threads.
#pragma once

#include "../core/tensor.h"
#include "isa/kernels.h"

namespace cxv {

template <class Params>
using Pass = void (*)(const Params&, int64_t begin, int64_t end);

// `pass` over the items [begin, end); a thread takes at least `grain`.
template <class Params>
void run_pass(std::type_identity_t<Pass<Params>> pass, const Params& p, int64_t begin, int64_t end, int64_t grain = 1) {
  torch::stable::parallel_for(begin, end, grain, [&](int64_t from, int64_t to) { pass(p, from, to); });
}

}  // namespace cxv
