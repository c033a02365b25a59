// The table that the build of each instruction set (avx2.cpp, …) exports: the passes of every op. A pass computes the
// items [begin, end). The result of an item depends only on its own head or block, so neither the threads nor the batch
// change a bit.
#pragma once

#include "../../core/conv_norm.h"
#include "../../core/dropout.h"
#include "../../core/linear_attention.h"
#include "../../core/nystrom_attention.h"
#include "isa.h"

namespace cxv {

// Of the items of a pass over splits only [begin, end) have a partial state at a time.
struct Workspace {
  void* partial = nullptr;  // acc, one block per item
  void* running = nullptr;  // acc, heads × (M + E + 1): the keys' maxima, Σ v and the number of keys so far
  int64_t begin = 0, end = 0;
};

struct LinearAttentionKernels {
  using Pass = void (*)(const LinearAttentionParams&, const Workspace&, int64_t begin, int64_t end);
  Pass key_pass;           // item = head · key_splits + split; writes a partial state
  Pass reduce_keys;        // item = head; adds the partial states that there are
  Pass query_pass;         // item = head · query_splits + split
  Pass query_backward;     // item = head · query_splits + split; writes grad_q and, for the keys, a partial (dz, dS)
  Pass reduce_queries;     // item = head
  Pass key_backward;       // item = head · key_splits + split
  Pass features_max;       // item = head · query_splits + split of q; writes the largest exponent
  Pass features_forward;   // item = head · query_splits + split: φ(q) into out
  Pass features_backward;  // item = head · query_splits + split: grad_q of φ(q)
  int64_t (*key_partial)(const LinearAttentionParams&);    // the size of a block of key_pass
  int64_t (*query_partial)(const LinearAttentionParams&);  // of query_backward
};

struct DropoutKernels {
  void (*apply)(const DropoutParams&, int64_t begin, int64_t end);  // blocks of the mask, from that of `offset` on
};

struct ConvNormKernels {
  using Pass = void (*)(const ConvNormParams&, int64_t begin, int64_t end);
  Pass forward;          // item = block
  Pass backward;         // item = split; writes grad_conv and partial
  Pass backward_reduce;  // item = channel
};

struct NystromAttentionKernels {
  template <class P>
  using Pass = void (*)(const P&, int64_t begin, int64_t end);
  int64_t tile, residual_tile;                           // tokens
  Pass<NystromMeansParams> means, spread;                // item = head · landmarks + landmark
  Pass<NystromTokensParams> readout;                     // item = head · tiles + tile
  Pass<NystromTokensParams> readout_backward;            // item = head
  Pass<NystromTokensParams> summary, summary_backward;   // item = head
  Pass<NystromMixParams> mix, mix_backward;              // item = head
  Pass<NystromResidualParams> residual;                  // item = head · tiles + tile
  Pass<NystromResidualParams> residual_backward;         // item = head · tiles + tile; writes grad_v and partial
  Pass<NystromResidualParams> residual_weight_backward;  // item = head of one image
};

struct Kernels {
  LinearAttentionKernels linear_attention;
  DropoutKernels dropout;
  ConvNormKernels conv_norm;
  NystromAttentionKernels nystrom_attention;
};

extern const Kernels kBaselineKernels;
#if defined(__x86_64__)
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
#endif

// Those of the widest instruction set that this machine runs.
inline const Kernels& kernels() {
#if defined(__x86_64__)
  if (cpu_isa() == Isa::kAvx512) return kAvx512Kernels;
  if (cpu_isa() == Isa::kAvx2) return kAvx2Kernels;
#endif
  return kBaselineKernels;
}

}  // namespace cxv
