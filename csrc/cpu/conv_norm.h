// The norm pass of conv_norm and its backward, block by block of pixels, for one instruction set. The derivation is in
// cxv_kernels/ops/conv_norm/README.md; names follow it.
#pragma once

#include "../core/conv_norm.h"
#include "simd/worker.h"

namespace cxv::CXV_ISA {

// The first n elements of a vector, zeros after them; n may be 0 or less, or exceed the vector.
template <class T, class A = Accumulate<T>>
CXV_INLINE Vec<A> load_some(const T* p, int64_t n) {
  if (n >= kWidth<A>) return load_float(p);
  T some[kWidth<A>] = {};
  for (int64_t i = 0; i < n; ++i) some[i] = p[i];
  return load_float(some);
}
template <class T, class A = Accumulate<T>>
CXV_INLINE void store_some(T* p, Vec<A> x, int64_t n) {
  if (n >= kWidth<A>) return store_float(p, x);
  T some[kWidth<A>];
  store_float(some, x);
  for (int64_t i = 0; i < n; ++i) p[i] = some[i];
}

// Mean and 1/σ from Σ(u − shift) and Σ(u − shift)². The shift is the rounded mean, so that a large mean costs no
// digits: the deviation of u is (u − shift) − offset.
template <class A>
struct Statistics {
  A offset, rstd;
  Statistics(A sum, A squares, A channels, A eps) {
    offset = sum / channels;
    const A variance = squares / channels - offset * offset;
    rstd = 1 / std::sqrt((variance < 0 ? A(0) : variance) + eps);
  }
};

template <class T>
class ConvNormPass {
  using A = Accumulate<T>;
  using V = Vec<A>;
  static constexpr int W = kWidth<A>;
  static constexpr int J = 4;              // vectors of neighboring pixels in a tile of NCHW
  static constexpr int64_t kWide = J * W;  // divides a block
  static_assert(ConvNormParams::kBlock % kWide == 0);

 public:
  explicit ConvNormPass(const ConvNormParams& p)
      : p_(p),
        C_(p.channels),
        Cp_((p.channels + W - 1) / W * W),
        y_(static_cast<T*>(p.y)),
        rstd_(static_cast<A*>(p.rstd)),
        g_(static_cast<const T*>(p.grad_out)),
        du_(static_cast<T*>(p.grad_conv)),
        scratch_(4 * Cp_ + (p.channels_last ? 8 * Cp_ : 3 * Cp_ * W + 2 * C_ * kWide)) {
    gamma_ = parameter(static_cast<const A*>(p.gamma));
    beta_ = parameter(static_cast<const A*>(p.beta));
    bias_ = parameter(static_cast<const T*>(p.bias));
    inverse_ = scratch_.take(Cp_);
    for (int64_t c = 0; c < C_; ++c) inverse_[c] = 1 / gamma_[c];
    for (int i = 0; i < W; ++i) last_[i] = C_ - (Cp_ - W) > i;
  }

  void norm_forward(int64_t begin, int64_t end) {
    if (p_.channels_last) {
      A* row = scratch_.take(Cp_);
      for_pixels(begin, end, [&](int64_t pixel) { forward_pixel(row, pixel); });
    } else {
      A* tile = scratch_.take(C_ * kWide);
      for_tiles(begin, end, [&](int64_t image, int64_t n, int64_t count) { forward_tile(tile, image, n, count); });
    }
  }

  void norm_backward(int64_t begin, int64_t end) {
    const int64_t per_split = (p_.blocks() + p_.splits - 1) / p_.splits;
    const int64_t lanes = p_.channels_last ? 1 : W;
    A* sums = scratch_.take(3 * Cp_ * lanes);
    A* block = p_.channels_last ? scratch_.take(3 * Cp_) : nullptr;
    A* xhat = scratch_.take(p_.channels_last ? Cp_ : C_ * kWide);
    A* a = scratch_.take(p_.channels_last ? Cp_ : C_ * kWide);
    for (int64_t split = begin; split < end; ++split) {
      for (int64_t i = 0; i < 3 * Cp_ * lanes; ++i) sums[i] = 0;
      const int64_t first = split * per_split, stop = first + per_split < p_.blocks() ? first + per_split : p_.blocks();
      if (p_.channels_last) {
        for (int64_t b = first; b < stop; ++b) {
          for (int64_t i = 0; i < 3 * Cp_; ++i) block[i] = 0;
          for_pixels(b, b + 1, [&](int64_t pixel) { backward_pixel(block, xhat, a, pixel); });
          for (int64_t i = 0; i < 3 * Cp_; ++i) sums[i] += block[i];
        }
      } else {
        for_tiles(first, stop,
                  [&](int64_t image, int64_t n, int64_t count) { backward_tile(sums, xhat, a, image, n, count); });
      }
      A* partial = static_cast<A*>(p_.partial) + split * 3 * C_;
      for (int64_t k = 0; k < 3; ++k)
        for (int64_t c = 0; c < C_; ++c) {
          const A* sum = sums + (k * Cp_ + c) * lanes;
          partial[k * C_ + c] = p_.channels_last ? *sum : reduce_add<A>(load<A>(sum));
        }
    }
  }

