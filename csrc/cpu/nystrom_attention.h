// Nyström attention's passes, for one instruction set. The derivation is in
// cxv_kernels/ops/nystrom_attention/README.md; names follow it.
#pragma once

#include "../core/nystrom_attention.h"
#include "simd/tile.h"
#include "simd/worker.h"

namespace cxv {
namespace CXV_ISA {

template <class T>
class NystromMeansPass {
  using A = typename Accumulate<T>::type;
  static constexpr int W = kWidth<A>;

 public:
  explicit NystromMeansPass(const NystromMeansParams& p)
      : p_(p), D_(p.dim), Dp_(padded<A>(p.dim)), scratch_((kTile + 1) * Dp_) {}

  void means(int64_t begin, int64_t end) {
    A* tile = scratch_.take(kTile * Dp_);
    A* mean = scratch_.take(Dp_);
    for (int64_t item = begin; item < end; ++item) {
      const Segment s(p_, item);
      for (int64_t d = 0; d < Dp_; ++d) mean[d] = 0;
      for (int64_t n = 0; n < s.size; n += kTile) {
        const int64_t rows = s.size - n < kTile ? s.size - n : kTile;
        pack(tile, Dp_, s.tokens + n * p_.x.stride[2], p_.x.stride[2], p_.x.stride[3], rows, D_);
        for (int64_t d = 0; d < Dp_; d += W) {
          Vec<A> sum = load<A>(mean + d);
          for (int64_t r = 0; r < rows; ++r) sum += load<A>(tile + r * Dp_ + d);
          store<A>(mean + d, sum);
        }
      }
      for (int64_t d = 0; d < D_; ++d) s.mean[d * p_.means.stride[3]] = mean[d] / A(s.size);
    }
  }

  void spread(int64_t begin, int64_t end) {
    A* share = scratch_.take(Dp_);
    for (int64_t item = begin; item < end; ++item) {
      const Segment s(p_, item);
      for (int64_t d = 0; d < D_; ++d) share[d] = s.mean[d * p_.means.stride[3]] / A(s.size);
      unpack(s.tokens, p_.x.stride[2], p_.x.stride[3], share, 0, s.size, D_);
    }
  }

 private:
  // The tokens of one landmark: the first `tokens mod landmarks` have one more.
  struct Segment {
    T* tokens;
    A* mean;
    int64_t size;
    Segment(const NystromMeansParams& p, int64_t item) {
      const int64_t head = item / p.landmarks, i = item % p.landmarks, longer = p.tokens % p.landmarks;
      size = p.tokens / p.landmarks;
      const int64_t first = i * size + (i < longer ? i : longer);
      size += i < longer;
      tokens = at<T>(p.x, head / p.heads, head % p.heads, first);
      mean = at<A>(p.means, head / p.heads, head % p.heads, i);
    }
  };

  const NystromMeansParams& p_;
  const int64_t D_, Dp_;
  Scratch<A> scratch_;
};

// Each of the first `rows` rows of a (… × ld) becomes its softmax over the first `cols` columns, zeros beyond.
template <class A>
void softmax_rows(A* a, int64_t ld, int64_t rows, int64_t cols) {
  using V = Vec<A>;
  constexpr int W = kWidth<A>;
  for (A* row = a; row < a + rows * ld; row += ld) {
    for (int64_t j = cols; j < ld; ++j) row[j] = -A(INFINITY);
    V top = load<A>(row);
    for (int64_t j = W; j < ld; j += W) top = vmax<A>(top, load<A>(row + j));
    const V max = splat<A>(reduce_max<A>(top));
    V sum{};
    for (int64_t j = 0; j < ld; j += W) {
      const V x = exp(load<A>(row + j) - max);
      store<A>(row + j, x);
      sum += x;
    }
    const V factor = splat<A>(A(1) / reduce_add<A>(sum));
    for (int64_t j = 0; j < ld; j += W) store<A>(row + j, load<A>(row + j) * factor);
    for (int64_t j = cols; j < ld; ++j) row[j] = 0;  // a NaN would reach the next head
  }
}

// Tokens are the rows of every tile, landmarks the columns of its logits.
template <class T>
class NystromTokensPass {
  using A = typename Accumulate<T>::type;
  using V = Vec<A>;
  static constexpr int W = kWidth<A>;

