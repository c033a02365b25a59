// φ of a tile of tokens, and its gradient, for one instruction set. The derivations are in the README.md of
// cxv_kernels/ops/linear_attention and cxv_kernels/ops/performer_attention. Torch-free.
#pragma once

#include <limits>

#include "simd/tile.h"

namespace cxv::CXV_ISA {

// The feature map φ(x) = e(x) + c. Tiles hold e, and the padding columns of e are 0.
template <class A>
class Features {
  using V = Vec<A>;
  static constexpr int W = kWidth<A>;

 public:
  static int64_t scratch(const LinearAttentionParams& p) {
    return p.projection == nullptr ? 0
                                   : kTile * (2 * padded<A>(p.dim) + 1) + p.dim * padded<A>(p.features) +
                                         p.features * padded<A>(p.dim) + 4 * W;
  }

  Features(const LinearAttentionParams& p, Scratch<A>& scratch)
      : map_(p.feature_map),
        projected_(p.projection != nullptr),
        D_(p.dim),
        M_(p.features),
        Dp_(padded<A>(p.dim)),
        Mp_(padded<A>(p.features)),
        c_(map_ == FeatureMap::kFavor || map_ == FeatureMap::kFavorRelu ? A(p.eps) : A(0)),
        no_constant_(p.eps == 0),
        scale_(map_ == FeatureMap::kElu || map_ == FeatureMap::kEluExact || map_ == FeatureMap::kRelu
                   ? A(1)
                   : A(std::pow(double(p.dim), -0.25))) {
    if (!projected_) return;
    x_ = scratch.take(kTile * Dp_);
    dx_ = scratch.take(kTile * Dp_);
    Wt_ = scratch.take(D_ * Mp_);
    W_ = scratch.take(M_ * Dp_);
    half_norm_ = scratch.take(kTile);
    const A* source = static_cast<const A*>(p.projection);
    for (int64_t m = 0; m < M_; ++m)
      for (int64_t d = 0; d < D_; ++d) W_[m * Dp_ + d] = Wt_[d * Mp_ + m] = source[m * D_ + d];
  }

  A constant() const { return c_; }
  bool normalized() const { return map_ == FeatureMap::kSoftmax || exact(); }
  // A query's weights are the softmax of its own exponents and of log z.
  bool exact() const { return map_ == FeatureMap::kFavorExact || map_ == FeatureMap::kEluExact; }
  // A key's exponent is stabilized by a running maximum.
  bool shifted() const { return normalized() || map_ == FeatureMap::kFavor; }

  // tile (rows × Mp) = what φ is a function of: x, for softmax D^-¼·x, with a projection D^-¼·x·Wᵀ.
  template <class T>
  void load(A* tile, Matrix<T> x, int64_t rows) {
    if (!projected_) return pack(tile, Mp_, x, rows, D_, scale_);
    pack(x_, Dp_, x, rows, D_, scale_);
    product<A>(tile, Mp_, x_, Dp_, 1, Wt_, Mp_, round_up(rows), Mp_, D_, false);
    if (map_ == FeatureMap::kFavorRelu) return;
    for (int64_t r = 0; r < rows; ++r) half_norm_[r] = A(0.5) * dot(x_ + r * Dp_, x_ + r * Dp_, Dp_);
  }

