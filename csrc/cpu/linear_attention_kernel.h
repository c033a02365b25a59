// Linear attention in tiles of tokens, for one instruction set. The derivation is in
// cxv_kernels/linear_attention/README.md; names follow it.
#pragma once

#include "../include/linear_attention.h"
#include "../include/tile.h"
#include "worker.h"

namespace cxv {
namespace CXV_ISA {

// Tokens [begin, end) of one split: the same for every batch and thread count.
struct Range {
  int64_t begin, end;
  Range(int64_t tokens, int64_t splits, int64_t split) {
    const int64_t tiles = (tokens + kTile - 1) / kTile, per_split = (tiles + splits - 1) / splits;
    begin = split * per_split * kTile;
    end = begin + per_split * kTile;
    if (begin > tokens) begin = tokens;
    if (end > tokens) end = tokens;
  }
};

template <class T>
class LinearAttentionPass {
  using A = typename Accumulate<T>::type;
  using V = Vec<A>;
  static constexpr int W = kWidth<A>;

 public:
  explicit LinearAttentionPass(const LinearAttention& p)
      : p_(p),
        D_(p.dim),
        E_(p.value_dim),
        Dp_(padded<A>(p.dim)),
        Ep_(padded<A>(p.value_dim)),
        scale_(p.feature_map == FeatureMap::kSoftmax ? A(std::pow(double(p.dim), -0.25)) : A(1)),
        scratch_(3 * kTile * (Dp_ + Ep_) + 3 * (Dp_ * Ep_) + Ep_ * Dp_ + 4 * Dp_) {}

  void key_pass(int64_t begin, int64_t end) {
    A* phi = scratch_.take(kTile * Dp_);
    A* values = scratch_.take(kTile * Ep_);
    A* S = scratch_.take(Dp_ * Ep_);
    A* max = scratch_.take(Dp_);
    A* z = scratch_.take(Dp_);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t head = item / p_.key_splits;
      fill(S, Dp_ * Ep_, 0);
      fill(z, Dp_, 0);
      fill(max, Dp_, -A(INFINITY));
      const Range range(p_.keys, p_.key_splits, item % p_.key_splits);
      for (int64_t n = range.begin; n < range.end; n += kTile) {
        const int64_t rows = tile_rows(n, range.end);
        load_tile(phi, Dp_, p_.k, head, n, rows, D_);
        if (p_.feature_map == FeatureMap::kSoftmax) {
          raise_max(phi, max, z, S, head, n, rows);
          exp_columns(phi, max, rows);
        } else {
          apply_map(phi, rows);
        }
        hide(phi, head, n, rows);
        for (int64_t r = 0; r < rows; ++r)
          for (int64_t d = 0; d < Dp_; d += W) store<A>(z + d, load<A>(z + d) + load<A>(phi + r * Dp_ + d));
        int64_t ld;
        const A* x = value_tile(values, &ld, p_.v, head, n, rows);
        product<A>(S, Ep_, phi, 1, Dp_, x, ld, Dp_, Ep_, rows, true);
      }
      A* partial = static_cast<A*>(p_.partial) + item * (2 * D_ + D_ * E_);
      copy(partial, max, D_);
      copy(partial + D_, z, D_);
      for (int64_t d = 0; d < D_; ++d) copy(partial + 2 * D_ + d * E_, S + d * Ep_, E_);
    }
  }

  void key_reduce(int64_t begin, int64_t end) {
    const int64_t size = 2 * D_ + D_ * E_;
    for (int64_t head = begin; head < end; ++head) {
      const A* partial = static_cast<const A*>(p_.partial) + head * p_.key_splits * size;
      A* S = static_cast<A*>(p_.state) + head * D_ * E_;
      A* stat = static_cast<A*>(p_.key_stat) + head * D_;
      fill(S, D_ * E_, 0);
      for (int64_t d = 0; d < D_; ++d) {
        A max = -A(INFINITY), z = 0;
        for (int64_t s = 0; s < p_.key_splits; ++s) max = partial[s * size + d] > max ? partial[s * size + d] : max;
        for (int64_t s = 0; s < p_.key_splits; ++s) {
          const A* part = partial + s * size;
          const A weight = p_.feature_map != FeatureMap::kSoftmax ? A(1)
                           : max > -A(INFINITY)                   ? std::exp(part[d] - max)
                                                                  : A(0);
          z += weight * part[D_ + d];
          for (int64_t e = 0; e < E_; ++e) S[d * E_ + e] += weight * part[2 * D_ + d * E_ + e];
        }
        stat[d] = z;
        if (p_.feature_map == FeatureMap::kSoftmax) {
          // No key is seen: exp(k − ∞) = 0 makes every φ(k) of the backward pass 0.
          stat[d] = z == 0 ? A(INFINITY) : max + std::log(z);
          for (int64_t e = 0; e < E_; ++e) S[d * E_ + e] = z == 0 ? A(0) : S[d * E_ + e] / z;
        }
      }
    }
  }

