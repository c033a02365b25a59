"""``accelerate`` on Nyströmformer, and our mechanisms as attention implementations of transformers."""

import copy

import pytest
import torch
from conftest import needs_cpp
from torch import nn

import cxv_kernels

from .comparing import check_compiled_and_exported, check_equal, check_fused

transformers = pytest.importorskip("transformers")
pytest.importorskip("transformers.models.nystromformer")
from transformers.models.nystromformer.modeling_nystromformer import NystromformerSelfAttention  # noqa: E402

VISION = ("ViT", "Dinov2", "DeiT", "SiglipVision")
IMPLEMENTATIONS = ("cxv_performer", "cxv_linear", "cxv_nystrom")


def self_attention(tokens=24, landmarks=6, kernel=5):
    torch.manual_seed(0)
    config = transformers.NystromformerConfig(
        hidden_size=16,
        num_attention_heads=2,
        num_landmarks=landmarks,
        segment_means_seq_len=tokens,
        conv_kernel_size=kernel,
    )
    return NystromformerSelfAttention(config)


@pytest.mark.parametrize(("tokens", "landmarks", "kernel"), [(24, 6, 5), (24, 1, 33), (60, 20, 3)])
def test_nystromformer_self_attention_is_equal(tokens, landmarks, kernel):
    model = self_attention(tokens, landmarks, kernel)
    check_equal(model, [torch.randn(2, tokens, 16)], [""], depth=tokens, amplification=80)  # 8 is nystrom_attention's


def test_nystromformer_with_the_exact_initial_scale_is_equal():
    model = self_attention()
    model.init_option = "exact"
    check_equal(model, [torch.randn(2, 24, 16)], [""], depth=24, amplification=80)


@needs_cpp
def test_nystromformer_is_fused():
    check_fused(self_attention(), [torch.randn(2, 24, 16)], "nystrom_readout")


def test_nystromformer_with_a_mask_or_maps_runs_the_original():
    model = self_attention().eval()
    fused = copy.deepcopy(model)
    cxv_kernels.accelerate(fused)
    x, mask = torch.randn(2, 24, 16), torch.zeros(2, 1, 1, 24)
    mask[0, :, :, 20:] = -1e9
    assert torch.equal(fused(x, mask)[0], model(x, mask)[0])
    out, probabilities = fused(x, output_attentions=True)
    assert torch.equal(out, model(x)[0])
    assert probabilities.shape == (2, 2, 24, 6)
    with pytest.raises(RuntimeError, match="is invalid for input of size"):
        fused(x[:, :18])


def test_nystromformer_that_computes_softmax_attention_is_left_alone():
    hooked = self_attention()
    hooked.conv.register_forward_hook(lambda *_: None)
    model = nn.ModuleDict({"softmax": self_attention(6, 6), "uneven": self_attention(25, 6), "hooked": hooked})
    model["plain"] = self_attention()
    names, reasons = cxv_kernels.accelerate(model, return_reasons=True)
    assert names == ["plain"]
    assert "as many landmarks as tokens" in reasons["softmax"]
    assert "6 landmarks do not divide" in reasons["uneven"]
    assert "with a hook" in reasons["hooked"]


def test_nystromformer_model_compiles_and_exports():
    check_compiled_and_exported(nn.Sequential(self_attention()), [torch.randn(2, 24, 16)])


def test_nystromformer_model_is_accelerated_without_padding():
    config = transformers.NystromformerConfig(
        hidden_size=16, num_attention_heads=2, num_landmarks=4, segment_means_seq_len=16, num_hidden_layers=2,
        intermediate_size=16, vocab_size=20,
    )  # fmt: skip
    model = transformers.NystromformerModel(config).eval()
    ids = torch.randint(20, (2, 16))
    expected = model(ids)[0]
    assert len(cxv_kernels.accelerate(model)) == 2
    result = model(ids, attention_mask=torch.ones_like(ids))[0]
    assert not torch.equal(result, expected)
    torch.testing.assert_close(result, expected)


# --- attn_implementation -----------------------------------------------------------------------------------------


@pytest.fixture
def registered():
    """Register with options that approximate softmax attention closely at the size of the tests."""
    interfaces = transformers.AttentionInterface, transformers.AttentionMaskInterface
    before = [dict(interface._global_mapping) for interface in interfaces]
    yield cxv_kernels.register_with_transformers(num_features=4000, num_landmarks=64)
    for interface, mapping in zip(interfaces, before, strict=True):
        interface._global_mapping.clear()
        interface._global_mapping.update(mapping)


def vision_model(name, **options):
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, image_size=16, patch_size=4,
        **options,
    )  # fmt: skip
    return getattr(transformers, f"{name}Model")(config).eval()