 public:
  explicit NystromTokensPass(const NystromTokensParams& p)
      : p_(p),
        m_(p.landmarks),
        D_(p.dim),
        E_(p.value_dim),
        mp_(padded<A>(p.landmarks)),
        Dp_(padded<A>(p.dim)),
        Ep_(padded<A>(p.value_dim)),
        landmark_rows_(round_up(p.landmarks)),
        scale_(A(1 / std::sqrt(double(p.dim)))),
        scratch_(kTile * (2 * Dp_ + 2 * Ep_ + 2 * mp_) + mp_ * (3 * Dp_ + 4 * Ep_ + 4)) {
    x_ = scratch_.take(kTile * Dp_);
    values_ = scratch_.take(kTile * Ep_);
    weights_ = scratch_.take(kTile * mp_);
    means_ = scratch_.take(mp_ * Dp_);
    means_t_ = scratch_.take(Dp_ * mp_);
  }

  void readout(int64_t begin, int64_t end) {
    A* x = scratch_.take(mp_ * Ep_);
    for (int64_t item = begin, head = -1; item < end; ++item) {
      if (item / p_.tiles != head) {
        head = item / p_.tiles;
        load_means(head);
        load_landmarks(x, p_.landmark_values, head);
      }
      const Tile t(p_, head, item % p_.tiles);
      logits(t);
      softmax_rows(weights_, mp_, t.rows, m_);
      product<A>(values_, Ep_, weights_, mp_, 1, x, Ep_, round_up(t.rows), Ep_, m_, false);
      store_tile(p_.token_values, t, values_, Ep_, E_);
    }
  }

  void readout_backward(int64_t begin, int64_t end) {
    A* x_t = scratch_.take(Ep_ * mp_);
    A* dx = scratch_.take(mp_ * Ep_);
    Gradient g(*this);
    const bool need_mixed = p_.grad_landmark_values.data != nullptr;
    for (int64_t head = begin; head < end; ++head) {
      load_means(head);
      load_landmarks_transposed(x_t, p_.landmark_values, head);
      for (int64_t i = 0; i < mp_ * Ep_; ++i) dx[i] = 0;
      g.start();
      for (int64_t tile = 0; tile < p_.tiles; ++tile) {
        const Tile t(p_, head, tile);
        logits(t);
        softmax_rows(weights_, mp_, t.rows, m_);
        load_tile(values_, Ep_, p_.grad_token_values, t, E_);
        if (need_mixed) product<A>(dx, Ep_, weights_, 1, mp_, values_, Ep_, landmark_rows_, Ep_, t.rows, true);
        if (!g.needed) continue;
        product<A>(g.tile, mp_, values_, Ep_, 1, x_t, mp_, round_up(t.rows), mp_, E_, false);
        for (int64_t r = 0; r < t.rows; ++r) {
          A* row = g.tile + r * mp_;
          const A* weights = weights_ + r * mp_;
          V mean{};
          for (int64_t j = 0; j < mp_; j += W) mean += load<A>(weights + j) * load<A>(row + j);
          const V shift = splat<A>(reduce_add<A>(mean));
          for (int64_t j = 0; j < mp_; j += W) store<A>(row + j, load<A>(weights + j) * (load<A>(row + j) - shift));
        }
        g.add(t);
      }
      g.finish(head);
      if (need_mixed) store_landmarks(p_.grad_landmark_values, head, dx);
    }
  }

  void summary(int64_t begin, int64_t end) {
    A* y = scratch_.take(mp_ * Ep_);
    A* top = scratch_.take(mp_);
    A* sum = scratch_.take(mp_);
    A* factor = scratch_.take(mp_);
    for (int64_t head = begin; head < end; ++head) {
      load_means(head);
      for (int64_t i = 0; i < mp_ * Ep_; ++i) y[i] = 0;
      for (int64_t j = 0; j < mp_; ++j) top[j] = -A(INFINITY), sum[j] = 0;
      for (int64_t tile = 0; tile < p_.tiles; ++tile) {
        const Tile t(p_, head, tile);
        logits(t);
        for (int64_t j = 0; j < mp_; j += W) {
          const V before = load<A>(top + j);
          V max = before;
          for (int64_t r = 0; r < t.rows; ++r) max = vmax<A>(max, load<A>(weights_ + r * mp_ + j));
          const V shrink = exp(before - max);
          V total = load<A>(sum + j) * shrink;
          for (int64_t r = 0; r < t.rows; ++r) {
            const V weight = exp(load<A>(weights_ + r * mp_ + j) - max);
            store<A>(weights_ + r * mp_ + j, weight);
            total += weight;
          }
          store<A>(top + j, max);
          store<A>(sum + j, total);
          store<A>(factor + j, shrink);
        }
        scale_rows(y, factor);
        load_tile(values_, Ep_, p_.token_values, t, E_);
        product<A>(y, Ep_, weights_, 1, mp_, values_, Ep_, landmark_rows_, Ep_, t.rows, true);
      }
      A* log_sums = static_cast<A*>(p_.log_sums) + head * m_;
      for (int64_t i = 0; i < m_; ++i) log_sums[i] = top[i] + std::log(sum[i]), factor[i] = A(1) / sum[i];
      scale_rows(y, factor);
      store_landmarks(p_.landmark_values, head, y);
    }
  }