  void query_pass(int64_t begin, int64_t end) {
    A* phi = scratch_.take(kTile * Dp_);
    A* out = scratch_.take(kTile * Ep_);
    A* S = scratch_.take(Dp_ * Ep_);
    A* z = scratch_.take(Dp_);
    int64_t loaded = -1;
    for (int64_t item = begin; item < end; ++item) {
      const int64_t head = item / p_.query_splits;
      if (head != loaded) {
        load_state(S, p_.state, head);
        if (p_.feature_map != FeatureMap::kSoftmax) copy(z, static_cast<const A*>(p_.key_stat) + head * D_, D_);
        loaded = head;
      }
      const Range range(p_.queries, p_.query_splits, item % p_.query_splits);
      for (int64_t n = range.begin; n < range.end; n += kTile) {
        const int64_t rows = tile_rows(n, range.end);
        load_tile(phi, Dp_, p_.q, head, n, rows, D_);
        if (p_.feature_map == FeatureMap::kSoftmax)
          softmax_rows(phi, rows);
        else
          apply_map(phi, rows);
        product<A>(out, Ep_, phi, Dp_, 1, S, Ep_, round_up(rows), Ep_, D_, false);
        if (p_.feature_map != FeatureMap::kSoftmax)
          for (int64_t r = 0; r < rows; ++r) scale_row(out + r * Ep_, Ep_, inverse(dot(phi + r * Dp_, z, Dp_) + eps()));
        store_tile(p_.out, head, n, out, Ep_, rows, E_);
      }
    }
  }

  // dφ(q) = (dO Sᵀ − c zᵀ)/den with c = φ(q)·(dO Sᵀ)/den, and the sums dS = Σ φ(q)ᵀ dO/den, dz = −Σ φ(q) c/den.
  // softmax has no denominator: dq = p ⊙ (G − Σ_d p G) with G = dO Sᵀ.
  void query_backward(int64_t begin, int64_t end) {
    A* phi = scratch_.take(kTile * Dp_);
    A* G = scratch_.take(kTile * Dp_);
    A* gradient = scratch_.take(kTile * Ep_);
    A* S = scratch_.take(Dp_ * Ep_);
    A* St = scratch_.take(Ep_ * Dp_);
    A* dS = scratch_.take(Dp_ * Ep_);
    A* z = scratch_.take(Dp_);
    A* dz = scratch_.take(Dp_);
    const bool softmax = p_.feature_map == FeatureMap::kSoftmax;
    int64_t loaded = -1;
    for (int64_t item = begin; item < end; ++item) {
      const int64_t head = item / p_.query_splits;
      if (head != loaded) {
        load_state(S, p_.state, head);
        transpose(St, S);
        if (!softmax) copy(z, static_cast<const A*>(p_.key_stat) + head * D_, D_);
        loaded = head;
      }
      fill(dS, Dp_ * Ep_, 0);
      fill(dz, Dp_, 0);
      const Range range(p_.queries, p_.query_splits, item % p_.query_splits);
      for (int64_t n = range.begin; n < range.end; n += kTile) {
        const int64_t rows = tile_rows(n, range.end);
        load_tile(phi, Dp_, p_.q, head, n, rows, D_);
        if (softmax)
          softmax_rows(phi, rows);
        else
          apply_map(phi, rows);
        int64_t ld;
        const A* dO = value_tile(gradient, &ld, p_.grad_out, head, n, rows);
        product<A>(G, Dp_, dO, ld, 1, St, Dp_, round_up(rows), Dp_, E_, false);
        for (int64_t r = 0; r < rows; ++r) {
          A* f = phi + r * Dp_;
          A* g = G + r * Dp_;
          if (softmax) {
            const V c = splat<A>(dot(f, g, Dp_));
            const V scale = splat<A>(scale_);
            for (int64_t d = 0; d < Dp_; d += W) store<A>(g + d, scale * load<A>(f + d) * (load<A>(g + d) - c));
            continue;
          }
          const A den = dot(f, z, Dp_) + eps();
          const A inv = inverse(den);
          const A c = den == 0 ? A(0) : dot(f, g, Dp_) * inv;
          const V vc = splat<A>(c), vinv = splat<A>(inv);
          for (int64_t d = 0; d < Dp_; d += W) {
            const V y = load<A>(f + d), y_over_den = y * vinv;
            store<A>(g + d, (load<A>(g + d) - vc * load<A>(z + d)) * vinv * derivative(y));
            store<A>(f + d, y_over_den);
            store<A>(dz + d, load<A>(dz + d) - vc * y_over_den);
          }
        }
        product<A>(dS, Ep_, phi, 1, Dp_, dO, ld, Dp_, Ep_, rows, true);
        store_tile(p_.grad_q, head, n, G, Dp_, rows, D_);
      }
      A* partial = static_cast<A*>(p_.partial) + item * (D_ + D_ * E_);
      copy(partial, dz, D_);
      for (int64_t d = 0; d < D_; ++d) copy(partial + D_ + d * E_, dS + d * Ep_, E_);
    }
  }

