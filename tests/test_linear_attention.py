"""linear_attention and kv_state: the reference against their definition. test_fused_attention.py has the kernels."""

import pytest
import torch
from conftest import needs_cpp, qkv

import cxv_kernels

MAPS = ("softmax", "elu", "relu")
attend = cxv_kernels.linear_attention


def dense(q, k, v, feature_map, eps, key_mask):
    """The N_q × N_k weights written out."""
    seen = torch.ones(k.shape[0], k.shape[2], dtype=torch.bool) if key_mask is None else key_mask
    seen = seen[:, None, :, None].to(k.dtype)
    if feature_map == "softmax":
        phi_q = (q / q.shape[-1] ** 0.25).exp()
        phi_q = phi_q / phi_q.sum(-1, keepdim=True)
        phi_k = (k / k.shape[-1] ** 0.25).exp() * seen
        return phi_q @ (phi_k / phi_k.sum(-2, keepdim=True)).mT @ v
    phi = (lambda x: torch.where(x > 0, x + 1, x.exp())) if feature_map == "elu" else (lambda x: x.clamp(min=0))
    weights = phi(q) @ (phi(k) * seen).mT
    return weights @ v / (weights.sum(-1, keepdim=True) + (eps if feature_map == "relu" else 0))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("feature_map", MAPS)
def test_reference_is_the_definition(feature_map, masked):
    q, k, v = qkv(value_dim=20)
    key_mask = torch.rand(2, 150) > 0.4 if masked else None
    out = attend(q, k, v, feature_map, eps=1e-3, key_mask=key_mask, backend="reference")
    torch.testing.assert_close(out, dense(q, k, v, feature_map, 1e-3, key_mask), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("feature_map", MAPS)
def test_kv_state_is_what_attention_reads(feature_map):
    q, k, v = qkv()
    state, z = cxv_kernels.kv_state(k, v, feature_map)
    assert state.shape == (2, 3, 32, 32)
    assert z.shape == (2, 3, 32)
    if feature_map == "softmax":
        torch.testing.assert_close(z, torch.ones_like(z))
        out = (q * 32**-0.25).softmax(-1) @ state
    else:
        phi = torch.nn.functional.elu(q) + 1 if feature_map == "elu" else q.relu()
        out = phi @ state / ((phi * z[:, :, None]).sum(-1, keepdim=True) + (1e-6 if feature_map == "relu" else 0))
    torch.testing.assert_close(out, attend(q, k, v, feature_map, backend="reference"))


@needs_cpp
def test_exponential_is_within_two_ulp():
    """elu's φ of one negative key is the kernels' exponential itself."""
    x = torch.cat([-torch.logspace(-8, 1.94, 400_000), torch.linspace(-87.3, 0, 400_000)]).reshape(1, 800, 1, 1000)
    _, z = cxv_kernels.kv_state(x, torch.ones(1, 800, 1, 1), "elu", backend="cpu")
    exact = x[:, :, 0].double().exp()
    ulp = torch.nextafter(exact.float(), torch.tensor(torch.inf)).double() - exact.float().double()
    assert ((z.double() - exact).abs() / ulp).max() < 2
    below = torch.full((1, 1, 1, 5), -90.0)
    below[..., 1:] = torch.tensor([-1e4, -torch.inf, 0.0, torch.nan])
    _, z = cxv_kernels.kv_state(below, torch.ones(1, 1, 1, 1), "elu", backend="cpu")
    assert z[0, 0, :4].tolist() == [0, 0, 0, 1]
    assert z[0, 0, 4].isnan()


@needs_cpp
def test_half_precision_conversions_are_exact():
    """Every finite float16 and bfloat16 value passes through the kernel and back: one key, so out = v."""
    for dtype in (torch.float16, torch.bfloat16):
        every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
        v = every[every.isfinite()].reshape(1, 1, 1, -1)
        q = torch.zeros(1, 1, 1, 1, dtype=dtype)
        out = attend(q, q, v, "softmax", backend="cpu")
        assert torch.equal(out, v)


def test_bad_input():
    q, k, v = qkv(dtype=torch.float32)
    for error, match, arguments in (
        (ValueError, r"q must have 4 dimensions \(B, H, N_q, D\), got shape \(3, 70, 32\)", (q[0], k, v)),
        (ValueError, "k has 2 heads, q 3", (q, k[:, :2], v[:, :2])),
        (ValueError, "k has batch size 1, q 2", (q, k[:1], v[:1])),
        (ValueError, "k has head dimension 16, q 32", (q, k[..., :16], v)),
        (ValueError, "v has 100 tokens, k 150", (q, k, v[:, :, :100])),
        (TypeError, "v is torch.float64, k torch.float32", (q, k, v.double())),
        (TypeError, "k must be float64, float32, float16 or bfloat16, got torch.int64", (q, k.long(), v)),
        (TypeError, "q must be a torch.Tensor, got list", ([1.0], k, v)),
        (ValueError, "k must have at least one channel", (q[..., :0], k[..., :0], v)),
        (ValueError, "k is on meta, q on cpu", (q, k.to("meta"), v.to("meta"))),
    ):
        with pytest.raises(error, match=match):
            attend(*arguments)
    with pytest.raises(ValueError, match="eps must be a finite number of at least 0, got nan"):
        attend(q, k, v, eps=float("nan"))
    with pytest.raises(ValueError, match="feature_map must be one of 'softmax', 'elu', 'relu', got 'cosine'"):
        attend(q, k, v, "cosine")
    with pytest.raises(TypeError, match=r"key_mask must be a bool tensor \(B, N_k\), got torch.float32"):
        attend(q, k, v, key_mask=torch.ones(2, 150))
    with pytest.raises(ValueError, match=r"key_mask must have shape \(2, 150\)"):
        attend(q, k, v, key_mask=torch.ones(2, 70, dtype=torch.bool))
    with pytest.raises(ValueError, match="backend must be one of"):
        attend(q, k, v, backend="fast")
