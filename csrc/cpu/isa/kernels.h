// The table that the build of each instruction set (avx2.cpp, …) exports: the passes of every op. A pass computes the
// items [begin, end). The result of an item depends only on its own head or block, so neither the threads nor the batch
// change a bit.
#pragma once

#include "../../core/conv_norm.h"
#include "../../core/dropout.h"
#include "../../core/linear_attention.h"
#include "../../core/nystrom_attention.h"

namespace cxv {

inline constexpr int64_t kTile = 64;  // tokens of a tile
inline constexpr int64_t kResidualTile =
    2 * kTile;  // of nystrom_attention's residual: its kernel's overlap is read twice

// Linear attention's parameters with the memory of a pass over splits, whose items [first, last) have a partial state.
struct LinearAttentionWork : LinearAttentionParams {
  void* partial = nullptr;  // acc, one block per item
  void* running = nullptr;  // acc, heads × (M + E + 1): the keys' maxima, Σ v and the number of keys so far
  int64_t first = 0, last = 0;
};

// The sizes of partial states. Of key_pass: the maxima (M), z (M), S (M × E) of e, Σ v (E) and the number of keys for
// c. Of query_backward: dz (M), dS (M × E). Static: each instruction set's file has its own code.
static inline int64_t key_partial_size(const LinearAttentionParams& p) {
  return (p.features + 1) * (p.value_dim + 2) - 1;
}
static inline int64_t query_partial_size(const LinearAttentionParams& p) { return p.features * (p.value_dim + 1); }

// The class of each pass, its name and its parameters; then its items.
#define CXV_PASSES(X)                                                                                                  \
  X(LinearAttentionPass, key_pass, LinearAttentionWork)           /* head · key_splits + split; partial state */       \
  X(LinearAttentionPass, reduce_keys, LinearAttentionWork)        /* head; adds the partial states that there are */   \
  X(LinearAttentionPass, query_pass, LinearAttentionWork)         /* head · query_splits + split */                    \
  X(LinearAttentionPass, query_backward, LinearAttentionWork)     /* the same; grad_q and for the keys a partial dS */ \
  X(LinearAttentionPass, reduce_queries, LinearAttentionWork)     /* head */                                           \
  X(LinearAttentionPass, key_backward, LinearAttentionWork)       /* head · key_splits + split */                      \
  X(LinearAttentionPass, features_max, LinearAttentionWork)       /* head · query_splits + split; largest exponent */  \
  X(LinearAttentionPass, features_forward, LinearAttentionWork)   /* the same; φ(q) into out */                        \
  X(LinearAttentionPass, features_backward, LinearAttentionWork)  /* the same; grad_q of φ(q) */                       \
  X(DropoutPass, dropout, DropoutParams)                          /* block of the mask, from that of `offset` on */    \
  X(ConvNormPass, norm_forward, ConvNormParams)                   /* block */                                          \
  X(ConvNormPass, norm_backward, ConvNormParams)                  /* split; writes grad_conv and partial */            \
  X(ConvNormPass, norm_backward_reduce, ConvNormParams)           /* channel */                                        \
  X(NystromMeansPass, means, NystromParams)                       /* head · landmarks + landmark */                    \
  X(NystromMeansPass, means_backward, NystromParams)              /* the same */                                       \
  X(NystromTokensPass, readout, NystromParams)                    /* head · tiles + tile */                            \
  X(NystromTokensPass, readout_backward, NystromParams)           /* head */                                           \
  X(NystromTokensPass, summary, NystromParams)                    /* head */                                           \
  X(NystromTokensPass, summary_backward, NystromParams)           /* head */                                           \
  X(NystromMixPass, mix, NystromParams)                           /* head */                                           \
  X(NystromMixPass, mix_backward, NystromParams)                  /* head */                                           \
  X(NystromResidualPass, residual, NystromParams)                 /* head · tiles + tile */                            \
  X(NystromResidualPass, residual_backward, NystromParams)        /* the same; grad_v and partial */                   \
  X(NystromResidualPass, residual_weight_backward, NystromParams) /* head of one image */

struct Kernels {
  const char* isa;
#define CXV_PASS(Class, name, Params) void (*name)(const Params&, int64_t begin, int64_t end);
  CXV_PASSES(CXV_PASS)
#undef CXV_PASS
};

extern const Kernels kBaselineKernels, kAvx2Kernels, kAvx512Kernels;

// Those of the widest instruction set that the CPU has; CXV_CPU_ISA=baseline|avx2|avx512 in the environment (read once)
// limits it, for tests.
const Kernels& kernels();

}  // namespace cxv
