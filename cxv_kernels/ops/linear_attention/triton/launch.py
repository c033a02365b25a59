"""How the passes are launched: their compile-time parameters, their splits, and the tensors between them."""

import functools
import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .... import _triton
from ....autograd import like_layout, new_gradients
from ....validation import accumulate_dtype
from ..op import triton_state
from . import configs
from .backward import key_backward, pack_gradient, query_backward, query_backward_reduce, query_backward_sums
from .forward import key_pass, pack_state, query_pass, reduce
from .primitives import PACKED, TINY, split_projection

MAX_SPLITS = 128  # of a head's tokens: the reduction adds them one after another
LOG2E = math.log2(math.e)


class Params:
    """The compile-time parameters of a kernel in one argument ``P``, of which the kernel reads attributes (``P.D``).

    Added are groups of maps. ``LOG_WEIGHTS``: a query's weights of the features are exponents; ``PLUS_EPS``: φ has a
    constant; ``MINUS_NORM``: its exponent has h.
    """

    def __init__(self, **values: Any) -> None:
        feature_map = values.get("MAP")
        groups = {
            "LOG_WEIGHTS": feature_map in ("exact", "elu_exact", "softmax"),
            "PLUS_EPS": feature_map in ("favor", "favor_relu"),
            "MINUS_NORM": feature_map in ("favor", "exact"),
        }
        self.values, self.text = values, str(values | groups)
        for name, value in (values | groups).items():  # Triton 3.6 needs constexpr, the interpreter the values
            setattr(self, name, value if _triton.interpreting() else tl.constexpr(value))

    def __repr__(self) -> str:  # a part of Triton's cache keys, also on disk: all that kernels read
        return self.text

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Params) and self.text == other.text

    def __hash__(self) -> int:
        return hash(self.text)


@functools.lru_cache(1024)
def _params(items: tuple[tuple[str, Any], ...]) -> Params:
    return Params(**dict(items))


def padded(size: int) -> int:
    """The dimension of a tile for this size: a power of two, at least tl.dot's 16."""
    return max(16, triton.next_power_of_2(size))


def strides_of(tensor: Tensor | None, rank: int = 4) -> tuple[int, ...]:
    """The strides of a tensor, zeros for None."""
    return (0,) * rank if tensor is None else tensor.stride()


def _precision(dtype: torch.dtype) -> str:
    """How tl.dot multiplies: float32 in one TF32 product only where the user's settings have PyTorch do so."""
    if dtype != torch.float32:
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3"


