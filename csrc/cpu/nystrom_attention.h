// Nyström attention's passes, for one instruction set. The derivation is in
// cxv_kernels/ops/nystrom_attention/README.md; names follow it.
#pragma once

#include "simd/tile.h"

namespace cxv::CXV_ISA {

template <class T>
class NystromMeansPass {
  using A = Accumulate<T>;

 public:
  explicit NystromMeansPass(const NystromParams& p)
      : p_(p), D_(p.dim), Dp_(padded<A>(p.dim)), scratch_((kTile + 1) * Dp_) {}

  void means(int64_t begin, int64_t end) {
    A* tile = scratch_.take(kTile * Dp_);
    A* mean = scratch_.take(Dp_);
    for (int64_t item = begin; item < end; ++item) {
      const Segment s(p_, item);
      fill(mean, Dp_);
      for (const auto [n, rows] : Tiles(s.size)) {
        pack(tile, Dp_, rows_of<T>(p_, p_.x, s.head, s.first + n), rows, D_);
        add_rows(mean, tile, Dp_, rows, Dp_);
      }
      for (int64_t d = 0; d < D_; ++d) s.mean(0, d) = mean[d] / A(s.size);
    }
  }

  void means_backward(int64_t begin, int64_t end) {
    A* share = scratch_.take(Dp_);
    for (int64_t item = begin; item < end; ++item) {
      const Segment s(p_, item);
      for (int64_t d = 0; d < D_; ++d) share[d] = s.mean(0, d) / A(s.size);
      unpack(rows_of<T>(p_, p_.x, s.head, s.first), share, 0, s.size, D_);
    }
  }

 private:
  // The tokens of one landmark: the first `tokens mod landmarks` have one more.
  struct Segment {
    int64_t head, size, first;
    Matrix<A> mean;
    Segment(const NystromParams& p, int64_t item) : head(item / p.landmarks), size(p.tokens / p.landmarks) {
      const int64_t i = item % p.landmarks, longer = p.tokens % p.landmarks;
      first = i * size + least(i, longer);
      size += i < longer;
      mean = rows_of<A>(p, p.means, head, i);
    }
  };

  const NystromParams& p_;
  const int64_t D_, Dp_;
  Scratch<A> scratch_;
};

// Each of the first `rows` rows of a (… × ld) becomes its softmax over the first `cols` columns, zeros beyond.
template <class A>
void softmax_rows(A* a, int64_t ld, int64_t rows, int64_t cols) {
  using V = Vec<A>;
  constexpr int W = kWidth<A>;
  for (A* row = a; row < a + rows * ld; row += ld) {
    fill(row + cols, ld - cols, -A(INFINITY));
    V top = load<A>(row);
    for (int64_t j = W; j < ld; j += W) top = vmax<A>(top, load<A>(row + j));
    const V max = splat<A>(reduce_max<A>(top));
    V sum{};
    for (int64_t j = 0; j < ld; j += W) {
      const V x = exp(load<A>(row + j) - max);
      store<A>(row + j, x);
      sum += x;
    }
    scale_row(row, ld, A(1) / reduce_add<A>(sum));
    fill(row + cols, ld - cols);  // a NaN would reach the next head
  }
}

// The gradient of `rows` softmaxes (… × ld) becomes that of their logits.
template <class A>
void softmax_rows_backward(A* grad, const A* softmax, int64_t ld, int64_t rows) {
  constexpr int W = kWidth<A>;
  for (int64_t r = 0; r < rows; ++r, grad += ld, softmax += ld) {
    const Vec<A> shift = splat<A>(dot(softmax, grad, ld));
    for (int64_t j = 0; j < ld; j += W) store<A>(grad + j, load<A>(softmax + j) * (load<A>(grad + j) - shift));
  }
}

// Tokens are the rows of every tile, landmarks the columns of its logits.
template <class T>
class NystromTokensPass {
  using A = Accumulate<T>;
  using V = Vec<A>;
  static constexpr int W = kWidth<A>;

