"""FAVOR+ in Triton: the skeleton of linear_attention with a projection; performer_features has kernels of its own."""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton import launch
from ..autograd import like_layout
from ..linear_attention.triton import (
    Skeleton,
    feature,
    half_norm,
    key_kernel,
    load_projection,
    load_tokens,
    nothing,
    of_head,
    project,
    store_tokens,
)


def _skeleton(op: str, kernel: str, like: Tensor, value_dim: int, projection: Tensor, eps: float) -> Skeleton:
    feature_map = "favor_relu" if kernel == "relu" else "favor" if eps else "exact"
    return Skeleton(op, feature_map, like, value_dim, projection, eps)


def performer_attention_forward(q, k, v, projection, key_mask, kernel, eps):
    skeleton = _skeleton("performer_attention", kernel, q, v.shape[3], projection, eps)
    state, stat, top = skeleton.key_pass(k, v, key_mask)
    return skeleton.query_pass(q, state, stat), state, stat, top


def performer_attention_backward(grad_out, q, k, v, projection, key_mask, state, key_stat, key_max, kernel, eps):
    skeleton = _skeleton("performer_attention", kernel, q, v.shape[3], projection, eps)
    grad_q, grad, grads = skeleton.query_backward(grad_out, q, state, key_stat)
    return grad_q, *skeleton.key_backward(k, v, key_mask, state[:, :, -2], key_stat, key_max, grad, grads)