  void summary_backward(int64_t begin, int64_t end) {
    A* y = scratch_.take(mp_ * Ep_);
    A* dy = scratch_.take(mp_ * Ep_);
    A* dy_t = scratch_.take(Ep_ * mp_);
    A* dv = scratch_.take(kTile * Ep_);
    A* shift = scratch_.take(mp_);
    A* log_sums = scratch_.take(mp_);
    Gradient g(*this);
    for (int64_t head = begin; head < end; ++head) {
      load_means(head);
      load_landmarks(y, p_.landmark_values, head);
      load_landmarks(dy, p_.grad_landmark_values, head);
      load_landmarks_transposed(dy_t, p_.grad_landmark_values, head);
      for (int64_t i = 0; i < m_; ++i) {
        V dot{};
        for (int64_t e = i * Ep_; e < (i + 1) * Ep_; e += W) dot += load<A>(y + e) * load<A>(dy + e);
        shift[i] = reduce_add<A>(dot);
        log_sums[i] = static_cast<const A*>(p_.log_sums)[head * m_ + i];
      }
      g.start();
      for (int64_t tile = 0; tile < p_.tiles; ++tile) {
        const Tile t(p_, head, tile);
        const int64_t rows = round_up(t.rows);
        logits(t);
        if (g.needed) {
          load_tile(values_, Ep_, p_.token_values, t, E_);
          product<A>(g.tile, mp_, values_, Ep_, 1, dy_t, mp_, rows, mp_, E_, false);
        }
        for (int64_t r = 0; r < t.rows; ++r)
          for (int64_t j = 0; j < mp_; j += W) {
            const V weight = exp(load<A>(weights_ + r * mp_ + j) - load<A>(log_sums + j));
            A* d = g.tile + r * mp_ + j;
            store<A>(weights_ + r * mp_ + j, weight);
            if (g.needed) store<A>(d, weight * (load<A>(d) - load<A>(shift + j)));
          }
        if (p_.grad_token_values.data != nullptr) {
          product<A>(dv, Ep_, weights_, mp_, 1, dy, Ep_, rows, Ep_, m_, false);
          store_tile(p_.grad_token_values, t, dv, Ep_, E_);
        }
        g.add(t);
      }
      g.finish(head);
    }
  }

 private:
  struct Tile {
    int64_t head, first, rows;
    Tile(const NystromTokensParams& p, int64_t head, int64_t tile)
        : head(head), first(tile * kTile), rows(p.tokens - first < kTile ? p.tokens - first : kTile) {}
  };

  // From the gradient of a tile's logits to those of its tokens, and of the landmarks over all tiles.
  struct Gradient {
    NystromTokensPass& pass;
    const bool need_tokens, need_means, needed;
    A *tile, *dx, *dmeans;
    explicit Gradient(NystromTokensPass& pass)
        : pass(pass),
          need_tokens(pass.p_.grad_x.data != nullptr),
          need_means(pass.p_.grad_means.data != nullptr),
          needed(need_tokens || need_means) {
      tile = pass.scratch_.take(kTile * pass.mp_);
      dx = pass.scratch_.take(kTile * pass.Dp_);
      dmeans = pass.scratch_.take(pass.mp_ * pass.Dp_);
    }
    void start() {
      for (int64_t i = 0; i < pass.mp_ * pass.Dp_; ++i) dmeans[i] = 0;
    }
    void add(const Tile& t) {
      const int64_t mp = pass.mp_, Dp = pass.Dp_;
      if (need_tokens) {
        product<A>(dx, Dp, tile, mp, 1, pass.means_, Dp, round_up(t.rows), Dp, pass.m_, false);
        pass.store_tile(pass.p_.grad_x, t, dx, Dp, pass.D_);
      }
      if (need_means) product<A>(dmeans, Dp, tile, 1, mp, pass.x_, Dp, pass.landmark_rows_, Dp, t.rows, true);
    }
    void finish(int64_t head) {
      if (!need_means) return;
      const View& view = pass.p_.grad_means;
      unpack(pass.row<A>(view, head, 0), view.stride[2], view.stride[3], dmeans, pass.Dp_, pass.m_, pass.D_,
             pass.scale_);
    }
  };

