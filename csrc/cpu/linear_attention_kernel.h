// Linear attention in tiles of tokens, for one instruction set. The derivation is in
// cxv_kernels/linear_attention/README.md; names follow it, and feature_map.h has φ.
#pragma once

#include "feature_map.h"

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
        M_(p.features),
        E_(p.value_dim),
        Mp_(padded<A>(p.features)),
        Ep_(padded<A>(p.value_dim)),
        scratch_(Features<A>::scratch(p) + 2 * kTile * (Mp_ + Ep_) + 3 * Mp_ * Ep_ + 5 * (Mp_ + Ep_)),
        features_(p, scratch_) {}

  // A partial state of the key pass: the maxima (M), z (M), S (M × E) of e, Σ v (E) and the number of keys for c.
  static int64_t key_partial(const LinearAttention& p) {
    return 2 * p.features + p.features * p.value_dim + p.value_dim + 1;
  }
  // Of the queries' backward pass: dz (M), dS (M × E).
  static int64_t query_partial(const LinearAttention& p) { return p.features + p.features * p.value_dim; }

  void key_pass(int64_t begin, int64_t end) {
    A* phi = scratch_.take(kTile * Mp_);
    A* values = scratch_.take(kTile * Ep_);
    A* S = scratch_.take(Mp_ * Ep_);
    A* max = scratch_.take(Mp_);
    A* z = scratch_.take(Mp_);
    A* sum = scratch_.take(Ep_);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t head = item / p_.key_splits;
      fill(S, Mp_ * Ep_, 0);
      fill(z, Mp_, 0);
      fill(max, Mp_, -A(INFINITY));
      fill(sum, Ep_, 0);
      A count = 0;
      const Range range(p_.keys, p_.key_splits, item % p_.key_splits);
      for (int64_t n = range.begin; n < range.end; n += kTile) {
        const int64_t rows = tile_rows(n, range.end);
        load_tile(phi, p_.k, head, n, rows);
        features_.key_exponents(phi, rows);
        if (features_.shifted()) raise_max(phi, max, z, S, head, n, rows);
        features_.keys(phi, max, rows);
        hide(phi, head, n, rows);
        add_rows(z, phi, Mp_, Mp_, rows);
        int64_t ld;
        const A* x = value_tile(values, &ld, p_.v, head, n, rows);
        product<A>(S, Ep_, phi, 1, Mp_, x, ld, Mp_, Ep_, rows, true);
        if (features_.constant() != 0) count += add_seen(sum, x, ld, head, n, rows);
      }
      A* partial = static_cast<A*>(p_.partial) + (item - p_.wave_begin) * key_partial(p_);
      copy(partial, max, M_);
      copy(partial + M_, z, M_);
      for (int64_t m = 0; m < M_; ++m) copy(partial + 2 * M_ + m * E_, S + m * Ep_, E_);
      copy(partial + 2 * M_ + M_ * E_, sum, E_);
      partial[2 * M_ + M_ * E_ + E_] = count;
    }
  }

  void key_fold(int64_t begin, int64_t end) {
    const int64_t size = key_partial(p_);
    for (int64_t head = begin; head < end; ++head) {
      A* S = static_cast<A*>(p_.state) + head * M_ * E_;
      A* z = static_cast<A*>(p_.key_stat) + head * M_;
      A* max = static_cast<A*>(p_.running) + head * (M_ + E_ + 1);
      A* sum = max + M_;
      const int64_t first = head * p_.key_splits, last = first + p_.key_splits;
      for (int64_t item = first > p_.wave_begin ? first : p_.wave_begin; item < last && item < p_.wave_end; ++item) {
        const A* partial = static_cast<const A*>(p_.partial) + (item - p_.wave_begin) * size;
        if (item == first) {
          copy(max, partial, M_);
          copy(z, partial + M_, M_);
          copy(S, partial + 2 * M_, M_ * E_);
          copy(sum, partial + 2 * M_ + M_ * E_, E_ + 1);
          continue;
        }
        for (int64_t m = 0; m < M_; ++m) {
          A old = 1, now = 1;
          if (features_.shifted()) {
            const A top = partial[m] > max[m] ? partial[m] : max[m];
            old = max[m] == top ? A(1) : std::exp(max[m] - top);
            now = partial[m] == top ? A(1) : std::exp(partial[m] - top);
            max[m] = top;
          }
          z[m] = z[m] * old + partial[M_ + m] * now;
          const A* from = partial + 2 * M_ + m * E_;
          for (int64_t e = 0; e < E_; ++e) S[m * E_ + e] = S[m * E_ + e] * old + from[e] * now;
        }
        for (int64_t e = 0; e <= E_; ++e) sum[e] += partial[2 * M_ + M_ * E_ + e];
      }
      if (last <= p_.wave_end) finish(S, z, max, sum, head);
    }
  }

  void query_pass(int64_t begin, int64_t end) {
    A* phi = scratch_.take(kTile * Mp_);
    A* out = scratch_.take(kTile * Ep_);
    A* S = scratch_.take(Mp_ * Ep_);
    A* z = scratch_.take(Mp_);
    int64_t loaded = -1;
    for (int64_t item = begin; item < end; ++item) {
      const int64_t head = item / p_.query_splits;
      if (head != loaded) {
        load_state(S, p_.state, head);
        load_statistic(z, head);
        loaded = head;
      }
      const Range range(p_.queries, p_.query_splits, item % p_.query_splits);
      for (int64_t n = range.begin; n < range.end; n += kTile) {
        const int64_t rows = tile_rows(n, range.end);
        load_tile(phi, p_.q, head, n, rows);
        features_.queries(phi, bias(z), rows);
        if (features_.constant() != 0) add_constant(phi, rows);
        product<A>(out, Ep_, phi, Mp_, 1, S, Ep_, round_up(rows), Ep_, M_, false);
        if (!features_.normalised())
          for (int64_t r = 0; r < rows; ++r)
            scale_row(out + r * Ep_, Ep_, inverse(features_.dot(phi + r * Mp_, z, Mp_) + eps()));
        store_tile(p_.out, head, n, out, Ep_, rows, E_);
      }
    }
  }

  // dφ(q) = (dO Sᵀ − c zᵀ)/den with c = φ(q)·(dO Sᵀ)/den, and the sums dS = Σ φ(q)ᵀ dO/den, dz = −Σ φ(q) c/den.
  // Normalised maps have no denominator: the exponent's gradient is p ⊙ (G − Σ_m p G) with G = dO Sᵀ; dz is its sum.
  void query_backward(int64_t begin, int64_t end) {
    A* phi = scratch_.take(kTile * Mp_);
    A* G = scratch_.take(kTile * Mp_);
    A* gradient = scratch_.take(kTile * Ep_);
    A* S = scratch_.take(Mp_ * Ep_);
    A* St = scratch_.take(E_ * Mp_);
    A* dS = scratch_.take(Mp_ * Ep_);
    A* z = scratch_.take(Mp_);
    A* dz = scratch_.take(Mp_);
    const FeatureMap map = p_.feature_map;
    const int64_t Mp = Mp_;
    const V constant = splat<A>(features_.constant());
    // dz is of grad_k alone, and the softmax has none here.
    const bool of_queries = p_.grad_q.data != nullptr, of_keys = has_key_gradients(p_);
    const bool with_G = of_queries || (p_.grad_k.data != nullptr && map != FeatureMap::kSoftmax);
    int64_t loaded = -1;
    for (int64_t item = begin; item < end; ++item) {
      const int64_t head = item / p_.query_splits;
      if (head != loaded) {
        if (with_G) {
          load_state(S, p_.state, head);
          transpose(St, S);
        }
        load_statistic(z, head);
        loaded = head;
      }
      fill(dS, Mp_ * Ep_, 0);
      fill(dz, Mp_, 0);
      const Range range(p_.queries, p_.query_splits, item % p_.query_splits);
      for (int64_t n = range.begin; n < range.end; n += kTile) {
        const int64_t rows = tile_rows(n, range.end);
        load_tile(phi, p_.q, head, n, rows);
        features_.queries(phi, bias(z), rows);
        int64_t ld;
        const A* dO = value_tile(gradient, &ld, p_.grad_out, head, n, rows);
        if (with_G) product<A>(G, Mp_, dO, ld, 1, St, Mp_, round_up(rows), Mp_, E_, false);
        for (int64_t r = 0; r < rows; ++r) {
          A* e = phi + r * Mp;
          A* g = G + r * Mp;
          if (features_.normalised()) {
            if (!with_G) break;
            const V c = splat<A>(features_.dot(e, g, Mp));
            for (int64_t d = 0; d < Mp; d += W) {
              const V y = load<A>(e + d) * (load<A>(g + d) - c);
              store<A>(g + d, y);
              if (map == FeatureMap::kFavorExact) store<A>(dz + d, load<A>(dz + d) + y);
            }
            continue;
          }
          // Padding columns of z and G are 0, so that those of φ do not count.
          V phi_z{}, phi_G{};
          for (int64_t d = 0; d < Mp; d += W) {
            const V y = load<A>(e + d) + constant;
            phi_z += y * load<A>(z + d);
            phi_G += y * load<A>(g + d);
          }
          const A den = reduce_add<A>(phi_z) + eps();
          const A inv = inverse(den);
          const V c = splat<A>(den == 0 ? A(0) : reduce_add<A>(phi_G) * inv), vinv = splat<A>(inv);
          for (int64_t d = 0; d < Mp; d += W) {
            const V y = load<A>(e + d), phi_over_den = (y + constant) * vinv;
            store<A>(e + d, phi_over_den);
            if (!with_G) continue;
            store<A>(g + d, (load<A>(g + d) - c * load<A>(z + d)) * vinv * Features<A>::derivative(map, y));
            store<A>(dz + d, load<A>(dz + d) - c * phi_over_den);
          }
        }
        if (of_keys) product<A>(dS, Ep_, phi, 1, Mp_, dO, ld, Mp_, Ep_, rows, true);
        if (of_queries) features_.store_gradient(row<T>(p_.grad_q, head, n), p_.grad_q.stride, G, rows, false);
      }
      if (!of_keys) continue;
      A* partial = static_cast<A*>(p_.partial) + (item - p_.wave_begin) * query_partial(p_);
      copy(partial, dz, M_);
      for (int64_t m = 0; m < M_; ++m) copy(partial + M_ + m * E_, dS + m * Ep_, E_);
    }
  }

  void query_backward_fold(int64_t begin, int64_t end) {
    const int64_t size = query_partial(p_);
    for (int64_t head = begin; head < end; ++head) {
      A* dS = static_cast<A*>(p_.grad_state) + head * M_ * E_;
      A* dz = static_cast<A*>(p_.grad_z) + head * M_;
      const int64_t first = head * p_.query_splits, last = first + p_.query_splits;
      for (int64_t item = first > p_.wave_begin ? first : p_.wave_begin; item < last && item < p_.wave_end; ++item) {
        const A* partial = static_cast<const A*>(p_.partial) + (item - p_.wave_begin) * size;
        if (item == first) {
          copy(dz, partial, M_);
          copy(dS, partial + M_, M_ * E_);
          continue;
        }
        for (int64_t m = 0; m < M_; ++m) dz[m] += partial[m];
        for (int64_t i = 0; i < M_ * E_; ++i) dS[i] += partial[M_ + i];
      }
      if (features_.normalised() && last <= p_.wave_end) {
        // dz = dL − Σ_e dS S; L, the keys' log Σ exp, is in the queries' exponents of exact FAVOR+ alone.
        const A* S = static_cast<const A*>(p_.state) + head * M_ * E_;
        for (int64_t m = 0; m < M_; ++m) {
          A sum = 0;
          for (int64_t e = 0; e < E_; ++e) sum += dS[m * E_ + e] * S[m * E_ + e];
          dz[m] -= sum;
        }
      }
    }
  }

  // dφ(k) = v dSᵀ + dz and dv = φ(k) dS.
  void key_backward(int64_t begin, int64_t end) {
    A* phi = scratch_.take(kTile * Mp_);
    A* G = scratch_.take(kTile * Mp_);
    A* values = scratch_.take(kTile * Ep_);
    A* gradient = scratch_.take(kTile * Ep_);
    A* dS = scratch_.take(Mp_ * Ep_);
    A* dSt = scratch_.take(E_ * Mp_);
    A* dz = scratch_.take(Mp_);
    A* shift = scratch_.take(Mp_);
    const FeatureMap map = p_.feature_map;
    const int64_t Mp = Mp_;
    const V constant = splat<A>(features_.constant());
    const bool of_keys = p_.grad_k.data != nullptr, of_values = p_.grad_v.data != nullptr;
    int64_t loaded = -1;
    for (int64_t item = begin; item < end; ++item) {
      const int64_t head = item / p_.key_splits;
      if (head != loaded) {
        load_state(dS, p_.grad_state, head);
        if (of_keys) transpose(dSt, dS);
        copy(dz, static_cast<const A*>(p_.grad_z) + head * M_, M_);
        if (p_.feature_map == FeatureMap::kFavor)
          fill(shift, M_, static_cast<const A*>(p_.key_max)[head]);
        else
          copy(shift, static_cast<const A*>(p_.key_stat) + head * M_, M_);
        loaded = head;
      }
      const Range range(p_.keys, p_.key_splits, item % p_.key_splits);
      for (int64_t n = range.begin; n < range.end; n += kTile) {
        const int64_t rows = tile_rows(n, range.end);
        load_tile(phi, p_.k, head, n, rows);
        features_.key_exponents(phi, rows);
        features_.keys(phi, shift, rows);
        if (of_keys) {
          int64_t ld;
          const A* y = value_tile(values, &ld, p_.v, head, n, rows);
          product<A>(G, Mp_, y, ld, 1, dSt, Mp_, round_up(rows), Mp_, E_, false);
        }
        for (int64_t r = 0; r < rows; ++r)
          for (int64_t d = 0; d < Mp; d += W) {
            const int64_t i = r * Mp + d;
            const V e = load<A>(phi + i);
            if (of_keys) store<A>(G + i, (load<A>(G + i) + load<A>(dz + d)) * Features<A>::derivative(map, e));
            store<A>(phi + i, e + constant);
          }
        if (of_values) {
          hide(phi, head, n, rows);
          product<A>(gradient, Ep_, phi, Mp_, 1, dS, Ep_, round_up(rows), Ep_, M_, false);
          store_tile(p_.grad_v, head, n, gradient, Ep_, rows, E_);
        }
        if (of_keys) {
          hide(G, head, n, rows);
          features_.store_gradient(row<T>(p_.grad_k, head, n), p_.grad_k.stride, G, rows, true);
        }
      }
    }
  }

  // performer_features: q is x, out φ, grad_out its gradient, key_max what the keys of a head are shifted by, or null
  // for queries. The factor M^-½ of the softmax kernel is here.
  void features_max(int64_t begin, int64_t end) {
    A* phi = scratch_.take(kTile * Mp_);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t head = item / p_.query_splits;
      A max = -A(INFINITY);
      const Range range(p_.queries, p_.query_splits, item % p_.query_splits);
      for (int64_t n = range.begin; n < range.end; n += kTile) {
        const int64_t rows = tile_rows(n, range.end);
        load_tile(phi, p_.q, head, n, rows);
        if (p_.eps == 0) features_.subtract_half_norm(phi, rows);
        for (int64_t r = 0; r < rows; ++r) max = row_max(phi + r * Mp_, max);
      }
      static_cast<A*>(p_.partial)[item] = max;
    }
  }
  void features_forward(int64_t begin, int64_t end) {
    features(begin, end, [&](A* phi, A*, int64_t head, int64_t n, int64_t rows) {
      add_constant(phi, rows);
      unpack(row<T>(p_.out, head, n), p_.out.stride[2], p_.out.stride[3], phi, Mp_, rows, M_, feature_scale());
    });
  }
  void features_backward(int64_t begin, int64_t end) {
    features(begin, end, [&](A* phi, A* G, int64_t head, int64_t n, int64_t rows) {
      pack(G, Mp_, row<T>(p_.grad_out, head, n), p_.grad_out.stride[2], p_.grad_out.stride[3], rows, M_,
           feature_scale());
      for (int64_t i = 0; i < rows * Mp_; i += W)
        store<A>(G + i, load<A>(G + i) * Features<A>::derivative(p_.feature_map, load<A>(phi + i)));
      features_.store_gradient(row<T>(p_.grad_q, head, n), p_.grad_q.stride, G, rows, true);
    });
  }

 private:
  static int64_t tile_rows(int64_t n, int64_t end) { return end - n < kTile ? end - n : kTile; }
  static int64_t round_up(int64_t rows) { return (rows + kRows - 1) / kRows * kRows; }
  static void fill(A* p, int64_t n, A value) {
    for (int64_t i = 0; i < n; ++i) p[i] = value;
  }
  static void copy(A* dst, const A* src, int64_t n) {
    if (n > 0) std::memcpy(dst, src, n * sizeof(A));
  }
  static A inverse(A den) { return den == 0 ? A(1) : A(1) / den; }
  A eps() const { return p_.feature_map == FeatureMap::kRelu ? A(p_.eps) : A(0); }
  A feature_scale() const { return p_.feature_map == FeatureMap::kFavorRelu ? A(1) : A(1 / std::sqrt(double(M_))); }

  static void scale_row(A* row, int64_t n, A factor) {
    const V f = splat<A>(factor);
    for (int64_t i = 0; i < n; i += W) store<A>(row + i, load<A>(row + i) * f);
  }
  static void add_rows(A* sum, const A* x, int64_t ld, int64_t cols, int64_t rows) {
    for (int64_t d = 0; d < cols; d += W) {
      V total = load<A>(sum + d);
      for (int64_t r = 0; r < rows; ++r) total += load<A>(x + r * ld + d);
      store<A>(sum + d, total);
    }
  }
  // Adds the rows of seen keys, and returns how many they are.
  A add_seen(A* sum, const A* x, int64_t ld, int64_t head, int64_t n, int64_t rows) const {
    if (p_.key_mask == nullptr) {
      add_rows(sum, x, ld, Ep_, rows);
      return A(rows);
    }
    const bool* seen = mask(head, n);
    A count = 0;
    for (int64_t r = 0; r < rows; ++r)
      if (seen[r * p_.mask_stride[1]]) {
        add_rows(sum, x + r * ld, ld, Ep_, 1);
        count += 1;
      }
    return count;
  }
  void add_constant(A* phi, int64_t rows) const {
    const V c = splat<A>(features_.constant());
    for (int64_t i = 0; i < rows * Mp_; i += W) store<A>(phi + i, load<A>(phi + i) + c);
  }
  A row_max(const A* row, A max) const {
    for (int64_t m = 0; m < M_; ++m) max = row[m] > max ? row[m] : max;
    return max;
  }

  template <class S>
  S* row(const View& view, int64_t head, int64_t n) const {
    return at<S>(view, head / p_.heads, head % p_.heads, n);
  }
  void load_tile(A* dst, const View& view, int64_t head, int64_t n, int64_t rows) {
    features_.load(dst, row<T>(view, head, n), view.stride, rows);
  }
  void store_tile(const View& view, int64_t head, int64_t n, const A* src, int64_t ld, int64_t rows, int64_t cols) {
    unpack(row<T>(view, head, n), view.stride[2], view.stride[3], src, ld, rows, cols);
  }
  // A tile of values: where they lie when they can be read as they are, else packed into `buffer`.
  const A* value_tile(A* buffer, int64_t* ld, const View& v, int64_t head, int64_t n, int64_t rows) {
    const T* src = row<T>(v, head, n);
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
    const A* from = static_cast<const A*>(src) + head * M_ * E_;
    for (int64_t m = 0; m < M_; ++m) copy(dst + m * Ep_, from + m * E_, E_);
  }
  void transpose(A* dst, const A* src) {
    for (int64_t e = 0; e < E_; ++e)
      for (int64_t m = 0; m < M_; ++m) dst[e * Mp_ + m] = src[m * Ep_ + e];
  }
  // z, or for exact FAVOR+ log Σ exp, where a head that sees no key has no bias.
  void load_statistic(A* dst, int64_t head) {
    const A* from = static_cast<const A*>(p_.key_stat) + head * M_;
    if (p_.feature_map == FeatureMap::kSoftmax) return;
    for (int64_t m = 0; m < M_; ++m) dst[m] = features_.normalised() && from[m] == A(INFINITY) ? A(0) : from[m];
  }
  const A* bias(const A* statistic) const { return p_.feature_map == FeatureMap::kFavorExact ? statistic : nullptr; }

  const bool* mask(int64_t head, int64_t n) const {
    return p_.key_mask + (head / p_.heads) * p_.mask_stride[0] + n * p_.mask_stride[1];
  }
  // Zeroes the rows of hidden keys.
  void hide(A* tile, int64_t head, int64_t n, int64_t rows) const {
    if (p_.key_mask == nullptr) return;
    const bool* seen = mask(head, n);
    for (int64_t r = 0; r < rows; ++r)
      if (!seen[r * p_.mask_stride[1]]) fill(tile + r * Mp_, Mp_, 0);
  }

  // Raises the running maxima to this tile's and rescales z and S by exp(old − new): exact in one pass. FAVOR+ has one
  // maximum for all features.
  void raise_max(const A* x, A* max, A* z, A* S, int64_t head, int64_t n, int64_t rows) const {
    const bool* seen = p_.key_mask == nullptr ? nullptr : mask(head, n);
    if (p_.feature_map == FeatureMap::kFavor) {
      V top = splat<A>(-A(INFINITY));
      const int64_t whole = M_ / W * W;
      A rest = max[0];
      for (int64_t r = 0; r < rows; ++r) {
        if (seen != nullptr && !seen[r * p_.mask_stride[1]]) continue;
        for (int64_t m = 0; m < whole; m += W) top = vmax<A>(top, load<A>(x + r * Mp_ + m));
        for (int64_t m = whole; m < M_; ++m) rest = x[r * Mp_ + m] > rest ? x[r * Mp_ + m] : rest;
      }
      const A old = max[0], body = reduce_max<A>(top), now = body > rest ? body : rest;
      if (now == old) return;
      fill(max, Mp_, now);
      const A factor = std::exp(old - now);
      scale_row(z, Mp_, factor);
      scale_row(S, Mp_ * Ep_, factor);
      return;
    }
    for (int64_t m = 0; m < Mp_; m += W) {
      const V old = load<A>(max + m);
      V top = old;
      for (int64_t r = 0; r < rows; ++r)
        if (seen == nullptr || seen[r * p_.mask_stride[1]]) top = vmax<A>(top, load<A>(x + r * Mp_ + m));
      store<A>(max + m, top);
      const V factor = old == top ? splat<A>(1) : exp(old - top);
      store<A>(z + m, load<A>(z + m) * factor);
      for (int i = 0; i < W; ++i)
        if (factor[i] != 1) scale_row(S + (m + i) * Ep_, Ep_, factor[i]);
    }
  }

  // The last of a head's partial states is in.
  void finish(A* S, A* z, const A* max, const A* sum, int64_t head) const {
    const A c = features_.constant(), count = sum[E_];
    for (int64_t m = 0; m < M_; ++m) {
      if (features_.normalised()) {
        // No key is seen: exp(k − ∞) = 0 makes every φ(k) of the backward pass 0.
        const A total = z[m];
        z[m] = total == 0 ? A(INFINITY) : max[m] + std::log(total);
        for (int64_t e = 0; e < E_; ++e) S[m * E_ + e] = total == 0 ? A(0) : S[m * E_ + e] / total;
      } else if (c != 0) {
        z[m] += c * count;
        for (int64_t e = 0; e < E_; ++e) S[m * E_ + e] += c * sum[e];
      }
    }
    if (p_.key_max != nullptr)
      static_cast<A*>(p_.key_max)[head] = p_.feature_map == FeatureMap::kFavor && M_ > 0 && count > 0 ? max[0] : A(0);
  }

  // φ(q) less its constant, tile by tile: f(phi, a second tile, head, n, rows).
  template <class F>
  void features(int64_t begin, int64_t end, F&& f) {
    A* phi = scratch_.take(kTile * Mp_);
    A* G = scratch_.take(kTile * Mp_);
    A* shift = scratch_.take(Mp_);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t head = item / p_.query_splits;
      if (p_.key_max != nullptr) fill(shift, Mp_, static_cast<const A*>(p_.key_max)[head]);
      const Range range(p_.queries, p_.query_splits, item % p_.query_splits);
      for (int64_t n = range.begin; n < range.end; n += kTile) {
        const int64_t rows = tile_rows(n, range.end);
        load_tile(phi, p_.q, head, n, rows);
        if (p_.key_max != nullptr)
          features_.keys(phi, shift, rows);
        else
          features_.queries(phi, nullptr, rows);
        f(phi, G, head, n, rows);
      }
    }
  }

  const LinearAttention& p_;
  const int64_t M_, E_, Mp_, Ep_;
  Scratch<A> scratch_;
  Features<A> features_;
};

#define CXV_PASS(name)                                                                         \
  [](const LinearAttention& p, int64_t begin, int64_t end) {                                   \
    for_dtype(p.dtype, [&](auto x) { LinearAttentionPass<decltype(x)>(p).name(begin, end); }); \
  }

inline constexpr LinearAttentionKernels kLinearAttention = {
    CXV_PASS(key_pass),
    CXV_PASS(key_fold),
    CXV_PASS(query_pass),
    CXV_PASS(query_backward),
    CXV_PASS(query_backward_fold),
    CXV_PASS(key_backward),
    CXV_PASS(features_max),
    CXV_PASS(features_forward),
    CXV_PASS(features_backward),
    LinearAttentionPass<float>::key_partial,
    LinearAttentionPass<float>::query_partial,
};

#undef CXV_PASS

}  // namespace CXV_ISA
}  // namespace cxv