  void query_backward_reduce(int64_t begin, int64_t end) {
    const int64_t size = D_ + D_ * E_;
    for (int64_t head = begin; head < end; ++head) {
      A* dS = static_cast<A*>(p_.grad_state) + head * D_ * E_;
      A* dz = static_cast<A*>(p_.grad_z) + head * D_;
      fill(dS, D_ * E_, 0);
      fill(dz, D_, 0);
      for (int64_t s = 0; s < p_.query_splits; ++s) {
        const A* partial = static_cast<const A*>(p_.partial) + (head * p_.query_splits + s) * size;
        for (int64_t d = 0; d < D_; ++d) dz[d] += partial[d];
        for (int64_t i = 0; i < D_ * E_; ++i) dS[i] += partial[D_ + i];
      }
      if (p_.feature_map == FeatureMap::kSoftmax) {
        const A* S = static_cast<const A*>(p_.state) + head * D_ * E_;
        for (int64_t d = 0; d < D_; ++d) {
          A sum = 0;
          for (int64_t e = 0; e < E_; ++e) sum += dS[d * E_ + e] * S[d * E_ + e];
          dz[d] = -sum;
        }
      }
    }
  }

  // dφ(k) = v dSᵀ + dz and dv = φ(k) dS.
  void key_backward(int64_t begin, int64_t end) {
    A* phi = scratch_.take(kTile * Dp_);
    A* G = scratch_.take(kTile * Dp_);
    A* values = scratch_.take(kTile * Ep_);
    A* gradient = scratch_.take(kTile * Ep_);
    A* dS = scratch_.take(Dp_ * Ep_);
    A* dSt = scratch_.take(Ep_ * Dp_);
    A* dz = scratch_.take(Dp_);
    A* stat = scratch_.take(Dp_);
    const bool softmax = p_.feature_map == FeatureMap::kSoftmax;
    int64_t loaded = -1;
    for (int64_t item = begin; item < end; ++item) {
      const int64_t head = item / p_.key_splits;
      if (head != loaded) {
        load_state(dS, p_.grad_state, head);
        transpose(dSt, dS);
        copy(dz, static_cast<const A*>(p_.grad_z) + head * D_, D_);
        copy(stat, static_cast<const A*>(p_.key_stat) + head * D_, D_);
        loaded = head;
      }
      const Range range(p_.keys, p_.key_splits, item % p_.key_splits);
      for (int64_t n = range.begin; n < range.end; n += kTile) {
        const int64_t rows = tile_rows(n, range.end);
        load_tile(phi, Dp_, p_.k, head, n, rows, D_);
        if (softmax)
          exp_columns(phi, stat, rows);
        else
          apply_map(phi, rows);
        hide(phi, head, n, rows);
        int64_t ld;
        const A* y = value_tile(values, &ld, p_.v, head, n, rows);
        product<A>(G, Dp_, y, ld, 1, dSt, Dp_, round_up(rows), Dp_, E_, false);
        for (int64_t r = 0; r < rows; ++r)
          for (int64_t d = 0; d < Dp_; d += W) {
            const int64_t i = r * Dp_ + d;
            const V f = load<A>(phi + i), dphi = load<A>(G + i) + load<A>(dz + d);
            store<A>(G + i, softmax ? dphi * f * splat<A>(scale_) : dphi * derivative(f));
          }
        hide(G, head, n, rows);
        product<A>(gradient, Ep_, phi, Dp_, 1, dS, Ep_, round_up(rows), Ep_, D_, false);
        store_tile(p_.grad_k, head, n, G, Dp_, rows, D_);
        store_tile(p_.grad_v, head, n, gradient, Ep_, rows, E_);
      }
    }
  }