  void norm_backward_reduce(int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      A sums[3] = {};
      for (int64_t s = 0; s < p_.splits; ++s)
        for (int64_t k = 0; k < 3; ++k) sums[k] += static_cast<const A*>(p_.partial)[(s * 3 + k) * C_ + c];
      if (p_.grad_gamma) static_cast<A*>(p_.grad_gamma)[c] = sums[0];
      if (p_.grad_beta) static_cast<A*>(p_.grad_beta)[c] = sums[1];
      if (p_.grad_bias) from_float(sums[2], static_cast<T*>(p_.grad_bias) + c);
    }
  }

 private:
  // (C) widened, zeros from C to Cp.
  template <class S>
  A* parameter(const S* from) {
    A* to = scratch_.take(Cp_);
    for (int64_t c = 0; from && c < C_; ++c) to[c] = to_float(from[c]);
    return to;
  }

  // f(pixel) for the pixels of blocks of channels_last.
  template <class F>
  void for_pixels(int64_t begin, int64_t end, F&& f) {
    const int64_t all = p_.batch * p_.pixels,
                  stop = end * ConvNormParams::kBlock < all ? end * ConvNormParams::kBlock : all;
    for (int64_t n = begin * ConvNormParams::kBlock; n < stop; ++n) f(n);
  }

