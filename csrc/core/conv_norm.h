// What a conv_norm kernel is given: plain pointers and sizes. Torch-free.
#pragma once

#include "view.h"

namespace cxv {

// The tensors (B, C, H, W) lie densely in memory: channels_last, or else NCHW. Accumulators ("acc") are double for
// double and float otherwise, contiguous; all else is of the storage dtype.
struct ConvNormParams {
  static constexpr int64_t kBlock = 64;  // pixels of a block

  DType dtype;
  bool channels_last;
  double eps;
  int64_t batch, channels, pixels;  // pixels of an image: H·W
  const void* bias;                 // (C) or null
  const void* gamma;                // acc (C)
  const void* beta;                 // acc (C)
  void* rstd;                       // acc (B, H, W)
  void* y;                          // forward: the convolution, overwritten by the result; backward: see below

  // Backward. y holds the result, or with from_conv the convolution. grad_conv may be y or grad_out.
  bool from_conv;
  const void* grad_out;
  void* grad_conv;   // null: not wanted
  void* grad_gamma;  // acc (C) or null
  void* grad_beta;   // acc (C) or null
  void* grad_bias;   // (C) or null
  int64_t splits;    // of the blocks, each with sums of its own
  void* partial;     // acc (splits, 3, C): the sums of dγ, dβ, dbias

  // A block of NCHW lies in one image; the pixels of all images are one row of channels_last.
  int64_t blocks_of_an_image() const { return (pixels + kBlock - 1) / kBlock; }
  int64_t blocks() const {
    return channels_last ? (batch * pixels + kBlock - 1) / kBlock : batch * blocks_of_an_image();
  }
};

}  // namespace cxv
