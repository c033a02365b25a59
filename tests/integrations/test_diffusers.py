"""``accelerate`` on SANA and DC-AE of diffusers."""

import copy

import pytest
import torch
from torch import nn

import cxv_kernels

from .comparing import check_compiled_and_exported, check_equal, check_half, float64_kept, image, results

diffusers = pytest.importorskip("diffusers")
processors = pytest.importorskip("diffusers.models.attention_processor")

PROCESSORS = (
    "SanaLinearAttnProcessor2_0",
    "PAGIdentitySanaLinearAttnProcessor2_0",
    "PAGCFGSanaLinearAttnProcessor2_0",
)


def attention(processor="SanaLinearAttnProcessor2_0", **options):
    torch.manual_seed(0)
    cls = getattr(processors, processor, None) or pytest.skip(f"this version of diffusers has no {processor}")
    return processors.Attention(query_dim=16, heads=2, dim_head=8, bias=True, processor=cls(), **options)


def multiscale(**options):
    torch.manual_seed(0)
    return processors.SanaMultiscaleLinearAttention(16, 16, attention_head_dim=8, **options)


@pytest.mark.parametrize(("processor", "tokens"), [(PROCESSORS[0], 1), *((name, 30) for name in PROCESSORS)])
def test_sana_processor_is_equal(processor, tokens):
    check_equal(attention(processor), [torch.randn(6, tokens, 16)], [""], depth=tokens)


def test_sana_processor_with_a_norm_of_queries_is_equal():
    model = attention(kv_heads=2, qk_norm="rms_norm_across_heads")
    check_equal(model, [torch.randn(2, 30, 16)], [""], depth=30)


def test_sana_processor_with_other_keys_and_in_half_precision():
    model = attention().eval()
    fused = copy.deepcopy(model)
    cxv_kernels.accelerate(fused)
    x, context = torch.randn(2, 30, 16), torch.randn(2, 7, 16)
    torch.testing.assert_close(fused(x, encoder_hidden_states=context), model(x, encoder_hidden_states=context))
    check_half(attention(), [x])
    half = fused.half()(1e4 * x.half())
    assert half.dtype == torch.float16
    assert half.isfinite().all()


@pytest.mark.parametrize(
    ("size", "channels_last", "options"),
    [
        ((2, 2), False, {}),  # quadratic in the tokens
        ((2, 2), True, {"kernel_sizes": ()}),
        ((7, 5), False, {"norm_type": "rms_norm", "residual_connection": True, "kernel_sizes": (3, 5)}),
        ((7, 5), True, {}),
    ],
    ids=str,
)
def test_multiscale_linear_attention_is_equal(size, channels_last, options):
    check_equal(multiscale(**options), [image(2, 16, *size, channels_last=channels_last)], [""], depth=35)


def test_multiscale_linear_attention_in_bfloat16():
    check_half(multiscale(), [torch.randn(2, 16, 6, 6)])


def sana():
    torch.manual_seed(0)
    return diffusers.SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=2,
        num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=8,
        sample_size=8,
    ).eval()  # fmt: skip


def test_sana_model_keeps_its_processors_api():
    model = sana()
    inputs = [torch.randn(2, 4, 8, 8), torch.randn(2, 5, 8), torch.tensor([3, 700])]
    call = lambda m: m(*inputs, return_dict=False)[0]  # noqa: E731
    expected, before = call(model), model.attn_processors
    names = cxv_kernels.accelerate(model)
    assert names == ["transformer_blocks.0.attn1", "transformer_blocks.1.attn1"]
    torch.testing.assert_close(call(model), expected)
    fused = model.attn_processors
    assert fused.keys() == before.keys()
    model.set_attn_processor(fused)
    torch.testing.assert_close(call(model), expected)
    assert cxv_kernels.accelerate(model, undo=True) == names
    assert model.attn_processors == before
    assert torch.equal(call(model), expected)


def test_sana_model_gradients_are_equal():
    class Called(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = sana()

        def forward(self, x, context, step):
            return self.model(x, context, step, return_dict=False)[0]

    model, inputs = Called(), [torch.randn(1, 4, 4, 4), torch.randn(1, 5, 8), torch.tensor([3])]
    with float64_kept():
        exact = results(model, inputs, torch.float64)
    cxv_kernels.accelerate(model)
    for name, result in results(model, inputs, torch.float64).items():
        torch.testing.assert_close(result, exact[name].to(result), rtol=1e-6, atol=1e-6)  # embeddings are float32


def test_autoencoder_is_equal():
    torch.manual_seed(0)
    model = diffusers.AutoencoderDC(
        in_channels=3, latent_channels=4, attention_head_dim=4,
        encoder_block_types=("ResBlock", "EfficientViTBlock"), decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 16), decoder_block_out_channels=(8, 16),
        encoder_layers_per_block=(1, 1), decoder_layers_per_block=(1, 1),
        encoder_qkv_multiscales=((), (5,)), decoder_qkv_multiscales=((), (5,)),
    ).eval()  # fmt: skip
    x = torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        expected = model(x).sample
        assert len(cxv_kernels.accelerate(model)) == 2
        torch.testing.assert_close(model(x).sample, expected, rtol=1e-4, atol=1e-5)


def test_sana_and_multiscale_compile_and_export():
    check_compiled_and_exported(nn.Sequential(attention()), [torch.randn(2, 30, 16)])
    check_compiled_and_exported(nn.Sequential(multiscale()), [torch.randn(2, 16, 6, 6)])


def test_other_processors_are_left_alone():
    model = nn.ModuleDict({"softmax": processors.Attention(16), "plain": attention(), "gelu": multiscale()})
    model["gelu"].nonlinearity = nn.GELU()
    video = pytest.importorskip("diffusers.models.transformers.transformer_sana_video")
    model["video"] = processors.Attention(16, processor=video.SanaLinearAttnProcessor3_0())
    names, reasons = cxv_kernels.accelerate(model, return_reasons=True)
    assert names == ["plain"]
    assert reasons.keys() == {"gelu", "video"}
    assert "feature map GELU" in reasons["gelu"]
    assert "rotates q and k" in reasons["video"]