  template <class U>
  U* row(const View& view, int64_t head, int64_t first) const {
    return at<U>(view, head / p_.heads, head % p_.heads, first);
  }
  void load_means(int64_t head) {
    const View& v = p_.means;
    pack(means_, Dp_, row<A>(v, head, 0), v.stride[2], v.stride[3], m_, D_, scale_);
    pack(means_t_, mp_, row<A>(v, head, 0), v.stride[3], v.stride[2], D_, m_, scale_);
  }
  void load_landmarks(A* dst, const View& v, int64_t head) {
    pack(dst, Ep_, row<T>(v, head, 0), v.stride[2], v.stride[3], m_, E_);
  }
  void load_landmarks_transposed(A* dst, const View& v, int64_t head) {
    pack(dst, mp_, row<T>(v, head, 0), v.stride[3], v.stride[2], E_, m_);
  }
  void store_landmarks(const View& v, int64_t head, const A* src) {
    unpack(row<T>(v, head, 0), v.stride[2], v.stride[3], src, Ep_, m_, E_);
  }
  void load_tile(A* dst, int64_t ld, const View& v, const Tile& t, int64_t cols) {
    pack(dst, ld, row<T>(v, t.head, t.first), v.stride[2], v.stride[3], t.rows, cols);
  }
  void store_tile(const View& v, const Tile& t, const A* src, int64_t ld, int64_t cols) {
    unpack(row<T>(v, t.head, t.first), v.stride[2], v.stride[3], src, ld, t.rows, cols);
  }
  void logits(const Tile& t) {
    load_tile(x_, Dp_, p_.x, t, D_);
    product<A>(weights_, mp_, x_, Dp_, 1, means_t_, mp_, round_up(t.rows), mp_, D_, false);
  }
  void scale_rows(A* y, const A* factor) const {
    for (int64_t i = 0; i < m_; ++i)
      for (int64_t e = i * Ep_; e < (i + 1) * Ep_; e += W) store<A>(y + e, load<A>(y + e) * factor[i]);
  }

  const NystromTokensParams& p_;
  const int64_t m_, D_, E_, mp_, Dp_, Ep_, landmark_rows_;
  const A scale_;
  Scratch<A> scratch_;
  A *x_, *values_, *weights_, *means_, *means_t_;
};

template <class T>
class NystromMixPass {
  using A = typename Accumulate<T>::type;
  using V = Vec<A>;
  static constexpr int W = kWidth<A>;
  static constexpr int kIterations = 6;

 public:
  explicit NystromMixPass(const NystromMixParams& p, bool backward)
      : p_(p),
        m_(p.landmarks),
        D_(p.dim),
        E_(p.value_dim),
        mp_(padded<A>(p.landmarks)),
        Dp_(padded<A>(p.dim)),
        Ep_(padded<A>(p.value_dim)),
        rows_(round_up(p.landmarks)),
        scale_(A(1 / std::sqrt(double(p.dim)))),
        scratch_((backward ? 4 * kIterations + 7 : 6) * mp_ * mp_ + 5 * mp_ * (Dp_ + Ep_) + mp_) {
    q_ = scratch_.take(mp_ * Dp_);
    kt_ = scratch_.take(Dp_ * mp_);
    y_ = scratch_.take(mp_ * Ep_);
    x_ = scratch_.take(mp_ * Ep_);
    sums_ = scratch_.take(mp_);
    a_ = matrix();
    if (backward) {
      for (auto& z : z_) z = matrix();
      for (int i = 0; i < kIterations; ++i) w_[i] = matrix(), u_[i] = matrix(), t_[i] = matrix();
    } else {
      for (int i = 0; i <= kIterations; ++i) z_[i] = i < 2 ? matrix() : z_[i - 2];
      for (int i = 0; i < kIterations; ++i) {
        w_[i] = i == 0 ? matrix() : w_[0];
        u_[i] = i == 0 ? matrix() : u_[0];
        t_[i] = i == 0 ? matrix() : t_[0];
      }
    }
  }