  // f(image, its first pixel, pixels) for the tiles of blocks of NCHW.
  template <class F>
  void for_tiles(int64_t begin, int64_t end, F&& f) {
    const int64_t per_image = p_.blocks_of_an_image();
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block % per_image * ConvNormParams::kBlock;
      for (int64_t n = first; n < first + ConvNormParams::kBlock && n < p_.pixels; n += kWide)
        f(block / per_image, n, p_.pixels - n < kWide ? p_.pixels - n : kWide);
    }
  }

  // The pixel's convolution + bias in row; its shift, offset and 1/σ.
  CXV_INLINE Statistics<A> read_pixel(A* row, const T* u, A* shift) const {
    V sum = {};
    for (int64_t c = 0; c < Cp_; c += W) {
      const V v = load_some(u + c, C_ - c) + load<A>(bias_ + c);
      store<A>(row + c, v);
      sum += v;
    }
    *shift = reduce_add<A>(sum) / A(C_);
    const V m = splat<A>(*shift);
    V first = {}, second = {};
    for (int64_t c = 0; c < Cp_; c += W) {
      V d = load<A>(row + c) - m;
      if (c + W > C_) d *= last_;
      first += d;
      second += d * d;
    }
    return Statistics<A>(reduce_add<A>(first), reduce_add<A>(second), A(C_), A(p_.eps));
  }

  void forward_pixel(A* row, int64_t pixel) {
    T* u = y_ + pixel * C_;
    A shift;
    const auto s = read_pixel(row, u, &shift);
    rstd_[pixel] = s.rstd;
    const V m = splat<A>(shift), offset = splat<A>(s.offset), r = splat<A>(s.rstd);
    for (int64_t c = 0; c < Cp_; c += W) {
      const V xhat = (load<A>(row + c) - m - offset) * r;
      store_some(u + c, xhat * load<A>(gamma_ + c) + load<A>(beta_ + c), C_ - c);
    }
  }

  void backward_pixel(A* sums, A* xhat, A* a, int64_t pixel) {
    const T* y = y_ + pixel * C_;
    const T* g = g_ + pixel * C_;
    A shift = 0, offset = 0;
    if (p_.from_conv) offset = read_pixel(xhat, y, &shift).offset;
    const V m = splat<A>(shift), o = splat<A>(offset), r = splat<A>(rstd_[pixel]);
    V sum_a = {}, sum_ax = {};
    for (int64_t c = 0; c < Cp_; c += W) {
      const V x = p_.from_conv ? (load<A>(xhat + c) - m - o) * r
                               : (load_some(y + c, C_ - c) - load<A>(beta_ + c)) * load<A>(inverse_ + c);
      const V dy = load_some(g + c, C_ - c), da = dy * load<A>(gamma_ + c);
      sum_a += da;
      sum_ax += da * x;
      store<A>(xhat + c, x);
      store<A>(a + c, da);
      add(sums + c, dy * x);
      add(sums + Cp_ + c, dy);
    }
    if (!du_ && !p_.grad_bias) return;
    const V mean_a = splat<A>(reduce_add<A>(sum_a) / A(C_)), mean_ax = splat<A>(reduce_add<A>(sum_ax) / A(C_));
    for (int64_t c = 0; c < Cp_; c += W) {
      const V du = r * (load<A>(a + c) - mean_a - load<A>(xhat + c) * mean_ax);
      add(sums + 2 * Cp_ + c, du);
      if (du_) store_some(du_ + pixel * C_ + c, du, C_ - c);
    }
  }

  // As read_pixel, for kWide pixels: tile (C × kWide); shift, offset and 1/σ of each.
  CXV_INLINE void read_tile(A* tile, const T* u, int64_t count, V* shift, V* offset, V* rstd) const {
    V sum[J] = {};
    for (int64_t c = 0; c < C_; ++c) {
      const V bias = splat<A>(bias_[c]);
#pragma GCC unroll 4
      for (int j = 0; j < J; ++j) {
        __builtin_prefetch(u + c * p_.pixels + j * W + kWide);  // as in backward_tile
        const V v = load_some(u + c * p_.pixels + j * W, count - j * W) + bias;
        store<A>(tile + c * kWide + j * W, v);
        sum[j] += v;
      }
    }
    V first[J] = {}, second[J] = {};
    for (int j = 0; j < J; ++j) shift[j] = sum[j] / A(C_);
    for (int64_t c = 0; c < C_; ++c) {
#pragma GCC unroll 4
      for (int j = 0; j < J; ++j) {
        const V d = load<A>(tile + c * kWide + j * W) - shift[j];
        first[j] += d;
        second[j] += d * d;
      }
    }
    for (int j = 0; j < J; ++j)
      for (int i = 0; i < W; ++i) {
        const Statistics<A> s(first[j][i], second[j][i], A(C_), A(p_.eps));
        offset[j][i] = s.offset;
        rstd[j][i] = s.rstd;
      }
  }

  void forward_tile(A* tile, int64_t image, int64_t n, int64_t count) {
    T* u = y_ + image * C_ * p_.pixels + n;
    V shift[J], offset[J], r[J];
    read_tile(tile, u, count, shift, offset, r);
    for (int j = 0; j < J; ++j) store_some(rstd_ + image * p_.pixels + n + j * W, r[j], count - j * W);
    for (int64_t c = 0; c < C_; ++c) {
      const V gamma = splat<A>(gamma_[c]), beta = splat<A>(beta_[c]);
#pragma GCC unroll 4
      for (int j = 0; j < J; ++j) {
        const V xhat = (load<A>(tile + c * kWide + j * W) - shift[j] - offset[j]) * r[j];
        store_some(u + c * p_.pixels + j * W, xhat * gamma + beta, count - j * W);
      }
    }
  }

  void backward_tile(A* sums, A* xhat, A* a, int64_t image, int64_t n, int64_t count) {
    const int64_t origin = image * C_ * p_.pixels + n;
    V shift[J] = {}, offset[J] = {}, r[J];
    if (p_.from_conv) read_tile(xhat, y_ + origin, count, shift, offset, r);
    for (int j = 0; j < J; ++j) r[j] = load_some(rstd_ + image * p_.pixels + n + j * W, count - j * W);
    V sum_a[J] = {}, sum_ax[J] = {};
    for (int64_t c = 0; c < C_; ++c) {
      const V gamma = splat<A>(gamma_[c]), beta = splat<A>(beta_[c]), inverse = splat<A>(inverse_[c]);
      const int64_t row = origin + c * p_.pixels;
      V dgamma = {}, dbeta = {};
#pragma GCC unroll 4
      for (int j = 0; j < J; ++j) {
        const int64_t left = count - j * W;
        __builtin_prefetch(y_ + row + j * W + kWide);  // the next tile: its rows are too short for the hardware's
        __builtin_prefetch(g_ + row + j * W + kWide);
        const V x = p_.from_conv ? (load<A>(xhat + c * kWide + j * W) - shift[j] - offset[j]) * r[j]
                                 : (load_some(y_ + row + j * W, left) - beta) * inverse;
        const V dy = load_some(g_ + row + j * W, left), da = dy * gamma;
        sum_a[j] += da;
        sum_ax[j] += da * x;
        store<A>(xhat + c * kWide + j * W, x);
        store<A>(a + c * kWide + j * W, da);
        dgamma += dy * x;
        dbeta += dy;
      }
      add(sums + c * W, dgamma);
      add(sums + (Cp_ + c) * W, dbeta);
    }
    if (!du_ && !p_.grad_bias) return;
    for (int j = 0; j < J; ++j) sum_a[j] /= A(C_), sum_ax[j] /= A(C_);
    for (int64_t c = 0; c < C_; ++c) {
      V dbias = {};
#pragma GCC unroll 4
      for (int j = 0; j < J; ++j) {
        const V da = load<A>(a + c * kWide + j * W), x = load<A>(xhat + c * kWide + j * W);
        const V du = r[j] * (da - sum_a[j] - x * sum_ax[j]);
        dbias += du;
        if (du_) store_some(du_ + origin + c * p_.pixels + j * W, du, count - j * W);
      }
      add(sums + (2 * Cp_ + c) * W, dbias);
    }
  }

  static CXV_INLINE void add(A* to, V x) { store<A>(to, load<A>(to) + x); }

  const ConvNormParams& p_;
  const int64_t C_, Cp_;
  T* y_;
  A* rstd_;
  const T* g_;
  T* du_;
  Scratch<A> scratch_;
  A* gamma_;
  A* beta_;
  A* bias_;
  A* inverse_;
  V last_;  // 1 where the last vector of channels holds a channel, else 0
};

}  // namespace cxv::CXV_ISA