 public:
  explicit NystromTokensPass(const NystromParams& p)
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
        pack(x, Ep_, rows_of<T>(p_, p_.landmark_values, head), m_, E_);
      }
      const int64_t n = item % p_.tiles * kTile, rows = least(p_.tokens - n, kTile);
      logits(head, n, rows);
      softmax_rows(weights_, mp_, rows, m_);
      product<A>(values_, Ep_, weights_, mp_, 1, x, Ep_, round_up(rows), Ep_, m_, false);
      unpack(rows_of<T>(p_, p_.token_values, head, n), values_, Ep_, rows, E_);
    }
  }

  void readout_backward(int64_t begin, int64_t end) {
    A* x_t = scratch_.take(Ep_ * mp_);
    A* dx = scratch_.take(mp_ * Ep_);
    Gradient g(*this);
    const bool need_mixed = p_.grad_landmark_values.data != nullptr;
    for (int64_t head = begin; head < end; ++head) {
      load_means(head);
      pack(x_t, mp_, rows_of<T>(p_, p_.landmark_values, head).transposed(), E_, m_);
      fill(dx, mp_ * Ep_);
      g.start();
      for (const auto [n, rows] : Tiles(p_.tokens)) {
        logits(head, n, rows);
        softmax_rows(weights_, mp_, rows, m_);
        pack(values_, Ep_, rows_of<T>(p_, p_.grad_token_values, head, n), rows, E_);
        if (need_mixed) product<A>(dx, Ep_, weights_, 1, mp_, values_, Ep_, landmark_rows_, Ep_, rows, true);
        if (!g.needed) continue;
        product<A>(g.tile, mp_, values_, Ep_, 1, x_t, mp_, round_up(rows), mp_, E_, false);
        softmax_rows_backward(g.tile, weights_, mp_, rows);
        g.add(head, n, rows);
      }
      g.finish(head);
      if (need_mixed) unpack(rows_of<T>(p_, p_.grad_landmark_values, head), dx, Ep_, m_, E_);
    }
  }

  void summary(int64_t begin, int64_t end) {
    A* y = scratch_.take(mp_ * Ep_);
    A* top = scratch_.take(mp_);
    A* sum = scratch_.take(mp_);
    A* factor = scratch_.take(mp_);
    for (int64_t head = begin; head < end; ++head) {
      load_means(head);
      fill(y, mp_ * Ep_);
      fill(top, mp_, -A(INFINITY));
      fill(sum, mp_);
      for (const auto [n, rows] : Tiles(p_.tokens)) {
        logits(head, n, rows);
        for (int64_t j = 0; j < mp_; j += W) {
          const V before = load<A>(top + j);
          V max = before;
          for (int64_t r = 0; r < rows; ++r) max = vmax<A>(max, load<A>(weights_ + r * mp_ + j));
          const V shrink = exp(before - max);
          V total = load<A>(sum + j) * shrink;
          for (int64_t r = 0; r < rows; ++r) {
            const V weight = exp(load<A>(weights_ + r * mp_ + j) - max);
            store<A>(weights_ + r * mp_ + j, weight);
            total += weight;
          }
          store<A>(top + j, max);
          store<A>(sum + j, total);
          store<A>(factor + j, shrink);
        }
        scale_rows(y, factor);
        pack(values_, Ep_, rows_of<T>(p_, p_.token_values, head, n), rows, E_);
        product<A>(y, Ep_, weights_, 1, mp_, values_, Ep_, landmark_rows_, Ep_, rows, true);
      }
      A* log_sums = static_cast<A*>(p_.log_sums) + head * m_;
      for (int64_t i = 0; i < m_; ++i) log_sums[i] = top[i] + std::log(sum[i]), factor[i] = A(1) / sum[i];
      scale_rows(y, factor);
      unpack(rows_of<T>(p_, p_.landmark_values, head), y, Ep_, m_, E_);
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
      pack(y, Ep_, rows_of<T>(p_, p_.landmark_values, head), m_, E_);
      pack(dy, Ep_, rows_of<T>(p_, p_.grad_landmark_values, head), m_, E_);
      pack(dy_t, mp_, rows_of<T>(p_, p_.grad_landmark_values, head).transposed(), E_, m_);
      for (int64_t i = 0; i < m_; ++i) {
        shift[i] = dot(y + i * Ep_, dy + i * Ep_, Ep_);
        log_sums[i] = static_cast<const A*>(p_.log_sums)[head * m_ + i];
      }
      g.start();
      for (const auto [n, rows] : Tiles(p_.tokens)) {
        logits(head, n, rows);
        if (g.needed) {
          pack(values_, Ep_, rows_of<T>(p_, p_.token_values, head, n), rows, E_);
          product<A>(g.tile, mp_, values_, Ep_, 1, dy_t, mp_, round_up(rows), mp_, E_, false);
        }
        for (int64_t r = 0; r < rows; ++r)
          for (int64_t j = 0; j < mp_; j += W) {
            const V weight = exp(load<A>(weights_ + r * mp_ + j) - load<A>(log_sums + j));
            A* d = g.tile + r * mp_ + j;
            store<A>(weights_ + r * mp_ + j, weight);
            if (g.needed) store<A>(d, weight * (load<A>(d) - load<A>(shift + j)));
          }
        if (p_.grad_token_values.data != nullptr) {
          product<A>(dv, Ep_, weights_, mp_, 1, dy, Ep_, round_up(rows), Ep_, m_, false);
          unpack(rows_of<T>(p_, p_.grad_token_values, head, n), dv, Ep_, rows, E_);
        }
        g.add(head, n, rows);
      }
      g.finish(head);
    }
  }

 private:
  // From the gradient of a tile's logits to those of its tokens, and of the landmarks over all tiles.
  struct Gradient {
    NystromTokensPass& pass;
    const bool need_tokens = pass.p_.grad_x.data != nullptr, need_means = pass.p_.grad_means.data != nullptr;
    const bool needed = need_tokens || need_means;
    const int64_t mp = pass.mp_, Dp = pass.Dp_;
    A* tile = pass.scratch_.take(kTile * mp);
    A* dx = pass.scratch_.take(kTile * Dp);
    A* dmeans = pass.scratch_.take(mp * Dp);

    explicit Gradient(NystromTokensPass& pass) : pass(pass) {}
    void start() { fill(dmeans, mp * Dp); }
    void add(int64_t head, int64_t n, int64_t rows) {
      if (need_tokens) {
        product<A>(dx, Dp, tile, mp, 1, pass.means_, Dp, round_up(rows), Dp, pass.m_, false);
        unpack(rows_of<T>(pass.p_, pass.p_.grad_x, head, n), dx, Dp, rows, pass.D_);
      }
      if (need_means) product<A>(dmeans, Dp, tile, 1, mp, pass.x_, Dp, pass.landmark_rows_, Dp, rows, true);
    }
    void finish(int64_t head) {
      if (need_means) unpack(rows_of<A>(pass.p_, pass.p_.grad_means, head), dmeans, Dp, pass.m_, pass.D_, pass.scale_);
    }
  };

  void load_means(int64_t head) {
    const auto means = rows_of<A>(p_, p_.means, head);
    pack(means_, Dp_, means, m_, D_, scale_);
    pack(means_t_, mp_, means.transposed(), D_, m_, scale_);
  }
  void logits(int64_t head, int64_t n, int64_t rows) {
    pack(x_, Dp_, rows_of<T>(p_, p_.x, head, n), rows, D_);
    product<A>(weights_, mp_, x_, Dp_, 1, means_t_, mp_, round_up(rows), mp_, D_, false);
  }
  void scale_rows(A* y, const A* factor) const {
    for (int64_t i = 0; i < m_; ++i) scale_row(y + i * Ep_, Ep_, factor[i]);
  }

  const NystromParams& p_;
  const int64_t m_, D_, E_, mp_, Dp_, Ep_, landmark_rows_;
  const A scale_;
  Scratch<A> scratch_;
  A *x_, *values_, *weights_, *means_, *means_t_;
};