 private:
  static int64_t tile_rows(int64_t n, int64_t end) { return end - n < kTile ? end - n : kTile; }
  static int64_t round_up(int64_t rows) { return (rows + kRows - 1) / kRows * kRows; }
  static void fill(A* p, int64_t n, A value) {
    for (int64_t i = 0; i < n; ++i) p[i] = value;
  }
  static void copy(A* dst, const A* src, int64_t n) { std::memcpy(dst, src, n * sizeof(A)); }
  static A inverse(A den) { return den == 0 ? A(1) : A(1) / den; }
  A eps() const { return p_.feature_map == FeatureMap::kRelu ? A(p_.eps) : A(0); }

  static A dot(const A* a, const A* b, int64_t n) {
    V sum{};
    for (int64_t i = 0; i < n; i += W) sum += load<A>(a + i) * load<A>(b + i);
    return reduce_add<A>(sum);
  }
  static void scale_row(A* row, int64_t n, A factor) {
    const V f = splat<A>(factor);
    for (int64_t i = 0; i < n; i += W) store<A>(row + i, load<A>(row + i) * f);
  }

  void load_tile(A* dst, int64_t ld, const View& view, int64_t head, int64_t n, int64_t rows, int64_t cols) {
    pack(dst, ld, at<T>(view, head / p_.heads, head % p_.heads, n), view.stride[2], view.stride[3], rows, cols, scale_);
  }
  void store_tile(const View& view, int64_t head, int64_t n, const A* src, int64_t ld, int64_t rows, int64_t cols) {
    unpack(at<T>(view, head / p_.heads, head % p_.heads, n), view.stride[2], view.stride[3], src, ld, rows, cols);
  }
  // A tile of values: where they lie when they can be read as they are, else packed into `buffer`.
  const A* value_tile(A* buffer, int64_t* ld, const View& v, int64_t head, int64_t n, int64_t rows) {
    const T* src = at<T>(v, head / p_.heads, head % p_.heads, n);
    if constexpr (__is_same(T, A)) {
      if (v.stride[3] == 1 && E_ == Ep_ && rows % kRows == 0) {
        *ld = v.stride[2];
        return src;
      }
    }
    pack(buffer, Ep_, src, v.stride[2], v.stride[3], rows, E_);
    *ld = Ep_;
    return buffer;
  }
  void load_state(A* dst, const void* src, int64_t head) {
    const A* from = static_cast<const A*>(src) + head * D_ * E_;
    for (int64_t d = 0; d < D_; ++d) copy(dst + d * Ep_, from + d * E_, E_);
  }
  void transpose(A* dst, const A* src) {
    for (int64_t e = 0; e < E_; ++e)
      for (int64_t d = 0; d < D_; ++d) dst[e * Dp_ + d] = src[d * Ep_ + e];
  }

