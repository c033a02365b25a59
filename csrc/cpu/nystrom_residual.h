// Nyström attention's residual: the convolution of the values along the tokens, for one instruction set.
#pragma once

#include "simd/tile.h"

namespace cxv::CXV_ISA {

// A tile's convolution is its product with the band matrix of the weight: A(i, l) = w(l − i), zeros outside.
template <class T>
class NystromResidualPass {
  using A = Accumulate<T>;
  using V = Vec<A>;
  static constexpr int W = kWidth<A>;

 public:
  explicit NystromResidualPass(const NystromParams& p)
      : p_(p),
        E_(p.value_dim),
        Ep_(padded<A>(p.value_dim)),
        K_(p.kernel),
        Kp_(round_up(p.kernel)),
        scratch_(Ep_ * (3 * kResidualTile + 2 * Kp_ + 4 * kRows) + Kp_ * W + padded<A>(Kp_ + 4 * kRows)) {
    tile_ = scratch_.take(kResidualTile * Ep_);
    near_ = scratch_.take((kResidualTile + Kp_ + 2 * kRows) * Ep_);
    weight_ = scratch_.take(padded<A>(Kp_ + 4 * kRows)) + kRows;
  }

  void residual(int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const Tile t(p_, item);
      load_weight(t.head, false);
      load_near(near_, p_.token_values, t);
      pack(tile_, Ep_, rows_of<T>(p_, p_.attention, t.head, t.first), t.rows, E_);
      convolve(t.rows, true);
      unpack(rows_of<T>(p_, p_.out, t.head, t.first), tile_, Ep_, t.rows, E_);
    }
  }

  void residual_backward(int64_t begin, int64_t end) {
    A* values = scratch_.take((kResidualTile + Kp_ + 2 * kRows) * Ep_);
    A* sums = scratch_.take(Kp_ * W);
    for (int64_t item = begin; item < end; ++item) {
      const Tile t(p_, item);
      load_weight(t.head, true);
      load_near(near_, p_.grad_out, t);
      if (p_.grad_token_values.data != nullptr) {
        convolve(t.rows, false);
        unpack(rows_of<T>(p_, p_.grad_token_values, t.head, t.first), tile_, Ep_, t.rows, E_);
      }
      if (p_.grad_weight.data == nullptr) continue;
      load_near(values, p_.token_values, t);
      A* partial = static_cast<A*>(p_.partial) + item * K_;
      for (int64_t tap = 0; tap < K_; tap += kRows) {
        correlate(sums, near_ + K_ / 2 * Ep_, values + tap * Ep_, t.rows);
        for (int64_t i = 0; i < kRows && tap + i < K_; ++i) partial[tap + i] = reduce_add<A>(load<A>(sums + i * W));
      }
    }
  }

  void residual_weight_backward(int64_t begin, int64_t end) {
    for (int64_t head = begin; head < end; ++head)
      for (int64_t tap = 0; tap < K_; ++tap) {
        double sum = 0;
        for (int64_t image = 0; image < p_.batch; ++image)
          for (int64_t tile = 0; tile < p_.tiles; ++tile)
            sum += static_cast<const A*>(p_.partial)[((image * p_.heads + head) * p_.tiles + tile) * K_ + tap];
        from_float(A(sum), &weights_of<T>(p_.grad_weight, head)(tap, 0));
      }
  }

 private:
  struct Tile {
    int64_t head, first, rows;
    Tile(const NystromParams& p, int64_t item)
        : head(item / p.tiles), first(item % p.tiles * kResidualTile), rows(least(p.tokens - first, kResidualTile)) {}
  };

  // The taps of a head: (H, 1, K, 1), whatever the batch.
  template <class U>
  Matrix<U> weights_of(const View& view, int64_t head) const {
    return {static_cast<U*>(view.data) + head % p_.heads * view.stride[0], view.stride[2], 0};
  }
  // Zeros lie around the weight: kRows outputs that are a token apart read it at once.
  void load_weight(int64_t head, bool flipped) {
    const auto weight = weights_of<const T>(p_.weight, head);
    for (int64_t tap = 0; tap < K_; ++tap) weight_[flipped ? K_ - 1 - tap : tap] = to_float(weight(tap, 0));
  }

  // dst = a tile's tokens and those that the kernel reaches, zeros where there are none.
  void load_near(A* dst, const View& view, const Tile& t) {
    const int64_t first = t.first - K_ / 2, last = first + round_up(t.rows) + K_ - 1;
    const int64_t from = first < 0 ? 0 : first, to = least(last, p_.tokens);
    fill(dst, (from - first) * Ep_);
    pack(dst + (from - first) * Ep_, Ep_, rows_of<T>(p_, view, t.head, from), to - from, E_);
    fill(dst + (to - first) * Ep_, (last - to) * Ep_);
  }

  void convolve(int64_t rows, bool add) {
    for (int64_t i = 0; i < rows; i += kRows)
      product<A>(tile_ + i * Ep_, Ep_, weight_, -1, 1, near_ + i * Ep_, Ep_, kRows, Ep_, K_ + kRows - 1, add);
  }

  // sums (kRows × W) = Σ over the tile of x(n) y(n + i), for i < kRows, W partial sums each.
  void correlate(A* sums, const A* x, const A* y, int64_t rows) const {
    V acc[kRows] = {};
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t e = 0; e < Ep_; e += W) {
        const V g = load<A>(x + r * Ep_ + e);
#pragma GCC unroll 8
        for (int i = 0; i < kRows; ++i) acc[i] += g * load<A>(y + (r + i) * Ep_ + e);
      }
    for (int i = 0; i < kRows; ++i) store<A>(sums + i * W, acc[i]);
  }

  const NystromParams& p_;
  const int64_t E_, Ep_, K_, Kp_;
  Scratch<A> scratch_;
  A *weight_, *tile_, *near_;
};

}  // namespace cxv::CXV_ISA