template <class T>
class NystromMixPass {
  using A = Accumulate<T>;
  using V = Vec<A>;
  static constexpr int W = kWidth<A>;
  static constexpr int kIterations = 6;

 public:
  explicit NystromMixPass(const NystromParams& p)
      : p_(p),
        m_(p.landmarks),
        D_(p.dim),
        E_(p.value_dim),
        mp_(padded<A>(p.landmarks)),
        Dp_(padded<A>(p.dim)),
        Ep_(padded<A>(p.value_dim)),
        rows_(round_up(p.landmarks)),
        scale_(A(1 / std::sqrt(double(p.dim)))),
        scratch_((p.mix_backward ? 4 * kIterations + 7 : 6) * mp_ * mp_ + 5 * mp_ * (Dp_ + Ep_) + mp_) {
    q_ = scratch_.take(mp_ * Dp_);
    kt_ = scratch_.take(Dp_ * mp_);
    y_ = scratch_.take(mp_ * Ep_);
    x_ = scratch_.take(mp_ * Ep_);
    sums_ = scratch_.take(mp_);
    a_ = matrix();
    // The backward pass keeps the matrices of all iterations.
    for (int i = 0; i <= kIterations; ++i) z_[i] = p.mix_backward || i < 2 ? matrix() : z_[i - 2];
    for (int i = 0; i < kIterations; ++i)
      for (auto* of : {w_, u_, t_}) of[i] = p.mix_backward || i == 0 ? matrix() : of[0];
  }