@pytest.mark.parametrize("name", VISION)
def test_vision_models_approximate_softmax_attention(registered, name):
    model, x = vision_model(name), torch.randn(2, 3, 16, 16)
    exact = model(x).last_hidden_state
    names = []
    for implementation, error in zip(IMPLEMENTATIONS, (0.3, 0.5, 0.02), strict=True):
        model.set_attn_implementation(implementation)
        out = model(x).last_hidden_state
        names.append(model.config._attn_implementation)
        assert (out - exact).norm() < error * exact.norm()
        assert not torch.equal(out, exact)
    assert tuple(names) == registered == IMPLEMENTATIONS


def test_the_random_features_are_those_of_every_process(registered):
    model, x = vision_model("ViT"), torch.randn(1, 3, 16, 16)
    model.set_attn_implementation("cxv_performer")
    first = model(x).last_hidden_state
    cxv_kernels.register_with_transformers(num_features=4000)
    assert torch.equal(vision_model("ViT", attn_implementation="cxv_performer")(x).last_hidden_state, first)


def test_vision_model_compiles_and_exports(registered):
    """With the Performer, the only one that has a constant."""
    model = vision_model("Dinov2", attn_implementation="cxv_performer")
    x = torch.randn(1, 3, 16, 16)
    expected = model(x).last_hidden_state
    torch.compiler.reset()
    out = torch.compile(model, fullgraph=True, backend="aot_eager")(x).last_hidden_state
    torch.testing.assert_close(out, expected)
    out.sum().backward()
    exported = torch.export.export(model, (x,)).module()
    torch.testing.assert_close(exported(x).last_hidden_state, expected)


def test_scaling_of_the_model_is_applied(registered):
    model, x = vision_model("ViT"), torch.randn(1, 3, 16, 16)
    for layer in model.layers if hasattr(model, "layers") else model.encoder.layer:
        next(m for m in layer.modules() if hasattr(m, "scaling")).scaling = 3.0
    exact = model(x).last_hidden_state
    model.set_attn_implementation("cxv_nystrom")
    assert (model(x).last_hidden_state - exact).norm() < 0.1 * exact.norm()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_causal_models_dropout_and_masks_of_pairs_are_errors(registered, implementation):
    x = torch.randn(1, 3, 16, 16)
    model = vision_model("ViT", attention_probs_dropout_prob=0.1, attn_implementation=implementation)
    model(x)  # nothing is dropped in eval
    with pytest.raises(ValueError, match=f"{implementation} has no attention map to apply dropout to.*is 0.1, to 0"):
        model.train()(x)
    with pytest.raises(ValueError, match=r"must be a padding mask \(B, N\), got shape \(1, 1, 17, 17\)"):
        model.eval()(x, attention_mask=torch.zeros(1, 1, 17, 17))
    config = transformers.GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=9, bos_token_id=0, eos_token_id=0)
    causal = transformers.GPT2Model(config)
    causal.set_attn_implementation(implementation)
    with pytest.raises(ValueError, match="is for encoders"):
        causal(torch.zeros(1, 4, dtype=torch.long))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_packed_sequences_are_an_error(registered, implementation):
    model = vision_model("ViT", attn_implementation=implementation)
    with pytest.raises(ValueError, match=f"{implementation} does not support cu_seq_lens_q"):
        model(torch.randn(1, 3, 16, 16), cu_seq_lens_q=torch.tensor([0, 8, 17]))


def test_padding_is_hidden_or_an_error(registered):
    config = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=9
    )
    model, ids = transformers.BertModel(config).eval(), torch.randint(9, (2, 8))
    mask = torch.tensor([5, 8])[:, None] > torch.arange(8)
    for implementation in IMPLEMENTATIONS[:2]:
        model.set_attn_implementation(implementation)
        torch.testing.assert_close(model(ids, attention_mask=mask)[0][:1, :5], model(ids[:1, :5])[0])
    model.set_attn_implementation("cxv_nystrom")
    model(ids, attention_mask=torch.ones_like(mask))
    with pytest.raises(ValueError, match="cxv_nystrom does not support a padding mask"):
        model(ids, attention_mask=mask)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_features": 0}, "num_features must be at least 1, got 0"),
        ({"num_landmarks": 0}, "num_landmarks must be at least 1, got 0"),
        ({"feature_map": "cosine"}, "feature_map must be one of"),
        ({"eps": -1.0}, "eps must be"),
    ],
    ids=str,
)
def test_wrong_options_are_errors_at_registration(options, words):
    with pytest.raises(ValueError, match=words):
        cxv_kernels.register_with_transformers(**options)