  // Exact FAVOR+ takes the keys' maxima over the whole exponent.
  void key_exponents(A* tile, int64_t rows) {
    if (map_ == FeatureMap::kFavorExact) subtract_half_norm(tile, rows);
  }
  void subtract_half_norm(A* tile, int64_t rows) const {
    for (int64_t r = 0; r < rows; ++r) {
      const V h = splat<A>(half_norm_[r]);
      for (int64_t d = 0; d < Mp_; d += W) store<A>(tile + r * Mp_ + d, load_at(tile, r, d) - h);
    }
  }
  // e of keys, given each feature's shift; null is 0, of kEluExact alone.
  void keys(A* tile, const A* shift, int64_t rows) const {
    if (!shifted() || shift == nullptr) return rectify(tile, rows);
    const bool elu = map_ == FeatureMap::kEluExact;
    for (int64_t r = 0; r < rows; ++r) {
      const V h = splat<A>(map_ == FeatureMap::kFavor ? half_norm_[r] : A(0));
      for (int64_t d = 0; d < Mp_; d += W) {
        // Where all that came so far is −∞ there is nothing to shift by.
        const V x = load_at(tile, r, d), s = CXV_ISA::load<A>(shift + d);
        const V e = exp((elu ? below_zero(x) : x) - ((s > -A(INFINITY) ? s : V{}) + h));
        store<A>(tile + r * Mp_ + d, elu ? e * (above_zero(x) + 1) : e);
      }
      pad(tile + r * Mp_, 0);
    }
  }
  // e of queries. Normalized: the softmax of exponent + bias (of exact FAVOR+, else null).
  void queries(A* tile, const A* bias, int64_t rows) const {
    if (!shifted()) return rectify(tile, rows);
    for (int64_t r = 0; r < rows; ++r) {
      A* row = tile + r * Mp_;
      if (bias != nullptr)
        for (int64_t d = 0; d < Mp_; d += W) store<A>(row + d, load_at(row, 0, d) + CXV_ISA::load<A>(bias + d));
      pad(row, -A(INFINITY));
      V top = load_at(row, 0, 0);
      for (int64_t d = W; d < Mp_; d += W) top = vmax<A>(top, load_at(row, 0, d));
      const A max = reduce_max<A>(top);
      if (map_ == FeatureMap::kFavor) {
        // With c = 0 the maximum is over the whole exponent, and half the squared norm cancels.
        const V shift = splat<A>(no_constant_ ? max : max + half_norm_[r]);
        for (int64_t d = 0; d < Mp_; d += W) store<A>(row + d, exp(load_at(row, 0, d) - shift));
        continue;
      }
      V sum{};
      for (int64_t d = 0; d < Mp_; d += W) {
        const V y = exp(load_at(row, 0, d) - max);
        store<A>(row + d, y);
        sum += y;
      }
      scale_row(row, Mp_, A(1) / reduce_add<A>(sum));
    }
  }
  // φ'(z), given e(z).
  static V derivative(FeatureMap map, V e) {
    const V one = splat<A>(1);
    if (map == FeatureMap::kElu) return e < 1 ? e : one;
    return map == FeatureMap::kRelu || map == FeatureMap::kFavorRelu ? (e > 0 ? one : V{}) : e;
  }
  // Stores the gradient of the tokens that load() read last, given that of the tile (rows × Mp, padding 0).
  template <class T>
  void store_gradient(Matrix<T> grad, A* tile, int64_t rows, bool keys) {
    if (!projected_) return unpack(grad, tile, Mp_, rows, D_, scale_);
    product<A>(dx_, Dp_, tile, Mp_, 1, W_, Dp_, round_up(rows), Dp_, M_, false);
    // −‖x‖²/2 is in the exponent; in an exact query's it cancels.
    if (map_ == FeatureMap::kFavor || (map_ == FeatureMap::kFavorExact && keys))
      for (int64_t r = 0; r < rows; ++r) {
        V sum{};
        for (int64_t d = 0; d < Mp_; d += W) sum += load_at(tile, r, d);
        const V s = splat<A>(reduce_add<A>(sum));
        for (int64_t d = 0; d < Dp_; d += W) {
          A* y = dx_ + r * Dp_ + d;
          store<A>(y, CXV_ISA::load<A>(y) - s * CXV_ISA::load<A>(x_ + r * Dp_ + d));
        }
      }
    unpack(grad, dx_, Dp_, rows, D_, scale_);
  }

