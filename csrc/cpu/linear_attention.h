// Linear attention in tiles of tokens, for one instruction set. The derivation is in
// cxv_kernels/ops/linear_attention/README.md; names follow it, and feature_map.h has φ.
#pragma once

#include "feature_map.h"

namespace cxv::CXV_ISA {

template <class T>
class LinearAttentionPass {
  using A = Accumulate<T>;
  using V = Vec<A>;
  static constexpr int W = kWidth<A>;

 public:
  explicit LinearAttentionPass(const LinearAttentionWork& p)
      : p_(p),
        M_(p.features),
        E_(p.value_dim),
        Mp_(padded<A>(p.features)),
        Ep_(padded<A>(p.value_dim)),
        scratch_(Features<A>::scratch(p) + kTile * (3 * Mp_ + 2 * Ep_ + 1) + 3 * Mp_ * Ep_ + 5 * (Mp_ + Ep_)),
        features_(p, scratch_) {}

  void key_pass(int64_t begin, int64_t end) {
    A* phi = scratch_.take(kTile * Mp_);
    A* values = scratch_.take(kTile * Ep_);
    A* S = scratch_.take(Mp_ * Ep_);
    A* max = scratch_.take(Mp_);
    A* z = scratch_.take(Mp_);
    A* sum = scratch_.take(Ep_);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t head = item / p_.key_splits;
      fill(S, Mp_ * Ep_);
      fill(z, Mp_);
      fill(max, Mp_, -A(INFINITY));
      fill(sum, Ep_);
      A count = 0;
      for (const auto [n, rows] : Tiles(p_.keys, p_.key_splits, item % p_.key_splits)) {
        features_.load(phi, rows_of<T>(p_, p_.k, head, n), rows);
        features_.key_exponents(phi, rows);
        if (features_.shifted()) raise_max(phi, max, z, S, head, n, rows);
        features_.keys(phi, all_zero(max) ? nullptr : max, rows);
        apply_mask(phi, head, n, rows);
        add_rows(z, phi, Mp_, rows, Mp_);
        int64_t ld;
        const A* x = value_tile(values, &ld, p_.v, head, n, rows, true);
        product<A>(S, Ep_, phi, 1, Mp_, x, ld, Mp_, Ep_, rows, true);
        if (features_.constant() != 0) add_rows(sum, x, ld, rows, Ep_);
        count += seen_rows(head, n, rows);
      }
      A* partial = static_cast<A*>(p_.partial) + (item - p_.first) * key_partial_size(p_);
      copy(partial, max, M_);
      copy(partial + M_, z, M_);
      for (int64_t m = 0; m < M_; ++m) copy(partial + 2 * M_ + m * E_, S + m * Ep_, E_);
      copy(partial + 2 * M_ + M_ * E_, sum, E_);
      partial[2 * M_ + M_ * E_ + E_] = count;
    }
  }