  void mix(int64_t begin, int64_t end) {
    for (int64_t head = begin; head < end; ++head) {
      invert(head);
      load_tile<T>(y_, Ep_, p_.y, head, E_);
      product<A>(x_, Ep_, z_[kIterations], mp_, 1, y_, Ep_, rows_, Ep_, m_, false);
      store_tile<T>(p_.x, head, x_, Ep_, E_);
    }
  }

  // Every gradient of a matrix is kept transposed: then no product reads a transposed right operand.
  void mix_backward(int64_t begin, int64_t end) {
    A* k = scratch_.take(mp_ * Dp_);
    A* dx = scratch_.take(mp_ * Ep_);
    A* dxt = scratch_.take(Ep_ * mp_);
    A* dqk = scratch_.take(mp_ * Dp_);
    A* dz = matrix();  // dZᵀ
    A* da = matrix();  // dAᵀ
    A* r = matrix();
    A* s = matrix();
    A* dw = matrix();
    const bool need_q = p_.grad_q.data != nullptr, need_k = p_.grad_k.data != nullptr;
    for (int64_t head = begin; head < end; ++head) {
      const A top = invert(head);
      if (p_.grad_y.data != nullptr) {
        load_tile<T>(dx, Ep_, p_.grad_x, head, E_);
        product<A>(x_, Ep_, z_[kIterations], 1, mp_, dx, Ep_, rows_, Ep_, m_, false);
        store_tile<T>(p_.grad_y, head, x_, Ep_, E_);
      }
      if (!need_q && !need_k) continue;
      load_tile<T>(y_, Ep_, p_.y, head, E_);
      load_transposed<T>(dxt, p_.grad_x, head, E_);
      product<A>(dz, mp_, y_, Ep_, 1, dxt, mp_, rows_, mp_, E_, false);
      for (int64_t i = 0; i < rows_ * mp_; ++i) da[i] = 0;
      for (int i = kIterations - 1; i >= 0; --i) {
        times(r, dz, z_[i]);  // dTᵀ; R = −¼ dTᵀ is the gradient of WU
        each(r, [&](A* p) { store<A>(p, load<A>(p) * A(-0.25)); });
        times(dw, u_[i], r);
        times(s, r, w_[i]);  // minus the gradient of U, so that of W(7 − W)
        times(dw, w_[i], s, true);
        times(dw, s, w_[i], true);
        each(dw, [&](A* p) { store<A>(p, load<A>(p) - load<A>(s + (p - dw)) * A(7)); });
        times(r, t_[i], dz);
        times(r, dw, a_, true);
        times(da, z_[i], dw, true);
        std::swap(r, dz);
      }
      // Z₀ = Aᵀ / the largest column sum; columns that tie share its gradient.
      V dot{};
      for (int64_t i = 0; i < m_ * mp_; i += W) dot += load<A>(dz + i) * load<A>(a_ + i);
      int64_t ties = 0;
      for (int64_t j = 0; j < m_; ++j) ties += sums_[j] == top;
      const A inverse = A(1) / top, dsum = -reduce_add<A>(dot) * inverse * inverse / A(ties > 0 ? ties : 1);
      for (int64_t i = 0; i < m_; ++i)
        for (int64_t j = 0; j < m_; ++j)
          s[i * mp_ + j] = da[j * mp_ + i] + dz[i * mp_ + j] * inverse + (sums_[j] == top ? dsum : A(0));
      for (int64_t i = 0; i < m_; ++i) {
        A* row = s + i * mp_;
        const A* weights = a_ + i * mp_;
        for (int64_t j = m_; j < mp_; ++j) row[j] = 0;
        V mean{};
        for (int64_t j = 0; j < mp_; j += W) mean += load<A>(weights + j) * load<A>(row + j);
        const V shift = splat<A>(reduce_add<A>(mean));
        for (int64_t j = 0; j < mp_; j += W) store<A>(row + j, load<A>(weights + j) * (load<A>(row + j) - shift));
      }
      for (int64_t i = m_ * mp_; i < rows_ * mp_; ++i) s[i] = 0;
      if (need_q) {
        load_tile<A>(k, Dp_, p_.k, head, D_, scale_);
        product<A>(dqk, Dp_, s, mp_, 1, k, Dp_, rows_, Dp_, m_, false);
        store_tile<A>(p_.grad_q, head, dqk, Dp_, D_);
      }
      if (need_k) {
        product<A>(dqk, Dp_, s, 1, mp_, q_, Dp_, rows_, Dp_, m_, false);
        store_tile<A>(p_.grad_k, head, dqk, Dp_, D_);
      }
    }
  }

