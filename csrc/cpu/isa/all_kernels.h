// All kernels for one instruction set. Only the .cpp files in this folder include this header.
#pragma once

#include "../conv_norm.h"
#include "../dropout.h"
#include "../linear_attention.h"
#include "../nystrom_attention.h"
#include "../nystrom_residual.h"
#include "kernels.h"

#define CXV_PASS(Pass, name, Params)                                            \
  [](const Params& p, int64_t begin, int64_t end) {                             \
    for_dtype(p.dtype, [&](auto x) { Pass<decltype(x)>(p).name(begin, end); }); \
  }
#define CXV_ATTENTION(name)                                                                          \
  [](const LinearAttentionParams& p, const Workspace& work, int64_t begin, int64_t end) {            \
    for_dtype(p.dtype, [&](auto x) { LinearAttentionPass<decltype(x)>(p, work).name(begin, end); }); \
  }
#define CXV_MIX(name, backward)                                                                     \
  [](const NystromMixParams& p, int64_t begin, int64_t end) {                                       \
    for_dtype(p.dtype, [&](auto x) { NystromMixPass<decltype(x)>(p, backward).name(begin, end); }); \
  }

namespace cxv {
namespace CXV_ISA {

inline constexpr Kernels kKernels = {
    .linear_attention =
        {
            .key_pass = CXV_ATTENTION(key_pass),
            .reduce_keys = CXV_ATTENTION(reduce_keys),
            .query_pass = CXV_ATTENTION(query_pass),
            .query_backward = CXV_ATTENTION(query_backward),
            .reduce_queries = CXV_ATTENTION(reduce_queries),
            .key_backward = CXV_ATTENTION(key_backward),
            .features_max = CXV_ATTENTION(features_max),
            .features_forward = CXV_ATTENTION(features_forward),
            .features_backward = CXV_ATTENTION(features_backward),
            .key_partial = LinearAttentionPass<float>::key_partial,
            .query_partial = LinearAttentionPass<float>::query_partial,
        },
    .dropout = {.apply = dropout},
    .conv_norm =
        {
            .forward = CXV_PASS(ConvNormPass, forward, ConvNormParams),
            .backward = CXV_PASS(ConvNormPass, backward, ConvNormParams),
            .backward_reduce = CXV_PASS(ConvNormPass, backward_reduce, ConvNormParams),
        },
    .nystrom_attention =
        {
            .tile = kTile,
            .residual_tile = kResidualTile,
            .means = CXV_PASS(NystromMeansPass, means, NystromMeansParams),
            .spread = CXV_PASS(NystromMeansPass, spread, NystromMeansParams),
            .readout = CXV_PASS(NystromTokensPass, readout, NystromTokensParams),
            .readout_backward = CXV_PASS(NystromTokensPass, readout_backward, NystromTokensParams),
            .summary = CXV_PASS(NystromTokensPass, summary, NystromTokensParams),
            .summary_backward = CXV_PASS(NystromTokensPass, summary_backward, NystromTokensParams),
            .mix = CXV_MIX(mix, false),
            .mix_backward = CXV_MIX(mix_backward, true),
            .residual = CXV_PASS(NystromResidualPass, residual, NystromResidualParams),
            .residual_backward = CXV_PASS(NystromResidualPass, residual_backward, NystromResidualParams),
            .residual_weight_backward = CXV_PASS(NystromResidualPass, residual_weight_backward, NystromResidualParams),
        },
};

}  // namespace CXV_ISA
}  // namespace cxv