class LaunchPlan:
    """The passes for one feature map and one size of head; each launches its kernels and returns what they write.

    Args:
        op: the op's name, for errors.
        feature_map: ``P.MAP`` of :mod:`.primitives`.
        like: an input: its dtype, device and channels D.
        value_dim: E.
        projection: W (F, D) in the accumulation dtype, or None.
        eps: favor's and favor_relu's constant, relu's share of the denominator; the other maps do not read it.
        wide: multiply in the accumulation dtype, because S itself is a result.
    """

    def __init__(self, op, feature_map, like, value_dim, projection=None, eps=0.0, wide=False):
        dim, exponential = like.shape[3], feature_map in ("favor", "exact", "softmax", "elu_exact")
        self.op, self.projection, self.acc = op, projection, accumulate_dtype(like.dtype)
        self.split_w: Tensor | None = None  # split_projection's
        self.dtype, self.dim, self.value_dim, self.eps = self.acc if wide else like.dtype, dim, value_dim, eps
        self.features = dim if projection is None else projection.shape[0]
        self.arch = _triton.capability(like.device)
        scale = 1.0 if feature_map in ("elu", "elu_exact", "relu") else dim**-0.25
        self.state_params = {
            "E": value_dim,
            "F": self.features,
            "MAP": feature_map,
            "EXP": exponential,
            "EPS": eps if feature_map.startswith("favor") else 0.0,
        }
        self.params = self.state_params | {
            "D": dim,
            "SCALE": scale * LOG2E if exponential else scale,
            "HALF": LOG2E / (2 * math.sqrt(dim)),
            "PRECISION": _precision(self.dtype),
            "WIDE": wide,
            "BLOCK_D": padded(dim),
            "BLOCK_E": padded(value_dim),
        }

    def launch(self, kernel: Any, grid: tuple[int, ...], *arguments: Any, **params: Any) -> None:
        """Launch ``kernel`` with these arguments, compile-time parameters and launch options."""
        options = {name: params.pop(name) for name in ("num_warps", "num_stages") if name in params}
        _triton.launch(self.op, kernel, grid, *arguments, P=_params(tuple(params.items())), **options)

    def _options(self, kernel: Any) -> dict[str, Any]:
        features = None if self.projection is None else self.features
        return configs.lookup(kernel.__name__, self.arch, max(self.dim, self.value_dim), features, self.dtype)

    def splits(self, kernel: Any, x: Tensor, partial: bool) -> tuple[dict[str, Any], tuple[int, int, int, int]]:
        """(parameters and launch options, (H, N, tokens of a split, splits)) of a kernel over the tokens of x.

        ``partial``: each split leaves a state behind, and so has at least as many bytes itself. The splits depend on
        the number of tokens and the table, not on the batch: the same bits alone or in any batch.
        """
        options, tokens = self._options(kernel), x.shape[2]
        size = options.pop("TOKENS")
        if partial:
            state = self.features * self.value_dim * self.acc.itemsize
            size = max(size, -(-state // (max(self.dim, 1) * self.dtype.itemsize)), -(-tokens // MAX_SPLITS))
        size = -(-size // options["BLOCK_N"]) * options["BLOCK_N"]
        options["BLOCK_F"] = min(options["BLOCK_F"], padded(self.features))
        if self.projection is None:  # a block of features is one of channels
            options["BLOCK_D"] = options["BLOCK_F"]
        return self.params | options, (x.shape[1], tokens, size, -(-tokens // size))

    def blocks(self, params: dict[str, Any]) -> int:
        """The number of blocks of features."""
        return -(-self.features // params["BLOCK_F"])

    def _split_projection(self, blocks: int) -> tuple[Tensor | None, tuple[int, ...]]:
        """W and its strides for a kernel that reads it in so many blocks for each tile of tokens."""
        if self.projection is None or blocks == 1 or self.dtype.itemsize != 2:
            return self.projection, strides_of(self.projection, 2)
        if self.split_w is None:
            self.split_w = self.projection.new_empty((2, *self.projection.shape), dtype=self.dtype)
            grid = (-(-self.projection.numel() // 1024),)
            params = {"D": self.dim, "F": self.features, "SCALE": self.params["SCALE"], "BLOCK": 1024}
            tensors = (self.projection, self.split_w)
            self.launch(split_projection, grid, *tensors, self.projection.stride(), **params)
        return self.split_w, (self.dim, 1)

    def _pack_state(self, state: Tensor, stat: Tensor, blocks: int) -> Tensor | None:
        """U for a kernel that reads it in so many blocks for each tile of tokens."""
        if blocks == 1:
            return None
        packed = state.new_empty((*state.shape[:2], self.features, self.value_dim + PACKED.value), dtype=self.dtype)
        grid = (state.shape[0] * state.shape[1], -(-self.features // 16))
        params = {name: self.params[name] for name in ("E", "F", "MAP", "BLOCK_E")}
        self.launch(pack_state, grid, state, stat, packed, **params, BLOCK_F=16)
        return packed

    def key_sums(self, k: Tensor, v: Tensor | None, key_mask: Tensor | None) -> tuple[Tensor, Tensor, int]:
        """The key pass: (sums (B·H, splits, F + 1, E), stats (B·H, splits, 2, F + 1), splits)."""
        params, sizes = self.splits(key_pass, k, partial=True)
        heads, splits, rows = k.shape[0] * k.shape[1], sizes[3], self.features + 1
        sums = k.new_empty((heads, splits, rows, self.value_dim), dtype=self.acc)
        stats = sums.new_empty((heads, splits, 2, rows))
        tensors = (k, v, self.projection, key_mask, sums, stats)
        strides = (k.stride(), strides_of(v), strides_of(self.projection, 2), strides_of(key_mask, 2))
        self.launch(key_pass, (heads * splits * self.blocks(params),), *tensors, strides, sizes, **params)
        return sums, stats, splits

    def key_pass(self, k: Tensor, v: Tensor, key_mask: Tensor | None, raw: bool = False) -> tuple[Tensor, ...]:
        """The key pass and its reduction.

        Returns:
            (state (B, H, F + 2, E), stat (B, H, 2 F + 1), favor's maximum (B, H)), or if raw kv_state's S and stat.
        """
        sums, stats, splits = self.key_sums(k, v, key_mask)
        heads = tuple(k.shape[:2])
        if raw:
            state = sums.new_empty((*heads, self.features, self.value_dim))
            stat = state.new_empty((*heads, self.features))
        else:
            state, stat = triton_state(k, self.features, self.value_dim)
        key_max = state.new_zeros(heads)
        options = self._options(reduce)
        width = min(options.pop("BLOCK_E"), padded(self.value_dim))
        grid = (heads[0] * heads[1], -(-self.value_dim // width))
        params = self.state_params | {"RAW": raw, "BLOCK_E": width, "BLOCK_F": padded(self.features)} | options
        self.launch(reduce, grid, sums, stats, state, stat, key_max, splits, **params)
        return state, stat, key_max

    def query_pass(self, q: Tensor, state: Tensor, stat: Tensor) -> Tensor:
        """out (B, H, N, E)."""
        params, sizes = self.splits(query_pass, q, partial=False)
        out = like_layout(q, (*q.shape[:3], self.value_dim))
        blocks = self.blocks(params)
        projection, w_strides = self._split_projection(blocks)
        tensors = (q, projection, state, stat, self._pack_state(state, stat, blocks), out)
        strides, grid = (q.stride(), w_strides, out.stride()), (q.shape[0] * q.shape[1] * sizes[3],)
        self.launch(query_pass, grid, *tensors, strides, sizes, BLOCKS=blocks, **(params | {"EPS": self.eps}))
        return out

    def backward(self, grad_out, q, k, v, key_mask, state, stat, key_max, needed):
        """dq, dk and dv as far as needed, else empty (0)."""
        if not v.shape[3]:  # no output depends on anything
            return tuple(grad.zero_() for grad in new_gradients((q, k, v), needed))
        grad_q, *grads = self.query_backward(grad_out, q, state, stat, needed[0], any(needed[1:]))
        if not any(needed[1:]):
            return grad_q, *new_gradients((k, v), needed[1:])
        return grad_q, *self.key_backward(k, v, key_mask, state[:, :, -2], stat, key_max, *grads, needed[1:])

    def query_backward(self, grad_out, q, state, stat, for_queries, for_keys):
        """dq if needed, else empty (0); and where the keys need it the state's gradient: R (B, H, F, E), and ρ, the
        largest |R| and 1/z of the features (B, H, 3, F)."""
        params, sizes = self.splits(query_backward, q, partial=True)
        blocks, heads = self.blocks(params), q.shape[0] * q.shape[1]
        separate = params["SEPARATE"] or blocks > 1
        if separate or not for_keys:
            params, sizes = self.splits(query_backward, q, partial=False)
        del params["SEPARATE"]
        [grad_q] = new_gradients((q,), [for_queries])
        rows = state.new_empty((heads, 3, q.shape[2])) if separate and for_keys else None
        sums, stats = self._query_sums(state, heads, sizes[3]) if for_keys and not separate else (None, None)
        projection, w_strides = self._split_projection(blocks)
        needed_q, packed = grad_q if for_queries else None, self._pack_state(state, stat, blocks)
        tensors = (grad_out, q, projection, state, stat, packed, needed_q, rows, sums, stats)
        strides, grid = (grad_out.stride(), q.stride(), w_strides, strides_of(needed_q)), (heads * sizes[3],)
        self.launch(query_backward, grid, *tensors, strides, sizes, BLOCKS=blocks, **(params | {"EPS": self.eps}))
        if not for_keys:
            return (grad_q,)
        if separate:
            params, sizes = self.splits(query_backward_sums, q, partial=True)
            sums, stats = self._query_sums(state, heads, sizes[3])
            tensors = (grad_out, q, self.projection, state, stat, rows, sums, stats)
            strides = (grad_out.stride(), q.stride(), strides_of(self.projection, 2))
            grid = (heads * sizes[3] * self.blocks(params),)
            self.launch(query_backward_sums, grid, *tensors, strides, sizes, **params)
        return grad_q, *self._query_backward_reduce(sums, stats, sizes[3], state, stat)

    def _query_sums(self, like: Tensor, heads: int, splits: int) -> tuple[Tensor, Tensor]:
        rows = (heads, splits, self.features + 1)
        return like.new_empty((*rows, self.value_dim)), like.new_empty(rows)

    def _query_backward_reduce(self, sums, stats, splits, state, stat):
        grad_state = state.new_empty((*state.shape[:2], self.features, self.value_dim))
        grad_stats = state.new_empty((*state.shape[:2], 3, self.features))
        options = self._options(query_backward_reduce)
        height = min(options.pop("BLOCK_F"), padded(self.features))
        grid = (state.shape[0] * state.shape[1], -(-self.features // height))
        params = self.state_params | {"BLOCK_E": padded(self.value_dim), "BLOCK_F": height} | options
        tensors = (sums, stats, state, stat, grad_state, grad_stats)
        self.launch(query_backward_reduce, grid, *tensors, splits, **params)
        return grad_state, grad_stats

    def _pack_gradient(self, grad_state, grad_stats, stat, key_max, params):
        """R and ρ for a kernel that reads them in several blocks for each tile of tokens."""
        heads, width = tuple(stat.shape[:2]), 2 * self.value_dim + PACKED.value
        packed = grad_state.new_empty((*heads, self.features, width), dtype=self.dtype)
        rho = grad_state.new_empty((*heads, self.features + self.value_dim))
        height = min(32, params["BLOCK_F"])
        blocks = {"BLOCKS": -(-self.features // height), "BLOCK_ALL": padded(self.features)}
        blocks |= {"BLOCK_E": params["BLOCK_E"], "BLOCK_F": height}
        tensors = (grad_state, grad_stats, stat, key_max, packed, rho)
        self.launch(pack_gradient, (heads[0] * heads[1],), *tensors, stat.stride(1), **self.state_params, **blocks)
        return packed, rho

    def key_backward(self, k, v, key_mask, mean, stat, key_max, grad_state, grad_stats, needed):
        """dk and dv as far as needed, else empty (0). ``mean``: c̄ (B, H, E), or None for 0."""
        params, sizes = self.splits(key_backward, k, partial=False)
        grads = new_gradients((k, v), needed)
        grad_k, grad_v = (grad if need else None for grad, need in zip(grads, needed, strict=True))
        blocks = self.blocks(params)
        projection, w_strides = self._split_projection(blocks)
        state = (grad_state, grad_stats)
        packed = self._pack_gradient(*state, stat, key_max, params) if blocks > 1 else (None, None)
        tensors = (k, v, projection, key_mask, mean, stat, key_max, *state, *packed, grad_k, grad_v)
        strides = (k.stride(), v.stride(), w_strides, strides_of(key_mask, 2), 0 if mean is None else mean.stride(1))
        strides += (stat.stride(1), strides_of(grad_k), strides_of(grad_v))
        params |= {"BLOCKS": blocks, "BLOCK_ALL": padded(self.features)}
        self.launch(key_backward, (k.shape[0] * k.shape[1] * sizes[3],), *tensors, strides, sizes, **params)
        return grads


def _plan(feature_map, q, v, eps):
    return LaunchPlan("linear_attention", "elu_exact" if feature_map == "elu" else feature_map, q, v.shape[3], eps=eps)


def linear_attention_forward(q, k, v, key_mask, feature_map, eps):
    plan = _plan(feature_map, q, v, eps)
    state, stat, _ = plan.key_pass(k, v, key_mask)
    return plan.query_pass(q, state, stat), state, stat


def linear_attention_backward(grad_out, q, k, v, key_mask, state, key_stat, feature_map, eps, needed):
    plan = _plan(feature_map, q, v, eps)
    return plan.backward(grad_out, q, k, v, key_mask, state, key_stat, key_stat, needed)


def _with_a_channel(x: Tensor) -> Tensor:
    """x, or one channel of zeros: without channels S is empty, and z is not."""
    return x if x.shape[-1] else torch.nn.functional.pad(x, (0, 1))


def kv_state_forward(k, v, key_mask, feature_map):
    channels, v = v.shape[3], _with_a_channel(v)
    plan = LaunchPlan("kv_state", feature_map, k, v.shape[3], wide=True)
    state, key_stat, _ = plan.key_pass(k, v, key_mask, raw=True)
    return state[..., :channels], key_stat


def kv_state_backward(grad_state, grad_z, k, v, key_mask, key_stat, feature_map, needed):
    if feature_map != "softmax":  # the kernel divides by z, so that its weights are at most 1
        grad_state, grad_z = grad_state * key_stat[..., None], grad_z * key_stat
    inverse = torch.where(key_stat > TINY.value, key_stat.reciprocal(), 0)
    channels, v, grad_state = v.shape[3], _with_a_channel(v), _with_a_channel(grad_state)
    grad_stats = torch.stack([grad_z, grad_state.abs().amax(dim=-1), inverse], dim=2)
    plan, state = LaunchPlan("kv_state", feature_map, k, v.shape[3], wide=True), grad_state.contiguous()
    grad_k, grad_v = plan.key_backward(k, v, key_mask, None, key_stat, key_stat, state, grad_stats, needed)
    return grad_k, grad_v[..., :channels] if needed[1] else grad_v
