"""The attention kernels of Triton in its interpreter: splits, launch options, 32-bit offsets and limits.

The other files of this folder have the properties of every backend; tests/test_triton.py runs both.
"""

import pytest
import torch
from cases import (
    LINEAR,
    LINEAR_FAMILY,
    PERFORMER,
    Sizes,
    assert_close_to_float64,
    every,
    name_of,
    needed_gradients,
    poisoned_memory,
    run,
    short_splits,
)
from conftest import heads, layouts
from test_extreme_values import ATTENTION, check_attention, draw

from cxv_kernels import linear_attention, nystrom_attention, performer_attention
from cxv_kernels.ops.linear_attention.triton import configs


@pytest.mark.parametrize(
    ("case", "dtype"),
    # test_many_tokens_in_float16 has these two in float16
    [(case, torch.float64 if case in (LINEAR[0], PERFORMER[0]) else torch.float16) for case in LINEAR_FAMILY],
    ids=name_of,
)
def test_splits_are_added(case, dtype):
    """A batch in which one image sees few keys, one none, whatever the hidden ones hold."""
    sizes = Sizes(3, 1, 20, 140, 16, 16)
    key_mask = torch.rand(3, 140) > 0.5
    key_mask[1], key_mask[2] = torch.arange(140) < 3, False
    q, k, v = case.inputs(sizes, dtype)
    hidden = ~key_mask[:, None, :, None]
    spoilt = [q, k.masked_fill(hidden, torch.nan), v.masked_fill(hidden, torch.inf)]
    with short_splits():
        # with three keys nothing averages the operands' roundings
        first = assert_close_to_float64(case, "triton", [q, k, v], sizes, 2, key_mask=key_mask)
        again = run(case.bind("triton", sizes, key_mask=key_mask), spoilt)
    assert all(map(torch.equal, first, again))
    assert not first[0][2].any()
    assert not first[2].masked_select(hidden).any()


@every([LINEAR[0], LINEAR[2], PERFORMER[0]])  # with a running maximum, and without
def test_bits_of_a_head_with_splits(case):
    """Alone or in a batch, in another layout, also where fresh memory is NaN."""
    sizes = Sizes(2, 2, 20, 140, 16, 16)
    inputs, call = case.inputs(sizes, torch.float16), case.bind("triton", sizes)
    with short_splits():
        first = run(call, inputs)
        assert all(
            torch.equal(a[1:, 1:], b) for a, b in zip(first, run(call, [t[1:, 1:] for t in inputs]), strict=True)
        )
        with poisoned_memory():
            assert all(map(torch.equal, first, run(call, [layouts(t)["a chunk of qkv"] for t in inputs])))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=name_of)
@every(LINEAR)
def test_more_channels_than_a_block(case, dtype):
    sizes = Sizes(1, 2, 20, 70, 40, 9)
    with short_splits(BLOCK_F=16):
        assert_close_to_float64(case, "triton", case.inputs(sizes, dtype), sizes)


@pytest.mark.parametrize("separate", [True, False], ids=["separate-sums", "one-launch"])
@every(LINEAR_FAMILY)
def test_needed_gradients_with_each_query_backward(case, separate):
    """query_backward_sums does a part of the work, or does not."""
    sizes = Sizes(1, 1, 20, 18, 12, 9)
    inputs, call = case.inputs(sizes), case.bind("triton", sizes)
    entry = configs.lookup("query_backward", 0, 32, None, torch.float32) | {"SEPARATE": separate}
    with configs.override({"query_backward": {"default": entry}}):
        _, *every_gradient = assert_close_to_float64(case, "triton", inputs, sizes)
        for needed in ((0,), (1,), (2,), (0, 2)):
            for i, (got, want) in enumerate(zip(needed_gradients(call, inputs, needed), every_gradient, strict=True)):
                assert torch.equal(got, want) if i in needed else got is None


@every([LINEAR[0], PERFORMER[0]])
def test_offsets_beyond_32_bits(case):
    """Tokens 2²⁶ elements apart, the last beyond 2³¹; of that memory only what holds a token is ever touched."""
    sizes = Sizes(1, 2, 40, 40, 16, 16)
    contiguous, call = case.inputs(sizes, torch.float16), case.bind("triton", sizes)
    space = torch.empty(40 << 26, dtype=torch.float16)
    strided = [space.as_strided(t.shape, (0, 16, 1 << 26, 1), 32 * i) for i, t in enumerate(contiguous)]
    for far, near in zip(strided, contiguous, strict=True):
        far.copy_(near)
    assert all(map(torch.equal, run(call, strided), run(call, contiguous)))


@every([LINEAR[0], PERFORMER[0]])
def test_many_tokens_in_float16(case):
    """Neither what is summed nor a key's share, 1e-5 of it, leaves float16."""
    sizes = Sizes(1, 1, 1, 100_003, 8, 4)
    inputs = case.inputs(sizes, torch.float16)
    with short_splits(BLOCK_N=1 << 14, TOKENS=1 << 14):
        gots = run(case.bind("triton", sizes), inputs)
    for got, want in zip(gots, run(case.bind("reference", sizes), [t.double() for t in inputs]), strict=True):
        assert (got.double() - want).abs().max() <= 1e-2 * want.abs().max() + 6e-8


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", [name for name in ATTENTION if "1e-40" not in name])
def test_attention_at_drawn_values(name, seed):
    generator = torch.Generator().manual_seed(seed)
    means = torch.empty(2).uniform_(-100, 100, generator=generator).tolist()
    scales = (10 ** torch.empty(2).uniform_(-22, 2, generator=generator)).tolist()
    check_attention(name, "triton", draw(seed, torch.float32, means, scales))


@pytest.mark.parametrize(
    ("name", "dtype", "least"),
    [
        ("favor eps=1e-40", torch.float32, "1e-30"),
        ("favor relu eps=1e-40", torch.float32, "1e-30"),
        ("favor eps=1e-12", torch.float16, "1e-05"),
    ],
    ids=name_of,
)
def test_tiny_eps_is_not_supported(name, dtype, least):
    with pytest.raises(RuntimeError, match=f"does not support an eps between 0 and {least}"):
        check_attention(name, "triton", draw(0, dtype, (0.0, 0.0), (1.0, 1.0)))


def test_limits():
    q = heads(1, 1, 4, 129, dtype=torch.float32)
    with pytest.raises(RuntimeError, match="supports 1 to 128 channels, not 129"):
        linear_attention(q, q, q, backend="triton")
    x, projection = heads(1, 1, 4, 8, dtype=torch.float32), torch.randn(513, 8)
    with pytest.raises(RuntimeError, match="supports at most 512 features, not 513"):
        performer_attention(x, x, x, projection, backend="triton")
    with pytest.raises(RuntimeError, match="does not support bfloat16 in its interpreter"):
        linear_attention(*[x.bfloat16()] * 3, backend="triton")
    with pytest.raises(RuntimeError, match="supports 1 to 128 channels, not 129"):
        nystrom_attention(x, x, q, backend="triton")
