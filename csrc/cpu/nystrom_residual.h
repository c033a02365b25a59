// Nyström attention's residual: the convolution of the values along the tokens, for one instruction set.
#pragma once

#include "../core/nystrom_attention.h"
#include "simd/tile.h"
#include "simd/worker.h"

namespace cxv {
namespace CXV_ISA {

inline constexpr int64_t kResidualTile = 2 * kTile;  // tokens: the kernel's overlap is read twice

// A tile's convolution is its product with the band matrix of the weight: A(i, l) = w(l − i), zeros outside.
template <class T>
class NystromResidualPass {
  using A = typename Accumulate<T>::type;
  using V = Vec<A>;
  static constexpr int W = kWidth<A>;

 public:
  explicit NystromResidualPass(const NystromResidualParams& p)
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
      load_near(near_, p_.v, t);
      const View& x = p_.attention;
      pack(tile_, Ep_, at<T>(x, t.image, t.head, t.first), x.stride[2], x.stride[3], t.rows, E_);
      convolve(t.rows, true);
      unpack(at<T>(p_.out, t.image, t.head, t.first), p_.out.stride[2], p_.out.stride[3], tile_, Ep_, t.rows, E_);
    }
  }

  void residual_backward(int64_t begin, int64_t end) {
    A* values = scratch_.take((kResidualTile + Kp_ + 2 * kRows) * Ep_);
    A* sums = scratch_.take(Kp_ * W);
    for (int64_t item = begin; item < end; ++item) {
      const Tile t(p_, item);
      load_weight(t.head, true);
      load_near(near_, p_.grad_out, t);
      const View& dv = p_.grad_v;
      if (dv.data != nullptr) {
        convolve(t.rows, false);
        unpack(at<T>(dv, t.image, t.head, t.first), dv.stride[2], dv.stride[3], tile_, Ep_, t.rows, E_);
      }
      if (p_.grad_weight.data == nullptr) continue;
      load_near(values, p_.v, t);
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
        from_float(A(sum), at<T>(p_.grad_weight, head, 0, tap));
      }
  }

 private:
  struct Tile {
    int64_t image, head, first, rows;
    Tile(const NystromResidualParams& p, int64_t item) {
      const int64_t head_of_all = item / p.tiles;
      image = head_of_all / p.heads;
      head = head_of_all % p.heads;
      first = item % p.tiles * kResidualTile;
      rows = p.tokens - first < kResidualTile ? p.tokens - first : kResidualTile;
    }
  };

  // Zeros lie around the weight: kRows outputs that are a token apart read it at once.
  void load_weight(int64_t head, bool flipped) {
    for (int64_t tap = 0; tap < K_; ++tap)
      weight_[flipped ? K_ - 1 - tap : tap] = to_float(*at<const T>(p_.weight, head, 0, tap));
  }

  // dst = a tile's tokens and those that the kernel reaches, zeros where there are none.
  void load_near(A* dst, const View& view, const Tile& t) {
    const int64_t first = t.first - K_ / 2, last = first + round_up(t.rows) + K_ - 1;
    const int64_t from = first < 0 ? 0 : first, to = last > p_.tokens ? p_.tokens : last;
    for (int64_t i = 0; i < (from - first) * Ep_; ++i) dst[i] = 0;
    pack(dst + (from - first) * Ep_, Ep_, at<const T>(view, t.image, t.head, from), view.stride[2], view.stride[3],
         to - from, E_);
    for (int64_t i = (to - first) * Ep_; i < (last - first) * Ep_; ++i) dst[i] = 0;
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

  const NystromResidualParams& p_;
  const int64_t E_, Ep_, K_, Kp_;
  Scratch<A> scratch_;
  A *weight_, *tile_, *near_;
};

}  // namespace CXV_ISA
}  // namespace cxv