  // Computes φ(q) z / Σ φ(q) z of elu, given z up to a factor, and in `factors` unless it is null what z was multiplied
  // by: φ'(q) z / Σ φ(q) z is the result, at most z · factor. Returns false if a sum is so small that underflow changes
  // it; then elu_queries_by_exponents() takes the original tile.
  bool elu_queries(A* tile, const A* z, int64_t rows, A* factors) const {
    const A least = std::numeric_limits<A>::min() / std::numeric_limits<A>::epsilon();
    for (int64_t r = 0; r < rows; ++r) {
      A* row = tile + r * Mp_;
      V sum{};
      for (int64_t d = 0; d < Mp_; d += W) {
        const V y = elu(load_at(row, 0, d)) * CXV_ISA::load<A>(z + d);
        store<A>(row + d, y);
        sum += y;
      }
      const A total = reduce_add<A>(sum), factor = A(1) / total;
      if (!(total >= least)) return false;
      scale_row(row, Mp_, factor);
      if (factors != nullptr) factors[r] = factor;
    }
    return true;
  }
  // The same given log z, and φ'(q) z / Σ φ(q) z in `feature_grad` unless it is null.
  void elu_queries_by_exponents(A* tile, const A* log_z, int64_t rows, A* feature_grad) const {
    for (int64_t r = 0; r < rows; ++r) {
      A* row = tile + r * Mp_;
      pad(row, -A(INFINITY));
      V shift{}, sum{}, top = splat<A>(-A(INFINITY));
      for (int64_t d = 0; d < Mp_; d += W)
        top = vmax<A>(top, below_zero(load_at(row, 0, d)) + CXV_ISA::load<A>(log_z + d));
      const A max = reduce_max<A>(top);
      if (max > -A(INFINITY)) shift = splat<A>(max);
      for (int64_t d = 0; d < Mp_; d += W) {
        const V x = load_at(row, 0, d), u = exp(below_zero(x) + CXV_ISA::load<A>(log_z + d) - shift);
        const V y = u * (above_zero(x) + 1);
        if (feature_grad != nullptr) store<A>(feature_grad + r * Mp_ + d, u);
        store<A>(row + d, y);
        sum += y;
      }
      const A total = reduce_add<A>(sum), factor = A(1) / (total == 0 ? A(1) : total);
      scale_row(row, Mp_, factor);
      if (feature_grad != nullptr) scale_row(feature_grad + r * Mp_, Mp_, factor);
    }
  }

  // Forgets token r of those that load() read last, which is hidden.
  void apply_mask(int64_t r) {
    if (projected_) fill(x_ + r * Dp_, Dp_);
  }

 private:
  V load_at(const A* tile, int64_t r, int64_t d) const { return CXV_ISA::load<A>(tile + r * Mp_ + d); }
  void pad(A* row, A value) const { fill(row + M_, Mp_ - M_, value); }
  // φ of elu is exp(min(x, 0)) · (1 + max(x, 0)). Only the exponential can underflow, so only its exponent is shifted.
  static V below_zero(V x) { return x > 0 ? V{} : x; }
  static V above_zero(V x) { return x > 0 ? x : V{}; }
  static V elu(V x) { return x > 0 ? x + 1 : exp(x); }
  void rectify(A* tile, int64_t rows) const {
    const bool is_elu = map_ == FeatureMap::kElu || map_ == FeatureMap::kEluExact;
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t d = 0; d < Mp_; d += W) {
        const V y = load_at(tile, r, d);
        store<A>(tile + r * Mp_ + d, is_elu ? elu(y) : (y < 0 ? V{} : y));
      }
      if (is_elu) pad(tile + r * Mp_, 0);
    }
  }

  const FeatureMap map_;
  const bool projected_;
  const int64_t D_, M_, Dp_, Mp_;
  const A c_;
  const bool no_constant_;  // c_ is 0 for a tiny eps too
  const A scale_;
  A *x_ = nullptr, *dx_ = nullptr, *Wt_ = nullptr, *W_ = nullptr, *half_norm_ = nullptr;
};

}  // namespace cxv::CXV_ISA