  void mix(int64_t begin, int64_t end) {
    for (int64_t head = begin; head < end; ++head) {
      invert(head);
      pack(y_, Ep_, rows_of<T>(p_, p_.landmark_values, head), m_, E_);
      product<A>(x_, Ep_, z_[kIterations], mp_, 1, y_, Ep_, rows_, Ep_, m_, false);
      unpack(rows_of<T>(p_, p_.mixed, head), x_, Ep_, m_, E_);
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
    const bool need_q = p_.grad_means.data != nullptr, need_k = p_.grad_k_means.data != nullptr;
    for (int64_t head = begin; head < end; ++head) {
      const A top = invert(head);
      const auto gradient = rows_of<T>(p_, p_.grad_mixed, head);
      if (p_.grad_landmark_values.data != nullptr) {
        pack(dx, Ep_, gradient, m_, E_);
        product<A>(x_, Ep_, z_[kIterations], 1, mp_, dx, Ep_, rows_, Ep_, m_, false);
        unpack(rows_of<T>(p_, p_.grad_landmark_values, head), x_, Ep_, m_, E_);
      }
      if (!need_q && !need_k) continue;
      pack(y_, Ep_, rows_of<T>(p_, p_.landmark_values, head), m_, E_);
      pack(dxt, mp_, gradient.transposed(), E_, m_);
      product<A>(dz, mp_, y_, Ep_, 1, dxt, mp_, rows_, mp_, E_, false);
      fill(da, rows_ * mp_);
      for (int i = kIterations - 1; i >= 0; --i) {
        times(r, dz, z_[i]);  // dTᵀ; R = −¼ dTᵀ is the gradient of WU
        each(r, [&](A* p) { store<A>(p, load<A>(p) * A(-0.25)); });
        times(dw, u_[i], r);
        times(s, r, w_[i]);  // the gradient of U, minus that of W(7 − W)
        times(dw, w_[i], s, true);
        times(dw, s, w_[i], true);
        each(dw, [&](A* p) { store<A>(p, load<A>(p) - load<A>(s + (p - dw)) * A(7)); });
        times(r, t_[i], dz);
        times(r, dw, a_, true);
        times(da, z_[i], dw, true);
        std::swap(r, dz);
      }
      // Z₀ = Aᵀ / the largest column sum; columns that tie share its gradient.
      int64_t ties = 0;
      for (int64_t j = 0; j < m_; ++j) ties += sums_[j] == top;
      const A inverse = A(1) / top, dsum = -dot(dz, a_, m_ * mp_) * inverse * inverse / A(ties > 0 ? ties : 1);
      for (int64_t i = 0; i < m_; ++i) {
        for (int64_t j = 0; j < m_; ++j)
          s[i * mp_ + j] = da[j * mp_ + i] + dz[i * mp_ + j] * inverse + (sums_[j] == top ? dsum : A(0));
        fill(s + i * mp_ + m_, mp_ - m_);
      }
      softmax_rows_backward(s, a_, mp_, m_);
      fill(s + m_ * mp_, (rows_ - m_) * mp_);
      if (need_q) {
        pack(k, Dp_, rows_of<A>(p_, p_.k_means, head), m_, D_, scale_);
        product<A>(dqk, Dp_, s, mp_, 1, k, Dp_, rows_, Dp_, m_, false);
        unpack(rows_of<A>(p_, p_.grad_means, head), dqk, Dp_, m_, D_);
      }
      if (need_k) {
        product<A>(dqk, Dp_, s, 1, mp_, q_, Dp_, rows_, Dp_, m_, false);
        unpack(rows_of<A>(p_, p_.grad_k_means, head), dqk, Dp_, m_, D_);
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
    pack(q_, Dp_, rows_of<A>(p_, p_.means, head), m_, D_, scale_);
    pack(kt_, mp_, rows_of<A>(p_, p_.k_means, head).transposed(), D_, m_);
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

  const NystromParams& p_;
  const int64_t m_, D_, E_, mp_, Dp_, Ep_, rows_;
  const A scale_;
  Scratch<A> scratch_;
  A *q_, *kt_, *y_, *x_, *sums_, *a_;
  A *z_[kIterations + 1], *w_[kIterations], *u_[kIterations], *t_[kIterations];
};

}  // namespace cxv::CXV_ISA
