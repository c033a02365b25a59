// The order of the passes, their splits and their scratch memory.
#pragma once

#include "backward.cuh"
#include "features.cuh"
#include "key_pass.cuh"
#include "query_pass.cuh"
#include "reduce.cuh"

namespace cxv::cuda {

// The splits depend on N, D, E and M: their partial states take at most an eighth of the memory of the tokens.
inline void set_splits(LinearAttentionParams& p) {
  const int64_t widest = p.features > p.value_dim ? p.features : p.value_dim, fewest = 16 * (widest > 64 ? widest : 64);
  const auto splits = [fewest](int64_t tokens) {
    const int64_t count = (tokens + fewest - 1) / fewest;
    return count < 1 ? 1 : count > 64 ? 64 : count;
  };
  p.key_splits = splits(p.keys);
  p.query_splits = splits(p.queries);
}

// D and E, padded.
inline int padded_size(const LinearAttentionParams& p) {
  const int64_t widest = p.dim > p.value_dim ? p.dim : p.value_dim;
  return widest <= 16 ? 16 : widest <= 32 ? 32 : 64;
}

// What the scratch arrays take, in floats; `base` (256-byte aligned) makes them, null only counts.
inline int64_t plan_workspace(Work& p, Call call, float* base) {
  if (call >= Call::kFeaturesMax) return 0;
  const int64_t heads = p.batch * p.heads, padded = round_up_16(p.features), size = padded_size(p);
  const bool backward = call == Call::kBackward, has_sums = !backward || has_key_gradients(p);
  const int64_t splits = backward ? p.query_splits : p.key_splits;
  int64_t used = 0;
  const auto take = [&](int64_t count) {
    float* at = base == nullptr ? nullptr : base + used;
    used += (count + 63) / 64 * 64;
    return at;
  };
  p.partial = take(has_sums ? heads * splits * (p.features + 1) * (p.value_dim + 3) : 0);
  p.rows = take(heads * padded * size);  // as if floats
  p.weight = take(heads * padded);
  p.offset = take(heads * padded);
  p.vector = take(heads * (size + 3));
  p.token = backward && has_sums ? take(heads * 3 * p.queries) : nullptr;
  return used;
}

// How many maxima a head leaves in `feature_max`.
inline int64_t feature_maxima(const LinearAttentionParams& p, int64_t resident_blocks) {
  using Half = TokensShape<__half, 16, FeatureMap::kFavor, Pass::kFeatures>;
  using Float = TokensShape<float, 16, FeatureMap::kFavor, Pass::kFeatures>;
  return p.dtype == DType::kFloat ? Float::blocks(p, p.queries, resident_blocks) * Float::kWarps
                                  : Half::blocks(p, p.queries, resident_blocks) * Half::kWarps;
}

// One dtype, size and map: launch(kernel, blocks, threads, bytes of shared memory, arguments…) in order.
template <class T, int P, FeatureMap map, class Launch>
struct Passes {
  const Work& p;
  const Launch& launch;
  const int64_t heads = p.batch * p.heads;

  void run(Call call) const {
    if (call == Call::kForward) forward();
    if (call == Call::kBackward) backward();
    if (call == Call::kState) key_state();
    if (call == Call::kStateBackward) key_gradients(PackFor::kState);
    if constexpr (map == FeatureMap::kFavor)  // relu has no maximum
      if (call == Call::kFeaturesMax) phi<Step::kMax>();
    if constexpr (kProjected<map>) {
      if (call == Call::kFeaturesForward) phi<Step::kForward>();
      if (call == Call::kFeaturesBackward) phi<Step::kBackward>();
    }
  }

 private:
  void forward() const {
    key_state();
    pack({PackFor::kQueries, 0});
    over_tokens<Pass::kQueryPass>(query_pass<T, P, map>, {p.q, {}, p.out, {}, p.queries, 0, 1});
  }
  void backward() const {
    pack({PackFor::kQueries, 0});
    over_tokens<Pass::kBackward>(query_backward<T, P, map>, {p.q, p.grad_out, p.grad_q, {}, p.queries, 0, 1});
    if (!has_key_gradients(p)) return;
    sums<true>(query_backward_sums<T, P, map>, {p.q, p.grad_out, p.queries, p.query_splits});
    key_gradients(PackFor::kKeys);
  }
  void key_state() const { sums<false>(key_pass<T, P, map>, {p.k, p.v, p.keys, p.key_splits}); }
  void key_gradients(PackFor role) const {
    int raise = 0;
    while (role == PackFor::kKeys && raise < 15 && (int64_t(2) << raise) <= p.keys) ++raise;
    pack({role, raise});
    over_tokens<Pass::kBackward>(key_backward<T, P, map>,
                                 {p.k, p.v, p.grad_k, p.grad_v, p.keys, 0, 1 / float(1 << raise)});
  }

  template <bool queries, class Kernel>
  void sums(Kernel kernel, const SumsSide& side) const {
    using Shape = SumsShape<T, P, map>;
    launch(kernel, heads * side.splits * Shape::blocks(p), Shape::kThreads, Shape::kBytes, p, side);
    const int64_t blocks = (p.features + kReduceFeatures - 1) / kReduceFeatures;
    launch(reduce<map, queries>, heads * blocks, 32 * kReduceWarps, 4 * kReduceWarps, p, side);
  }
  void pack(const PackSide& side) const {
    launch(pack_state<T, P, map>, heads, PackShape<P>::kThreads, PackShape<P>::kBytes, p, side);
  }
  template <Pass pass, class Kernel>
  void over_tokens(Kernel kernel, TokensSide side) const {
    using Shape = TokensShape<T, P, map, pass>;
    side.blocks = Shape::blocks(p, side.tokens, p.resident_blocks);
    launch(kernel, heads * side.blocks, Shape::kThreads, Shape::bytes(p), p, side);
  }
  template <Step step>
  void phi() const {
    using Shape = TokensShape<T, P, map, Pass::kFeatures>;
    const int64_t blocks = Shape::blocks(p, p.queries, p.resident_blocks);
    launch(features<T, P, map, step>, heads * blocks, Shape::kThreads, Shape::bytes(p), p, blocks);
  }
};

template <auto value>
using Constant = std::integral_constant<decltype(value), value>;

// f(the size as a constant), f(the map as one).
template <class F>
void for_size(const LinearAttentionParams& p, F&& f) {
  const int size = padded_size(p);
  if (size == 16) return f(Constant<16>{});
  if (size == 32) return f(Constant<32>{});
  f(Constant<64>{});
}
template <class F>
void for_map(FeatureMap map, F&& f) {
  if (map == FeatureMap::kSoftmax) return f(Constant<FeatureMap::kSoftmax>{});
  if (map == FeatureMap::kEluExact) return f(Constant<FeatureMap::kEluExact>{});
  if (map == FeatureMap::kElu || map == FeatureMap::kRelu) return f(Constant<FeatureMap::kRelu>{});
  if (map == FeatureMap::kFavorRelu) return f(Constant<FeatureMap::kFavorRelu>{});
  f(Constant<FeatureMap::kFavor>{});
}

template <class T, class Launch>
void run(Call call, const Work& p, const Launch& launch) {
  for_map(p.feature_map,
          [&](auto map) { for_size(p, [&](auto size) { Passes<T, size(), map(), Launch>{p, launch}.run(call); }); });
}

}  // namespace cxv::cuda