  const bool* mask(int64_t head, int64_t n) const {
    return p_.key_mask + (head / p_.heads) * p_.mask_stride[0] + n * p_.mask_stride[1];
  }
  // Zeroes the rows of hidden keys.
  void hide(A* tile, int64_t head, int64_t n, int64_t rows) const {
    if (p_.key_mask == nullptr) return;
    const bool* seen = mask(head, n);
    for (int64_t r = 0; r < rows; ++r)
      if (!seen[r * p_.mask_stride[1]]) fill(tile + r * Dp_, Dp_, 0);
  }

  // φ in place, padding columns left at 0.
  void apply_map(A* x, int64_t rows) const {
    const bool elu = p_.feature_map == FeatureMap::kElu;
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t d = 0; d < Dp_; d += W) {
        const V y = load<A>(x + r * Dp_ + d);
        store<A>(x + r * Dp_ + d, elu ? (y > 0 ? y + 1 : exp(y)) : (y < 0 ? V{} : y));
      }
      if (elu) fill(x + r * Dp_ + D_, Dp_ - D_, 0);
    }
  }
  // φ'(x), given φ(x).
  V derivative(V phi) const {
    const V one = splat<A>(1);
    return p_.feature_map == FeatureMap::kElu ? (phi < 1 ? phi : one) : (phi > 0 ? one : V{});
  }

  void softmax_rows(A* x, int64_t rows) const {
    for (int64_t r = 0; r < rows; ++r) {
      A* row = x + r * Dp_;
      fill(row + D_, Dp_ - D_, -A(INFINITY));
      V top = load<A>(row);
      for (int64_t d = W; d < Dp_; d += W) top = vmax<A>(top, load<A>(row + d));
      const V max = splat<A>(reduce_max<A>(top));
      V sum{};
      for (int64_t d = 0; d < Dp_; d += W) {
        const V y = exp(load<A>(row + d) - max);
        store<A>(row + d, y);
        sum += y;
      }
      scale_row(row, Dp_, A(1) / reduce_add<A>(sum));
    }
  }

  // x = exp(x − shift) per column, padding columns 0. Where all that came so far is −∞ there is nothing to shift by.
  void exp_columns(A* x, const A* shift, int64_t rows) const {
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t d = 0; d < Dp_; d += W) {
        const V s = load<A>(shift + d);
        store<A>(x + r * Dp_ + d, exp(load<A>(x + r * Dp_ + d) - (s > -A(INFINITY) ? s : V{})));
      }
      fill(x + r * Dp_ + D_, Dp_ - D_, 0);
    }
  }

  // Raises the running maxima to this tile's and rescales z and S by exp(old − new): exact in one pass.
  void raise_max(const A* x, A* max, A* z, A* S, int64_t head, int64_t n, int64_t rows) const {
    const bool* seen = p_.key_mask == nullptr ? nullptr : mask(head, n);
    for (int64_t d = 0; d < Dp_; d += W) {
      const V old = load<A>(max + d);
      V top = old;
      for (int64_t r = 0; r < rows; ++r)
        if (seen == nullptr || seen[r * p_.mask_stride[1]]) top = vmax<A>(top, load<A>(x + r * Dp_ + d));
      store<A>(max + d, top);
      const V factor = old == top ? splat<A>(1) : exp(old - top);
      store<A>(z + d, load<A>(z + d) * factor);
      for (int i = 0; i < W; ++i)
        if (factor[i] != 1) scale_row(S + (d + i) * Ep_, Ep_, factor[i]);
    }
  }

  const LinearAttention& p_;
  const int64_t D_, E_, Dp_, Ep_;
  const A scale_;
  Scratch<A> scratch_;
};

#define CXV_PASS(name)                                                                         \
  [](const LinearAttention& p, int64_t begin, int64_t end) {                                   \
    for_dtype(p.dtype, [&](auto x) { LinearAttentionPass<decltype(x)>(p).name(begin, end); }); \
  }

inline constexpr LinearAttentionKernels kLinearAttention = {
    CXV_PASS(key_pass),
    CXV_PASS(key_reduce),
    CXV_PASS(query_pass),
    CXV_PASS(query_backward),
    CXV_PASS(query_backward_reduce),
    CXV_PASS(key_backward),
};

#undef CXV_PASS

}  // namespace CXV_ISA
}  // namespace cxv
