"""nystrom_attention: against its definition with every map written out."""

import pytest
import torch
from conftest import heads

from cxv_kernels import nystrom_attention
from cxv_kernels.nystrom_attention.reference import iterative_pinv, segment_means


def definition(q, k, v, landmarks):
    scale = q.shape[-1] ** -0.5
    q_means, k_means = (
        torch.stack([part.mean(dim=-2) for part in x.tensor_split(landmarks, dim=-2)], dim=-2) for x in (q, k)
    )
    inner = (q_means @ k_means.mT * scale).softmax(-1)
    left, right = (q @ k_means.mT * scale).softmax(-1), (q_means @ k.mT * scale).softmax(-1)
    z = inner.mT / (inner.sum(-1).amax(-1) * inner.sum(-2).amax(-1))[..., None, None]
    eye = torch.eye(landmarks, dtype=q.dtype)
    for _ in range(6):
        az = inner @ z
        z = 0.25 * z @ (13 * eye - az @ (15 * eye - az @ (7 * eye - az)))
    return left @ z @ right @ v


@pytest.mark.parametrize(
    ("queries", "keys", "landmarks"), [(64, 64, 16), (70, 101, 16), (130, 64, 64), (1024, 1024, 64)]
)
def test_is_the_definition(queries, keys, landmarks):
    q, k, v = heads(2, 3, queries, 8), heads(2, 3, keys, 8), heads(2, 3, keys, 5)
    torch.testing.assert_close(nystrom_attention(q, k, v, landmarks), definition(q, k, v, landmarks))


def test_segments_are_the_papers_where_they_divide():
    x = heads(1, 1, 1024, 4)
    torch.testing.assert_close(segment_means(x, 64), x.reshape(1, 1, 64, 16, 4).mean(dim=3))


def test_landmarks_for_every_token_give_softmax_attention():
    q, k, v = (heads(1, 2, 8, 4) * 3 for _ in range(3))
    exact = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    inner = (q @ k.mT / 2).softmax(-1)
    torch.testing.assert_close(inner @ iterative_pinv(inner, 40) @ inner @ v, exact, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(nystrom_attention(q, k, v, 64), nystrom_attention(q, k, v, 8))


def test_pinv_scale_is_per_head():
    q, k, v = (heads(3, 2, 64, 8) for _ in range(3))
    q[1] *= 5
    for part in (slice(0, 1), slice(1, 2)):
        alone = nystrom_attention(q[part], k[part], v[part], 16)
        torch.testing.assert_close(alone, nystrom_attention(q, k, v, 16)[part], rtol=1e-12, atol=1e-12)


def test_gradcheck():
    inputs = [heads(1, 2, n, d, grad=True) for n, d in ((6, 3), (7, 3), (7, 2))]
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        assert torch.autograd.gradcheck(lambda *t: nystrom_attention(*t, 3), inputs)


def test_no_map_of_tokens_by_landmarks_is_saved():
    q, k, v = (heads(2, 4, 1024, 32, dtype=torch.float32, grad=True) for _ in range(3))
    saved = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.update({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()}), lambda t: t
    ):
        nystrom_attention(q, k, v)
    assert max(saved.values()) <= q.nbytes  # a map would be twice that


def test_empty():
    q, k, v = (heads(2, 3, 10, 8) for _ in range(3))
    assert nystrom_attention(q[:, :, :0], k, v).shape == (2, 3, 0, 8)
    assert nystrom_attention(q, k[:, :, :0], v[:, :, :0]).eq(0).all()
    assert nystrom_attention(q[:0], k[:0], v[:0]).shape == (0, 3, 10, 8)
    assert nystrom_attention(q[:, :, :1], k, v).isfinite().all()


def test_autocast():
    q, k, v = (heads(2, 3, 100, 8, dtype=torch.float32) for _ in range(3))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = nystrom_attention(q, k, v)
    assert out.dtype == torch.bfloat16
    assert (out - nystrom_attention(q, k, v)).abs().max() < 0.1


def test_bad_input():
    q, k, v = (heads(2, 3, 10, 8) for _ in range(3))
    with pytest.raises(ValueError, match="num_landmarks must be at least 1, got 0"):
        nystrom_attention(q, k, v, 0)
    with pytest.raises(ValueError, match="k has 2 heads, q 3"):
        nystrom_attention(q, k[:, :2], v[:, :2])