  void reduce_keys(int64_t begin, int64_t end) {
    for (int64_t head = begin; head < end; ++head) {
      A* S = static_cast<A*>(p_.state) + head * M_ * E_;
      A* z = static_cast<A*>(p_.key_stat) + head * M_;
      A* max = static_cast<A*>(p_.running) + head * (M_ + E_ + 1);
      A* sum = max + M_;
      const auto add = [&](const A* partial, bool first) {
        if (first) {
          copy(max, partial, M_);
          copy(z, partial + M_, M_);
          copy(S, partial + 2 * M_, M_ * E_);
          copy(sum, partial + 2 * M_ + M_ * E_, E_ + 1);
          return;
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
      };
      if (for_partials(head, p_.key_splits, key_partial_size(p_), add)) finish(S, z, max, sum, head);
    }
  }

  void query_pass(int64_t begin, int64_t end) {
    A* phi = scratch_.take(kTile * Mp_);
    A* out = scratch_.take(kTile * Ep_);
    A* S = scratch_.take(Mp_ * Ep_);
    A* z = scratch_.take(Mp_);
    A* weight = scratch_.take(Mp_);
    int64_t loaded = -1;
    for (int64_t item = begin; item < end; ++item) {
      const int64_t head = item / p_.query_splits;
      if (head != loaded) {
        load_head(S, z, weight, head);
        loaded = head;
      }
      for (const auto [n, rows] : Tiles(p_.queries, p_.query_splits, item % p_.query_splits)) {
        load_queries(phi, head, n, rows, z, weight);
        if (features_.constant() != 0) add_constant(phi, rows);
        product<A>(out, Ep_, phi, Mp_, 1, S, Ep_, round_up(rows), Ep_, M_, false);
        if (!features_.normalized())
          for (int64_t r = 0; r < rows; ++r) scale_row(out + r * Ep_, Ep_, inverse(dot(phi + r * Mp_, z, Mp_) + eps_));
        unpack(rows_of<T>(p_, p_.out, head, n), out, Ep_, rows, E_);
      }
    }
  }

  // dφ(q) = (dO Sᵀ − c zᵀ)/den with c = φ(q)·(dO Sᵀ)/den, and the sums dS = Σ φ(q)ᵀ dO/den, dz = −Σ φ(q) c/den.
  // Normalized maps have no denominator: the exponent's gradient is p ⊙ (G − Σ_m p G) with G = dO Sᵀ; dz is its sum.
  void query_backward(int64_t begin, int64_t end) {
    A* phi = scratch_.take(kTile * Mp_);
    A* G = scratch_.take(kTile * Mp_);
    A* gradient = scratch_.take(kTile * Ep_);
    A* S = scratch_.take(Mp_ * Ep_);
    A* St = scratch_.take(E_ * Mp_);
    A* dS = scratch_.take(Mp_ * Ep_);
    A* z = scratch_.take(Mp_);
    A* dz = scratch_.take(Mp_);
    A* weight = scratch_.take(Mp_);
    const FeatureMap map = p_.feature_map;
    const bool elu = map == FeatureMap::kEluExact;
    A* factors = scratch_.take(kTile);
    A* feature_grad = elu ? scratch_.take(kTile * Mp_) : nullptr;
    const int64_t Mp = Mp_;
    const V constant = splat<A>(features_.constant());
    // dz is of grad_k alone, and the softmax has none here.
    const bool need_queries = p_.grad_q.data != nullptr, need_keys = has_key_gradients(p_);
    const bool with_G = need_queries || (p_.grad_k.data != nullptr && map != FeatureMap::kSoftmax);
    int64_t loaded = -1;
    for (int64_t item = begin; item < end; ++item) {
      const int64_t head = item / p_.query_splits;
      if (head != loaded) {
        load_head(S, z, weight, head);
        if (with_G) transpose(St, S);
        loaded = head;
      }
      fill(dS, Mp_ * Ep_);
      fill(dz, Mp_);
      for (const auto [n, rows] : Tiles(p_.queries, p_.query_splits, item % p_.query_splits)) {
        const bool by_exponents = load_queries(phi, head, n, rows, z, weight, factors, feature_grad);
        int64_t ld;
        const A* dO = value_tile(gradient, &ld, p_.grad_out, head, n, rows);
        if (with_G) product<A>(G, Mp_, dO, ld, 1, St, Mp_, round_up(rows), Mp_, E_, false);
        for (int64_t r = 0; r < rows; ++r) {
          A* e = phi + r * Mp;
          A* g = G + r * Mp;
          if (features_.normalized()) {
            if (!with_G) break;
            const V c = splat<A>(dot(e, g, Mp));
            if (elu) {
              for (int64_t d = 0; d < Mp; d += W) {
                const V y = load<A>(e + d), difference = load<A>(g + d) - c, limit = load<A>(weight + d) * factors[r];
                const V slope = by_exponents ? load<A>(feature_grad + r * Mp + d) : limit < y ? limit : y;
                store<A>(g + d, slope * difference);
                store<A>(dz + d, load<A>(dz + d) + y * difference);
              }
              continue;
            }
            for (int64_t d = 0; d < Mp; d += W) {
              const V y = load<A>(e + d) * (load<A>(g + d) - c);
              store<A>(g + d, y);
              if (features_.exact()) store<A>(dz + d, load<A>(dz + d) + y);
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
          const A den = reduce_add<A>(phi_z) + eps_;
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
        if (need_keys) product<A>(dS, Ep_, phi, 1, Mp_, dO, ld, Mp_, Ep_, rows, true);
        if (need_queries) features_.store_gradient(rows_of<T>(p_, p_.grad_q, head, n), G, rows, false);
      }
      if (!need_keys) continue;
      A* partial = static_cast<A*>(p_.partial) + (item - p_.first) * query_partial_size(p_);
      for (int64_t m = 0; m < M_; ++m) partial[m] = dz[m] * unit_;
      for (int64_t m = 0; m < M_; ++m)
        for (int64_t e = 0; e < E_; ++e) partial[M_ + m * E_ + e] = dS[m * Ep_ + e] * unit_;
    }
  }

  void reduce_queries(int64_t begin, int64_t end) {
    for (int64_t head = begin; head < end; ++head) {
      A* dS = static_cast<A*>(p_.grad_state) + head * M_ * E_;
      A* dz = static_cast<A*>(p_.grad_z) + head * M_;
      const auto add = [&](const A* partial, bool first) {
        for (int64_t m = 0; m < M_; ++m) dz[m] = first ? partial[m] : dz[m] + partial[m];
        for (int64_t i = 0; i < M_ * E_; ++i) dS[i] = first ? partial[M_ + i] : dS[i] + partial[M_ + i];
      };
      if (!for_partials(head, p_.query_splits, query_partial_size(p_), add) || !features_.normalized()) continue;
      // dz = dL − Σ_e dS S; L = log z is in the queries' exponents of the exact maps alone.
      const A* S = static_cast<const A*>(p_.state) + head * M_ * E_;
      for (int64_t m = 0; m < M_; ++m) {
        A sum = 0;
        for (int64_t e = 0; e < E_; ++e) sum += dS[m * E_ + e] * S[m * E_ + e];
        dz[m] -= sum;
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
    A* steepest = scratch_.take(Mp_);  // kEluExact: φ' of a key above 0, over z
    const int64_t Mp = Mp_;
    const V constant = splat<A>(features_.constant());
    const bool need_keys = p_.grad_k.data != nullptr, need_values = p_.grad_v.data != nullptr;
    FeatureMap map = p_.feature_map;
    int64_t loaded = -1;
    for (int64_t item = begin; item < end; ++item) {
      const int64_t head = item / p_.key_splits;
      if (head != loaded) {
        load_state(dS, p_.grad_state, head);
        copy(dz, static_cast<const A*>(p_.grad_z) + head * M_, M_);
        if (p_.feature_map == FeatureMap::kFavor)
          fill(shift, M_, static_cast<const A*>(p_.key_max)[head]);
        else
          copy(shift, static_cast<const A*>(p_.key_stat) + head * M_, M_);
        if (p_.feature_map == FeatureMap::kEluExact) map = elu_scales(steepest, shift, dS, dz);
        if (need_keys) transpose(dSt, dS);
        loaded = head;
      }
      for (const auto [n, rows] : Tiles(p_.keys, p_.key_splits, item % p_.key_splits)) {
        features_.load(phi, rows_of<T>(p_, p_.k, head, n), rows);
        features_.key_exponents(phi, rows);
        features_.keys(phi, map == FeatureMap::kElu ? nullptr : shift, rows);
        if (need_keys) {
          int64_t ld;
          const A* y = value_tile(values, &ld, p_.v, head, n, rows);
          product<A>(G, Mp_, y, ld, 1, dSt, Mp_, round_up(rows), Mp_, E_, false);
        }
        for (int64_t r = 0; r < rows; ++r)
          for (int64_t d = 0; d < Mp; d += W) {
            const int64_t i = r * Mp + d;
            const V e = load<A>(phi + i);
            if (need_keys) {
              const V limit = load<A>(steepest + d);
              const V feature_grad = map != FeatureMap::kEluExact ? Features<A>::derivative(map, e)
                                     : limit < e                  ? limit
                                                                  : e;
              store<A>(G + i, (load<A>(G + i) + load<A>(dz + d)) * feature_grad);
            }
            store<A>(phi + i, e + constant);
          }
        if (need_values) {
          apply_mask(phi, head, n, rows);
          product<A>(gradient, Ep_, phi, Mp_, 1, dS, Ep_, round_up(rows), Ep_, M_, false);
          unpack(rows_of<T>(p_, p_.grad_v, head, n), gradient, Ep_, rows, E_);
        }
        if (need_keys) {
          apply_mask(G, head, n, rows);
          features_.store_gradient(rows_of<T>(p_, p_.grad_k, head, n), G, rows, true);
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
      for (const auto [n, rows] : Tiles(p_.queries, p_.query_splits, item % p_.query_splits)) {
        features_.load(phi, rows_of<T>(p_, p_.q, head, n), rows);
        if (p_.eps == 0) features_.subtract_half_norm(phi, rows);
        for (int64_t r = 0; r < rows; ++r) max = row_max(phi + r * Mp_, max);
      }
      static_cast<A*>(p_.partial)[item] = max;
    }
  }
  void features_forward(int64_t begin, int64_t end) {
    features(begin, end, [&](A* phi, A*, int64_t head, int64_t n, int64_t rows) {
      add_constant(phi, rows);
      unpack(rows_of<T>(p_, p_.out, head, n), phi, Mp_, rows, M_, feature_scale());
    });
  }
  void features_backward(int64_t begin, int64_t end) {
    features(begin, end, [&](A* phi, A* G, int64_t head, int64_t n, int64_t rows) {
      pack(G, Mp_, rows_of<T>(p_, p_.grad_out, head, n), rows, M_, feature_scale());
      for (int64_t i = 0; i < rows * Mp_; i += W)
        store<A>(G + i, load<A>(G + i) * Features<A>::derivative(p_.feature_map, load<A>(phi + i)));
      features_.store_gradient(rows_of<T>(p_, p_.grad_q, head, n), G, rows, true);
    });
  }

 private:
  static void copy(A* dst, const A* src, int64_t n) {
    if (n > 0) std::memcpy(dst, src, n * sizeof(A));
  }
  static A inverse(A den) { return den == 0 ? A(1) : A(1) / den; }
  A feature_scale() const { return p_.feature_map == FeatureMap::kFavorRelu ? A(1) : A(1 / std::sqrt(double(M_))); }

  // f(partial state, whether it is the head's first) for those that there are; returns whether the last is among them.
  template <class F>
  bool for_partials(int64_t head, int64_t splits, int64_t size, F&& f) const {
    const int64_t first = head * splits, last = first + splits;
    for (int64_t item = first > p_.first ? first : p_.first; item < least(last, p_.last); ++item)
      f(static_cast<const A*>(p_.partial) + (item - p_.first) * size, item == first);
    return last <= p_.last;
  }
  A seen_rows(int64_t head, int64_t n, int64_t rows) const {
    const bool* const seen = mask(head, n);
    if (seen == nullptr) return A(rows);
    A count = 0;
    for (int64_t r = 0; r < rows; ++r) count += !is_hidden(seen, r);
    return count;
  }
  void add_constant(A* phi, int64_t rows) const {
    const V c = splat<A>(features_.constant());
    for (int64_t i = 0; i < rows * Mp_; i += W) store<A>(phi + i, load<A>(phi + i) + c);
  }
  // NaN, if there is one.
  A row_max(const A* row, A max) const {
    for (int64_t m = 0; m < M_; ++m) max = row[m] > max || row[m] != row[m] ? row[m] : max;
    return max;
  }

  // A tile of values: where they lie when they can be read as they are, else packed into `buffer`; with `masked` zeros
  // for hidden keys, because 0 · NaN would be seen.
  const A* value_tile(A* buffer, int64_t* ld, const View& v, int64_t head, int64_t n, int64_t rows,
                      bool masked = false) const {
    const auto src = rows_of<T>(p_, v, head, n);
    const bool* const seen = masked ? mask(head, n) : nullptr;
    if constexpr (__is_same(T, A)) {
      if (seen == nullptr && src.col_stride == 1 && E_ == Ep_ && rows % kRows == 0) {
        *ld = src.row_stride;
        return src.data;
      }
    }
    pack(buffer, Ep_, src, rows, E_);
    for (int64_t r = 0; seen != nullptr && r < rows; ++r)
      if (is_hidden(seen, r)) fill(buffer + r * Ep_, Ep_);
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
  // S and z, rescaled, or for the exact maps log z; in `weight` elu's z over the largest.
  void load_head(A* S, A* z, A* weight, int64_t head) {
    load_state(S, p_.state, head);
    unit_ = 1;
    const A* from = static_cast<const A*>(p_.key_stat) + head * M_;
    if (p_.feature_map == FeatureMap::kSoftmax) return;
    // A head without visible keys has no bias. With elu, a single feature can have no key above −∞.
    const A none = p_.feature_map == FeatureMap::kEluExact ? -A(INFINITY) : A(0);
    for (int64_t m = 0; m < M_; ++m) z[m] = features_.normalized() && from[m] == A(INFINITY) ? none : from[m];
    if (!features_.normalized()) {
      rescale(S, z);
      if (p_.feature_map == FeatureMap::kRelu) eps_ = A(p_.eps * unit_);
    }
    if (p_.feature_map != FeatureMap::kEluExact) return;
    A top = -A(INFINITY);
    for (int64_t m = 0; m < M_; ++m) top = z[m] > top ? z[m] : top;
    for (int64_t m = 0; m < M_; ++m) weight[m] = std::exp(z[m] - (top > -A(INFINITY) ? top : A(0)));
  }
  // A tile of φ(q), or normalized of φ(q) z / Σ φ(q) z. Returns whether elu's gradient is in `feature_grad`; otherwise
  // it follows from the factors.
  bool load_queries(A* phi, int64_t head, int64_t n, int64_t rows, const A* z, const A* weight, A* factors = nullptr,
                    A* feature_grad = nullptr) {
    const bool elu = p_.feature_map == FeatureMap::kEluExact;
    features_.load(phi, rows_of<T>(p_, p_.q, head, n), rows);
    if (!elu) features_.queries(phi, bias(z), rows);
    if (!elu || features_.elu_queries(phi, weight, rows, factors)) return false;
    features_.load(phi, rows_of<T>(p_, p_.q, head, n), rows);
    features_.elu_queries_by_exponents(phi, z, rows, feature_grad);
    return true;
  }
  // kElu where 1/z is so moderate that dS and dz take it, and keys are plain φ; else kEluExact, and 1/z in `steepest`.
  FeatureMap elu_scales(A* steepest, const A* log_z, A* dS, A* dz) const {
    bool moderate = true;
    for (int64_t m = 0; m < M_; ++m) {
      moderate = moderate && log_z[m] > A(-60);
      steepest[m] = std::exp(-log_z[m]);
    }
    if (!moderate) return FeatureMap::kEluExact;
    for (int64_t m = 0; m < M_; ++m) {
      dz[m] *= steepest[m];
      scale_row(dS + m * Ep_, Ep_, steepest[m]);
    }
    return FeatureMap::kElu;
  }
  const A* bias(const A* statistic) const { return p_.feature_map == FeatureMap::kFavorExact ? statistic : nullptr; }

  // The result does not depend on a common factor of S, z and eps. A power of two that makes the largest z at least
  // 2^digits keeps φ(q)·z out of the subnormal numbers whatever q is.
  void rescale(A* S, A* z) {
    A top = 0;
    for (int64_t m = 0; m < M_; ++m) top = z[m] > top ? z[m] : top;
    using Limits = std::numeric_limits<A>;
    if (!(top > 0 && top <= Limits::max())) return;
    int exponent = Limits::digits - std::ilogb(top);
    // An eps that outweighs φ(q)·z is kept near 1.
    if (p_.feature_map == FeatureMap::kRelu && p_.eps > 0 && -std::ilogb(p_.eps) < exponent)
      exponent = -std::ilogb(p_.eps);
    unit_ = std::ldexp(A(1), exponent < Limits::max_exponent ? exponent : Limits::max_exponent - 1);
    scale_row(S, Mp_ * Ep_, unit_);
    scale_row(z, Mp_, unit_);
  }

  // Of the keys from n on; null if all are seen.
  const bool* mask(int64_t head, int64_t n) const {
    if (p_.key_mask == nullptr) return nullptr;
    return p_.key_mask + head / p_.heads * p_.mask_stride[0] + n * p_.mask_stride[1];
  }
  bool is_hidden(const bool* mask, int64_t r) const { return mask != nullptr && !mask[r * p_.mask_stride[1]]; }
  // Zeroes the rows of hidden keys.
  void apply_mask(A* tile, int64_t head, int64_t n, int64_t rows) {
    const bool* const seen = mask(head, n);
    for (int64_t r = 0; seen != nullptr && r < rows; ++r)
      if (is_hidden(seen, r)) {
        fill(tile + r * Mp_, Mp_);
        features_.apply_mask(r);
      }
  }

  // Raises the running maxima to this tile's and rescales z and S by exp(old − new): exact in one pass. FAVOR+ has one
  // maximum for all features.
  void raise_max(const A* x, A* max, A* z, A* S, int64_t head, int64_t n, int64_t rows) const {
    const bool* const seen = mask(head, n);
    if (p_.feature_map == FeatureMap::kFavor) {
      V top = splat<A>(-A(INFINITY));
      const int64_t whole = M_ / W * W;
      A rest = max[0];
      for (int64_t r = 0; r < rows; ++r) {
        if (is_hidden(seen, r)) continue;
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
    const bool elu = p_.feature_map == FeatureMap::kEluExact;
    for (int64_t m = 0; m < Mp_; m += W) {
      const V old = load<A>(max + m);
      if (elu && reduce_max<A>(-old) <= 0) continue;  // elu's exponents are at most 0
      V top = old;
      for (int64_t r = 0; r < rows; ++r)
        if (!is_hidden(seen, r)) top = vmax<A>(top, load<A>(x + r * Mp_ + m));
      if (elu) top = top > 0 ? V{} : top;
      store<A>(max + m, top);
      const V factor = old == top ? splat<A>(1) : exp(old - top);
      store<A>(z + m, load<A>(z + m) * factor);
      for (int i = 0; i < W; ++i)
        if (factor[i] != 1) scale_row(S + (m + i) * Ep_, Ep_, factor[i]);
    }
  }

  // Elu's keys need no shift: every feature has had one above 0.
  bool all_zero(const A* max) const {
    if (p_.feature_map != FeatureMap::kEluExact) return false;
    for (int64_t m = 0; m < M_; ++m)
      if (max[m] != 0) return false;
    return true;
  }

  // The last of a head's partial states is in.
  void finish(A* S, A* z, const A* max, const A* sum, int64_t head) const {
    const A c = features_.constant(), count = sum[E_];
    for (int64_t m = 0; m < M_; ++m) {
      if (features_.normalized()) {
        // Without visible keys, exp(k − ∞) = 0 makes every φ(k) of the backward pass 0. A softmax of only −∞ is NaN.
        const A total = z[m], none = p_.feature_map == FeatureMap::kSoftmax && count > 0 ? A(NAN) : A(0);
        z[m] = total == 0 ? none + A(INFINITY) : max[m] + std::log(total);
        for (int64_t e = 0; e < E_; ++e) S[m * E_ + e] = total == 0 ? none : S[m * E_ + e] / total;
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
      for (const auto [n, rows] : Tiles(p_.queries, p_.query_splits, item % p_.query_splits)) {
        features_.load(phi, rows_of<T>(p_, p_.q, head, n), rows);
        if (p_.key_max != nullptr)
          features_.keys(phi, shift, rows);
        else
          features_.queries(phi, nullptr, rows);
        f(phi, G, head, n, rows);
      }
    }
  }

  const LinearAttentionWork& p_;
  const int64_t M_, E_, Mp_, Ep_;
  Scratch<A> scratch_;
  Features<A> features_;
  A unit_ = 1;  // what rescale() has multiplied S and z by
  A eps_ = 0;   // of relu's denominator, by unit_
};

}  // namespace cxv::CXV_ISA