 private:
  A* matrix() { return scratch_.take(mp_ * mp_); }

  // c = a b, or += with add.
  void times(A* c, const A* a, const A* b, bool add = false) const {
    product<A>(c, mp_, a, mp_, 1, b, mp_, rows_, mp_, m_, add);
  }
  template <class F>
  void each(A* matrix, F&& f) const {
    for (A* p = matrix; p < matrix + rows_ * mp_; p += W) f(p);
  }
  // c = diagonal·I + factor·b
  void affine(A* c, A diagonal, A factor, const A* b) const {
    each(c, [&](A* p) { store<A>(p, load<A>(b + (p - c)) * splat<A>(factor)); });
    for (int64_t i = 0; i < m_; ++i) c[i * mp_ + i] += diagonal;
  }

  // Computes A and the iterates Z with their intermediate matrices: W = AZ, U = 15 − W(7 − W), T = ¼(13 − WU), Z' = ZT.
  // Returns the largest column sum of A. The largest row sum, the other factor of the scale, is 1 and has no gradient.
  A invert(int64_t head) {
    load_tile<A>(q_, Dp_, p_.q, head, D_, scale_);
    load_transposed<A>(kt_, p_.k, head, D_);
    product<A>(a_, mp_, q_, Dp_, 1, kt_, mp_, rows_, mp_, D_, false);
    softmax_rows(a_, mp_, m_, m_);
    for (int64_t j = 0; j < mp_; j += W) {
      V sum{};
      for (int64_t i = 0; i < m_; ++i) sum += load<A>(a_ + i * mp_ + j);
      store<A>(sums_ + j, sum);
    }
    A top = sums_[0];
    for (int64_t j = 1; j < m_; ++j) top = sums_[j] > top ? sums_[j] : top;
    const A inverse = A(1) / top;
    for (int64_t i = 0; i < rows_; ++i)
      for (int64_t j = 0; j < mp_; ++j) z_[0][i * mp_ + j] = i < m_ && j < m_ ? a_[j * mp_ + i] * inverse : A(0);
    for (int i = 0; i < kIterations; ++i) {
      times(w_[i], a_, z_[i]);
      affine(t_[i], 7, -1, w_[i]);
      times(u_[i], w_[i], t_[i]);
      affine(u_[i], 15, -1, u_[i]);
      times(t_[i], w_[i], u_[i]);
      affine(t_[i], A(3.25), A(-0.25), t_[i]);
      times(z_[i + 1], z_[i], t_[i]);
    }
    return top;
  }

  template <class U>
  void load_tile(A* dst, int64_t ld, const View& view, int64_t head, int64_t cols, A scale = 1) {
    pack(dst, ld, at<U>(view, head / p_.heads, head % p_.heads, 0), view.stride[2], view.stride[3], m_, cols, scale);
  }
  // dst (cols × mp) = the transpose of a (landmarks × cols) tile
  template <class U>
  void load_transposed(A* dst, const View& view, int64_t head, int64_t cols) {
    pack(dst, mp_, at<U>(view, head / p_.heads, head % p_.heads, 0), view.stride[3], view.stride[2], cols, m_);
  }
  template <class U>
  void store_tile(const View& view, int64_t head, const A* src, int64_t ld, int64_t cols) {
    unpack(at<U>(view, head / p_.heads, head % p_.heads, 0), view.stride[2], view.stride[3], src, ld, m_, cols);
  }

  const NystromMixParams& p_;
  const int64_t m_, D_, E_, mp_, Dp_, Ep_, rows_;
  const A scale_;
  Scratch<A> scratch_;
  A *q_, *kt_, *y_, *x_, *sums_, *a_;
  A *z_[kIterations + 1], *w_[kIterations], *u_[kIterations], *t_[kIterations];
};

}  // namespace CXV_ISA
}  // namespace cxv
