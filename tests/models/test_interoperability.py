"""cxv next to other libraries: quantized weights, DTensor, NumPy's numbers, threads, tensors of other kinds."""

import asyncio
import copy
import functools
import inspect
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import warnings
from dataclasses import asdict

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import needs_cpp
from torch import nn
from torch.nn.utils import prune
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_leaves

import cxv
import cxv_kernels
from cxv.data.augment import RandAugment
from cxv.data.datasets import balanced_subset
from cxv.data.loader import batches
from cxv.export import export_model, load_exported
from cxv.models.blocks import is_unmodified
from cxv.models.variants import CNVVariant
from cxv.training import InputError, TrainConfig, evaluate, interrupt, load_data
from cxv.training.config import resolve
from cxv.training.engine import predict

MODELS = ("cpv-1/2", "cnv-1/2", "cltv-1/2", "hybrid-vip-1/2", "hybrid-vin-1/2", "hybrid-vilt-1/2")


def small_model(name: str, use_fused: bool = True, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A model in eval mode for images of 8×8 pixels."""
    torch.manual_seed(0)
    return cxv.create_model(name, embed_dim=32, img_size=8, use_fused=use_fused).to(dtype).eval()


def in_thread(function):
    """What the function returns in a new thread."""
    results = []
    thread = threading.Thread(target=lambda: results.append(function()))
    thread.start()
    thread.join()
    return results[0]


# --- weights that are tensor subclasses -------------------------------------------------------------------------------


class QuantizedTensor(torch.Tensor):
    """Weights in 8 bits that nn.functional.linear alone can read, as those of torchao."""

    @staticmethod
    def __new__(cls, values, scale):
        return torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=scale.dtype, device=values.device)

    def __init__(self, values, scale):
        self.values, self.scale = values, scale

    @classmethod
    def quantize(cls, weight):
        scale = weight.abs().amax() / 127
        return cls((weight / scale).round().to(torch.int8), scale)

    def __tensor_flatten__(self):
        return ["values", "scale"], None

    @classmethod
    def __tensor_unflatten__(cls, parts, context, outer_size, outer_stride):
        return cls(parts["values"], parts["scale"])

    def dequantize(self):
        return self.values.to(self.scale.dtype) * self.scale

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is F.linear:
            x, weight, bias = args if len(args) == 3 else (*args, None)
            return F.linear(x, weight.dequantize(), bias)
        return super().__torch_function__(function, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, function, types, args, kwargs=None):
        if function in (torch.ops.aten.detach.default, torch.ops.aten.clone.default):
            result = cls(*(function(t) for t in (args[0].values, args[0].scale)))
            return return_and_correct_aliasing(function, args, kwargs, result)
        raise NotImplementedError(f"QuantizedTensor: {function} is not implemented")


def quantize_linears(model: nn.Module) -> nn.Module:
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            layer.weight = nn.Parameter(QuantizedTensor.quantize(layer.weight.detach()), requires_grad=False)
    return model


@pytest.mark.parametrize("use_fused", [False, True], ids=["reference", "fused"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", MODELS)
def test_quantized_weights_are_called(name, dtype, use_fused):
    """A model with quantized weights equals one whose plain weights have the same values."""
    model, expected = (small_model(name, use_fused, dtype) for _ in range(2))
    quantize_linears(model)
    quantized = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
    for layer, plain in zip(quantized, (m for m in expected.modules() if isinstance(m, nn.Linear)), strict=True):
        plain.weight.data = layer.weight.dequantize()
    x = torch.randn(2, 3, 8, 8, dtype=dtype)
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(model(x), expected(x), rtol=tolerance, atol=tolerance)
    assert all(type(layer.weight) is QuantizedTensor for layer in quantized)


def test_quantized_weights_are_not_saved(tmp_path):
    model = quantize_linears(small_model("cpv-1/2"))
    message = r"layers\.0\.attn\.q\.weight: expected a plain tensor, got QuantizedTensor: save the model before it is"
    with pytest.raises(InputError, match=message):
        cxv.save_safetensors(model, tmp_path / "a.safetensors")


def test_quantized_weights_leave_the_rest_trainable():
    """As in QLoRA: weights that are not quantized get their gradient."""
    model = quantize_linears(small_model("cpv-1/2")).train()
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_dynamic_quantization_of_pytorch():
    if "fbgemm" not in torch.backends.quantized.supported_engines:
        pytest.skip("PyTorch has no quantized engine here")
    model = small_model("cpv-1/2")
    x = torch.randn(2, 3, 8, 8)
    expected = model(x)
    with pytest.warns(DeprecationWarning, match="torch.ao.quantization is deprecated"):
        quantized = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    assert (quantized(x) - expected).abs().max() < 0.05 * expected.abs().max()


def _prune(layer):
    prune.l1_unstructured(layer, "weight", 0.5)


def _sparsify(layer):
    layer.weight = nn.Parameter(layer.weight.detach().to_sparse_csr())


@pytest.mark.filterwarnings("ignore:Sparse CSR")
@pytest.mark.parametrize(
    "change",
    [
        pytest.param(_prune, id="pruning"),
        pytest.param(nn.utils.parametrizations.weight_norm, id="weight-norm"),
        pytest.param(nn.utils.parametrizations.spectral_norm, id="spectral-norm"),
        pytest.param(quantize_linears, id="subclass"),
        pytest.param(_sparsify, id="sparse"),
        pytest.param(lambda layer: layer.register_forward_hook(lambda *_: None), id="hook"),
    ],
)
def test_is_unmodified_after_a_change(change):
    layer = nn.Linear(8, 8)
    assert is_unmodified(layer)
    change(layer)
    assert not is_unmodified(layer)


SEEN: list[bool] = []


class Spy(nn.Module):
    """Records in SEEN whether its layer is plain where it runs; torch.export undoes changes of attributes."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        SEEN.append(is_unmodified(self.layer))
        return self.layer(x)


def _export(model, x):
    torch.export.export(model, (x,), strict=False)


def _vmap(model, x):
    weights = {name: torch.stack([p, p]) for name, p in model.named_parameters()}
    torch.vmap(lambda w: torch.func.functional_call(model, w, x))(weights)


def _grad(model, x):
    torch.func.grad(lambda w: torch.func.functional_call(model, w, x).sum())(dict(model.named_parameters()))


def _fake(model, x):
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        model.layer.weight = nn.Parameter(mode.from_tensor(model.layer.weight.detach()))
        model(mode.from_tensor(x))


def _flat(model, x):
    """As FSDP1: a weight is a view into a flat parameter, and no parameter."""
    weight = model.layer.weight.detach().flatten()
    del model.layer.weight
    model.layer.weight = weight.view(4, 4)
    model(x)


@pytest.mark.parametrize("use", [_export, _vmap, _grad, _fake, _flat], ids=lambda use: use.__name__.strip("_"))
def test_is_unmodified_under_a_transform(use):
    SEEN.clear()
    use(Spy(), torch.zeros(2, 4))
    assert SEEN
    assert all(SEEN)


# --- replace_attention ------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Softmax attention with timm's parts."""

    def __init__(self, dim=32, num_heads=2):
        super().__init__()
        self.num_heads, self.qkv, self.proj = num_heads, nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class NoAttention(Attention):
    """What has the same parts, and computes something else."""

    def forward(self, x):
        return self.proj(self.qkv(x)[..., : x.shape[-1]])


@pytest.mark.parametrize("mechanism", ["performer", "linear", "nystrom"])
@pytest.mark.parametrize("backend", [None, "triton"])
def test_a_model_on_the_meta_device_is_converted(mechanism, backend):
    """What it computes once it has memory equals a model that was converted there, for the same draw."""
    with torch.device("meta"):
        model = nn.Sequential(Attention(), Attention())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cxv_kernels.replace_attention(model, mechanism, backend=backend) == ["0", "1"]
    assert all(t.is_meta for t in (*model.parameters(), *model.buffers()))
    model.to_empty(device="cpu")
    expected = nn.Sequential(Attention(), Attention())
    model.load_state_dict(expected.state_dict(), strict=False)
    cxv_kernels.replace_attention(expected, mechanism)
    for converted, layer in zip(model, expected, strict=True):
        assert converted.backend == backend
        converted.backend = None
        for module in (converted, layer) if mechanism == "performer" else ():
            module.redraw_projection_(torch.Generator().manual_seed(0))
    x = torch.randn(2, 7, 32)
    torch.testing.assert_close(model(x), expected(x))


def test_the_meta_device_hides_no_mistake():
    with torch.device("meta"):
        model = nn.Sequential(NoAttention())
        with pytest.raises(ValueError, match=r"0 \(NoAttention\) is not softmax attention of its qkv"):
            cxv_kernels.replace_attention(model)
        model.append(Attention())
        for options in ({"num_features": 0}, {"kernel": "cosine"}, {"backend": "fast"}):
            with (
                pytest.raises(ValueError, match=f"{next(iter(options))} must be"),
                pytest.warns(UserWarning, match="skips these modules"),
            ):
                cxv_kernels.replace_attention(model, **options)


def test_redraw_projection_needs_random_features():
    model = nn.Sequential(Attention())
    cxv_kernels.replace_attention(model, "linear")
    with pytest.raises(ValueError, match="only 'performer' has random features, not 'linear'"):
        model[0].redraw_projection_()


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor", "ignore:torch.ao.quantization is deprecated")
@pytest.mark.parametrize("way", ["subclass", "dynamic quantization"])
def test_a_quantized_model_is_to_be_converted_first(way):
    model = nn.Sequential(Attention())
    if way == "subclass":
        quantize_linears(model)
    else:
        model = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    kind = "QuantizedTensor" if way == "subclass" else r"torch.ao.nn.quantized.dynamic.*Linear"
    with pytest.raises(ValueError, match=rf"0 \({kind}\) is quantized, .* replace the attention before that"):
        cxv_kernels.replace_attention(model)


@pytest.mark.parametrize("mechanism", ["performer", "linear", "nystrom"])
def test_a_converted_model_can_be_quantized(mechanism):
    model = nn.Sequential(Attention())
    cxv_kernels.replace_attention(model, mechanism)
    x = torch.randn(2, 7, 32)
    expected = model(x)
    assert (quantize_linears(model)(x) - expected).abs().max() < 0.1 * expected.abs().max()


# --- numbers ----------------------------------------------------------------------------------------------------------

NUMBERS = {
    "NumPy": lambda x: np.float32(x) if isinstance(x, float) else np.int64(x),
    "NumPy's doubles": lambda x: np.float64(x) if isinstance(x, float) else np.uint8(x),
    "arrays": np.array,
    "tensors": torch.tensor,
}
Q = torch.randn(1, 2, 12, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
W = cxv_kernels.orthogonal_projection(4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
IMAGE, KERNEL, CHANNELS = torch.ones(1, 2, 4, 4), torch.ones(3, 2, 3, 3), torch.ones(3)
SEED = torch.tensor(7)


def _dualopt(n):
    parameter = nn.Parameter(torch.ones(2))
    options = {"patience": n(1), "betas": (n(0.5), n(0.75)), "max_epochs": (n(1), n(1))}
    rates = {name: n(0.5) for name in ("lr", "eps", "weight_decay", "sgd_lr", "momentum")}
    groups = [{"params": parameter, "lr": n(0.25), "weight_decay": n(0.5)}]
    optimizer = cxv.DualOpT(groups, **options, **rates)
    while not optimizer.finished:
        parameter.grad = torch.ones(2)
        optimizer.step()
        optimizer.end_epoch(n(0.5))
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert {type(value) for value in optimizer.param_groups[0].values()} <= {list, float, int, bool, type(None)}
    return parameter.detach()


def _converted(n):
    model = nn.Sequential(Attention())
    cxv_kernels.replace_attention(model, num_features=n(5), eps=n(0.25))
    return model[0].extra_repr(), model[0].projection


def _state(model):
    return repr(model), [tuple(p.shape) for p in model.state_dict().values()]


def _model(cls, **options):
    """A model in numbers of another library, and after it changes its classifier."""

    def build(n):
        counts = {"img_size": (n(8), n(8)), "in_chans": n(1), "num_classes": n(3), "embed_dim": n(16), "depth": n(1)}
        rates = {"num_heads": n(2), "mlp_ratio": n(1.5), "drop_rate": n(0.25), "drop_path_rate": n(0.25)}
        model = cls(**counts, **rates, stem_stride=n(1), **{name: n(value) for name, value in options.items()})
        model.reset_classifier(n(4))
        out = model(torch.zeros(1, 1, 8, 8))
        if isinstance(model, cxv.CXV):
            model.forward_intermediates(torch.zeros(1, 1, 8, 8), indices=n(1))
        assert all(type(m.drop_rate) is float for m in model.modules() if hasattr(m, "drop_rate"))
        return _state(model), tuple(out.shape), model.num_classes

    return build


def _create_model(n):
    model = cxv.create_model("cpv-1/2", embed_dim=n(16), img_size=(n(8), n(8)), attn_eps=n(0.25), drop_rate=n(0.5))
    return _state(model), json.dumps(model.model_kwargs)


def _save_safetensors(n, tmp_path):
    model = cxv.create_model("cpv-1/2", embed_dim=n(16), num_classes=n(3))
    cxv.save_safetensors(model, tmp_path / "a.safetensors", seed=n(1), metrics={"test_top1": n(0.5)})
    return _state(cxv.create_model("cpv-1/2", checkpoint=tmp_path / "a.safetensors"))


def _load_data(n):
    data = load_data("digits", img_size=n(6), limit_train=n(30), limit_test=n(20), validation=n(10), seed=n(1))
    return data.train.images, data.test.labels, data.validation.labels


def _batches(n):
    data = load_data("digits", limit_train=7, limit_test=1)
    augment = RandAugment(n(2), n(9), seed=n(1))
    found = batches(data.train, n(3), augment=augment, epoch=n(1), skip=n(1))
    return [*found], augment.draws(n(4), n(0)), balanced_subset(data.train.labels, n(2), n(1))


def _evaluate(n):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    data = load_data("digits", limit_train=1, limit_test=7).test
    return evaluate(model, data, batch_size=n(3)), predict(model, data, batch_size=n(3))


def _export(n, tmp_path):
    done = export_model(nn.Flatten(), tmp_path / "a.pt2", "torch", img_size=(n(4), n(4)), in_chans=n(1))
    return load_exported(done.path, "torch", threads=n(1))(torch.ones(1, 1, 4, 4))


def _train_config(n):
    config = TrainConfig(epochs=n(3), lr=n(0.5), rand_augment=(n(1), n(2)), model_args={"attn_eps": n(0.5)})
    return json.dumps(asdict(resolve(config)[0]))


CALLS = {
    "linear_attention": lambda n: cxv_kernels.linear_attention(Q, Q, Q, "relu", eps=n(0.5)),
    "performer_attention": lambda n: cxv_kernels.performer_attention(Q, Q, Q, W, eps=n(0.5)),
    "performer_features": lambda n: cxv_kernels.performer_features(Q, W, True, eps=n(0.5)),
    "nystrom_attention": lambda n: cxv_kernels.nystrom_attention(Q, Q, Q, n(3)),
    "conv_norm": lambda n: cxv_kernels.conv_norm(IMAGE, KERNEL, None, CHANNELS, CHANNELS, n(0.5)),
    "dropout": lambda n: cxv_kernels.dropout(Q, n(0.5), SEED, offset=n(3)),
    "gelu_dropout": lambda n: cxv_kernels.gelu_dropout(Q, n(0.5), SEED, offset=n(3)),
    "dropout_mask": lambda n: cxv_kernels.dropout_mask(SEED, n(9), n(0.5), n(3)),
    "num_random_features": lambda n: cxv_kernels.num_random_features(n(8)),
    "orthogonal_projection": lambda n: cxv_kernels.orthogonal_projection(
        n(5), n(4), generator=torch.Generator().manual_seed(0)
    ),
    "explain_backend": lambda n: cxv_kernels.explain_backend("kv_state", dim=n(8)),
    "replace_attention": _converted,
    "CPV": _model(cxv.CPV, attn_eps=0.25, local_heads=1, local_window=4),
    "CNV": _model(cxv.CNV, num_landmarks=4, residual_conv_kernel=3),
    "CNVVariant": _model(CNVVariant, stem_convs=2, stem_padding=1, conv_every=1, norm_every=1),
    "CLTV": _model(cxv.CLTV, attn_kernel_size=3),
    "HybridViP": _model(cxv.HybridViP, attn_eps=0.25, head_dim=4),
    "HybridViN": _model(cxv.HybridViN, num_landmarks=4, residual_conv_kernel=3, head_dim=4),
    "HybridViLT": _model(cxv.HybridViLT, head_dim=4),
    "create_model": _create_model,
    "save_safetensors": _save_safetensors,
    "DualOpT": _dualopt,
    "TrainConfig": _train_config,
    "load_data": _load_data,
    "batches": _batches,
    "evaluate": _evaluate,
    "predict": _evaluate,
    "export_model": _export,
}


@pytest.mark.parametrize(
    ("name", "kind"), [*zip(CALLS, itertools.cycle(NUMBERS), strict=False), *((name, "tensors") for name in CALLS)]
)
def test_numbers_of_other_libraries_are_pythons(name, kind, tmp_path):
    """NumPy's numbers, and arrays and tensors without dimensions, give the results of Python's."""
    if name in ("load_data", "batches", "evaluate", "predict"):
        pytest.importorskip("sklearn")
    results = []
    for n in (lambda x: x, NUMBERS[kind]):
        torch.manual_seed(0)
        paths = [tmp_path] if "tmp_path" in inspect.signature(CALLS[name]).parameters else []
        results.append(CALLS[name](n, *paths))
    leaves = [tree_leaves(result) for result in results]
    for expected, got in zip(*leaves, strict=True):
        assert type(got) is type(expected)
        assert torch.equal(got, expected) if isinstance(got, torch.Tensor) else got == expected


def test_every_public_function_with_numbers_is_called():
    # CPV and the others call CXV, transformers is optional, train takes a TrainConfig and returns a TrainResult
    exempt = {"CXV", "register_with_transformers", "TrainResult", "train"}
    for module in (cxv, cxv_kernels, cxv.training):
        for name in module.__all__:
            function = getattr(module, name)
            if callable(function) and function is not InputError:
                annotations = [str(p.annotation) for p in inspect.signature(function).parameters.values()]
                takes_numbers = any("int" in text or "float" in text for text in annotations)
                assert not takes_numbers or name in CALLS.keys() | exempt, name


@pytest.mark.parametrize(
    "value", [True, np.True_, torch.tensor(True), 2.5, np.float32(2), "2", None, [2], torch.ones(1)]
)
def test_only_integers_are_counts(value):
    cases = {
        "num_landmarks": lambda: cxv_kernels.nystrom_attention(Q, Q, Q, value),
        "dim": lambda: cxv_kernels.num_random_features(value),
        "num_features": lambda: cxv_kernels.orthogonal_projection(value, 4),
        "offset": lambda: cxv_kernels.dropout(Q, 0.5, SEED, offset=value),
        "count": lambda: cxv_kernels.dropout_mask(SEED, value, 0.5),
    }
    for name, call in cases.items():
        with pytest.raises(TypeError, match=f"{name} must be an int, got {type(value).__name__}"):
            call()
    with pytest.raises(ValueError, match=r"depth must be an integer of at least 1, got "):
        cxv.CPV(depth=value)
    with pytest.raises(ValueError, match=r"img_size must be an integer of at least 1, or two \(H, W\), got "):
        cxv.CPV(img_size=value)
    with pytest.raises(InputError, match="patience: expected a whole number of epochs"):
        cxv.DualOpT([nn.Parameter(torch.ones(1))], patience=value)


@pytest.mark.parametrize("value", [True, np.True_, "2", 2.0])
def test_only_integers_are_counts_of_a_run(value):
    with pytest.raises(InputError, match="`epochs`: expected a whole number, got "):
        TrainConfig(epochs=value)
    with pytest.raises(InputError, match="`lr`: expected a number, got "):
        TrainConfig(lr=str(value) if value == 2 else value)
    with pytest.raises(InputError, match="`limit_train`: expected a whole number, at least 1, got "):
        load_data("digits", limit_train=value)


@pytest.mark.parametrize("value", [True, np.True_, "0.5", [0.5], torch.ones(1)])
def test_only_numbers_are_numbers(value):
    cases = {
        "eps": lambda: cxv_kernels.linear_attention(Q, Q, Q, eps=value),
        "p": lambda: cxv_kernels.dropout(Q, value, SEED),
    }
    for name, call in cases.items():
        with pytest.raises(TypeError, match=f"{name} must be a number, got {type(value).__name__}"):
            call()
    with pytest.raises(ValueError, match="drop_rate must be in"):
        cxv.CPV(drop_rate=value)
    with pytest.raises(ValueError, match="mlp_ratio must be a number"):
        cxv.CPV(mlp_ratio=value)


# --- tensors of other kinds -------------------------------------------------------------------------------------------


def _random(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


_HEADS = {name: _random(2, 2, 6, 4) for name in "qkv"}
_MASK = {"key_mask": torch.ones(2, 6, dtype=torch.bool)}
OPS = {
    "linear_attention": (cxv_kernels.linear_attention, _HEADS | _MASK),
    "kv_state": (cxv_kernels.kv_state, {name: _HEADS[name] for name in "kv"} | _MASK),
    "performer_attention": (cxv_kernels.performer_attention, _HEADS | {"projection": _random(5, 4)} | _MASK),
    "performer_features": (
        functools.partial(cxv_kernels.performer_features, is_query=True),
        {"x": _HEADS["q"], "projection": _random(5, 4)},
    ),
    "nystrom_attention": (
        functools.partial(cxv_kernels.nystrom_attention, num_landmarks=3),
        _HEADS | {"residual_weight": _random(2, 1, 3, 1)},
    ),
    "conv_norm": (
        cxv_kernels.conv_norm,
        {"x": _random(2, 3, 4, 4), "weight": _random(5, 3, 3, 3), **{n: _random(5) for n in ("bias", "gamma", "beta")}},
    ),
    "dropout": (
        functools.partial(cxv_kernels.dropout, p=0.5),
        {"x": _HEADS["q"], "residual": _HEADS["k"], "seed": torch.tensor([7])},
    ),
    "gelu_dropout": (functools.partial(cxv_kernels.gelu_dropout, p=0.5), {"x": _HEADS["q"], "seed": torch.tensor([7])}),
}
ARGUMENTS = [(op, name) for op, (_, tensors) in OPS.items() for name in tensors]
KINDS = {
    "nested": (lambda x: torch.nested.nested_tensor(list(x)), "{name} must not be a nested tensor: pad it .* key_mask"),
    "jagged": (
        lambda x: torch.nested.nested_tensor([x[0], x[1][:1]], layout=torch.jagged),
        "{name} must not be a nested tensor: pad it .* key_mask",
    ),
    "sparse": (torch.Tensor.to_sparse, "{name} must be a dense tensor, got layout torch.sparse_coo: .*to_dense"),
    "MKLDNN": (torch.Tensor.to_mkldnn, "{name} must be a dense tensor, got layout torch._mkldnn: .*to_dense"),
    "quantized": (
        lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8),
        "{name} must be float64, .* got torch.qint8",
    ),
    "complex": (lambda x: x.to(torch.complex64), "{name} must be float64, .* got torch.complex64"),
    "subclass": (
        QuantizedTensor.quantize,
        "{op} does not support {name} of class QuantizedTensor: pass plain tensors ",
    ),
}


def _kinds(op, name):
    x = OPS[op][1][name]
    return [
        kind
        for kind in KINDS
        if (x.is_floating_point() or kind in ("nested", "jagged", "sparse"))
        and (x.dim() >= 2 or kind not in ("nested", "jagged"))
    ]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize(("op", "name", "kind"), [(*a, kind) for a in ARGUMENTS for kind in _kinds(*a)])
def test_tensors_of_other_kinds_get_a_clear_error(op, name, kind, backend):
    """It names the argument and the remedy."""
    function, tensors = OPS[op]
    make, message = KINDS[kind]
    if kind in ("nested", "jagged") and tensors[name].shape[0] < 2:
        pytest.skip("one component")
    with pytest.raises(TypeError, match=message.format(op=op, name=name)):
        function(**tensors | {name: make(tensors[name])}, backend=backend)


class Named(torch.Tensor):
    """A subclass without a behavior of its own, as torchvision's images."""


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize(("op", "name"), ARGUMENTS)
def test_a_subclass_that_is_a_plain_tensor_gets_results(op, name, backend):
    function, tensors = OPS[op]
    expected = tree_leaves(function(**tensors, backend=backend))
    got = tree_leaves(function(**tensors | {name: tensors[name].as_subclass(Named)}, backend=backend))
    assert all(torch.equal(g.as_subclass(torch.Tensor), e) for g, e in zip(got, expected, strict=True))


@pytest.mark.parametrize("kind", ["meta", "fake"])
@pytest.mark.parametrize("op", OPS)
def test_tensors_without_values_get_shapes(op, kind):
    function, tensors = OPS[op]
    expected = tree_leaves(function(**tensors))
    if kind == "meta":
        got = function(**{name: t.to("meta") for name, t in tensors.items()})
    else:
        with torch._subclasses.FakeTensorMode() as mode:
            got = function(**{name: mode.from_tensor(t) for name, t in tensors.items()})
    assert [(t.shape, t.dtype) for t in tree_leaves(got)] == [(t.shape, t.dtype) for t in expected]


# What two processes do; in float64, with 3 images, which they share unevenly, and one head for each.
_SHARDED = """
import os, sys, torch, cxv_kernels
assert "torch.distributed.tensor" not in sys.modules and "torch._dynamo" not in sys.modules
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

def random(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

q, k, v, w, taps = random(3, 2, 5, 4), random(3, 2, 5, 4), random(3, 2, 5, 3), random(7, 4), random(2, 1, 3, 1)
mask = torch.arange(15).view(3, 5) % 4 > 0

def kv(k, v, key_mask):
    return torch.cat([t.flatten(2) for t in cxv_kernels.kv_state(k, v, key_mask=key_mask)], dim=2)

cases = {
    "linear_attention": (cxv_kernels.linear_attention, (q, k, v)),
    "with a mask": (lambda q, k, v, m: cxv_kernels.linear_attention(q, k, v, "elu", key_mask=m), (q, k, v, mask)),
    "kv_state": (kv, (k, v, mask)),
    "performer_attention": (cxv_kernels.performer_attention, (q, k, v, w)),
    "performer_features": (lambda x, w: cxv_kernels.performer_features(x, w, False), (k, w)),
    "nystrom_attention": (
        lambda q, k, v, taps: cxv_kernels.nystrom_attention(q, k, v, 3, residual_weight=taps), (q, k, v, taps)
    ),
}

def place(tensor, split):
    if tensor is w:
        return Replicate()
    if tensor is mask:
        return Shard(0) if split == Shard(0) else Replicate()
    if tensor is taps:
        return Shard(0) if split == Shard(1) else Replicate()
    return split

def results(op, tensors):
    out = op(*tensors)
    out.cos().sum().backward()
    return [out, *(t.grad for t in tensors if t.requires_grad)]

def work():
    for split in (Shard(0), Shard(1), Shard(2)):
        for name, (op, tensors) in cases.items():
            trained = [t.is_floating_point() and t is not w for t in tensors]
            whole = [t.clone().requires_grad_(grad) for t, grad in zip(tensors, trained)]
            parts = [distribute_tensor(t, mesh, [place(t, split)]).requires_grad_(g) for t, g in zip(tensors, trained)]
            out, *grads = results(op, parts)
            for got, want in zip([out, *grads], results(op, whole), strict=True):
                torch.testing.assert_close(got.full_tensor(), want)
            # tokens see one another, so that what is split by tokens is gathered
            assert out.placements == (Replicate() if split == Shard(2) else split,), (name, split, out.placements)
    x, seed = distribute_tensor(q, mesh, [Shard(0)]), torch.tensor(7)
    image, weight, channels = random(2, 3, 4, 4), random(5, 3, 3, 3), random(5)
    image = distribute_tensor(image, mesh, [Shard(0)])
    errors = {
        "dropout": (lambda: cxv_kernels.dropout(x, 0.5, seed), "x"),
        "gelu_dropout": (lambda: cxv_kernels.gelu_dropout(x, 0.5, seed), "x"),
        "conv_norm": (lambda: cxv_kernels.conv_norm(image, weight, None, channels, channels), "x"),
        "performer_attention": (lambda: cxv_kernels.performer_attention(x, x, x, w), "q"),
    }
    for name, (call, argument) in errors.items():
        try:
            call()
        except TypeError as error:
            remedy = f"{name} does not support {argument} of class DTensor: pass {argument}.to_local() ("
            assert str(error).startswith(remedy), error
        else:
            raise AssertionError(name)

pids = []
for rank in range(2):
    pids.append(os.fork())
    if pids[-1] == 0:
        torch.set_num_threads(1)
        dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=rank, world_size=2)
        mesh = init_device_mesh("cpu", (2,))
        code = 1
        try:
            work()
            code = 0
        except BaseException:
            import traceback
            traceback.print_exc()
        sys.stderr.flush()
        os._exit(code)
sys.exit(max(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids))
"""


@needs_cpp
@pytest.mark.skipif(sys.platform != "linux" or not torch.distributed.is_available(), reason="forks two processes")
def test_attention_is_sharded_over_batch_and_heads(tmp_path):
    """Two processes with DTensors give the outputs and gradients of one; other ops and mixtures raise a clear error."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-W", "ignore", "-c", _SHARDED, str(tmp_path / "store")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr


# --- threads ----------------------------------------------------------------------------------------------------------


def test_a_setting_belongs_to_its_thread_and_task():
    with cxv_kernels.use_backend("reference"):
        assert in_thread(cxv_kernels.get_backend) == "auto"

        async def task():
            before = cxv_kernels.get_backend()
            with cxv_kernels.use_backend("cpu"):
                await asyncio.sleep(0)
                return before, cxv_kernels.get_backend(), await asyncio.to_thread(cxv_kernels.get_backend)

        async def tasks():
            return await asyncio.gather(task(), task()), cxv_kernels.get_backend()

        assert asyncio.run(tasks()) == ([("reference", "cpu", "cpu")] * 2, "reference")
    assert cxv_kernels.get_backend() == "auto"


def test_use_backend_decorates_a_function():
    @cxv_kernels.use_backend("reference")
    def inner():
        return cxv_kernels.get_backend()

    assert (inner(), cxv_kernels.get_backend()) == ("reference", "auto")


def _inside(q):
    with cxv_kernels.use_backend("reference"):
        return cxv_kernels.linear_attention(q, q + 1, q + 2)


def _outside(q):
    return cxv_kernels.linear_attention(q, q + 1, q + 2)


@pytest.mark.parametrize("reads", [True, False], ids=["this-dynamo", "dynamo-without-contextvars"])
@pytest.mark.parametrize("function", [_outside, _inside], ids=["block-outside", "block-inside"])
def test_compiled_code_follows_the_setting(function, reads, monkeypatch):
    """It is compiled once for each backend, without a break, and a block inside it ends with it."""
    if not reads:
        monkeypatch.setattr(cxv_kernels.dispatch, "_DYNAMO_READS_CONTEXTVARS", False)
    elif not cxv_kernels.dispatch._DYNAMO_READS_CONTEXTVARS:
        pytest.skip("before PyTorch 2.14")
    torch._dynamo.reset()
    graphs = []

    def count(graph, _):
        graphs.append(str(graph.code))
        return graph

    compiled = torch.compile(function, fullgraph=True, backend=count)
    q = torch.randn(1, 2, 8, 4, dtype=torch.float64)
    expected = function(q)
    torch.testing.assert_close(compiled(q), expected)
    with cxv_kernels.use_backend("reference"):
        torch.testing.assert_close(compiled(q), expected)
        torch.testing.assert_close(compiled(q), expected)
    torch.testing.assert_close(compiled(q), expected)
    fused = cxv_kernels.explain_backend("linear_attention")["auto"] == "cpu"
    assert len(graphs) == (2 if function is _outside else 1)
    assert ["linear_attention_forward" in graph for graph in graphs] == [fused, False][-len(graphs) :]
    assert cxv_kernels.get_backend() == "auto"


def test_a_signal_is_the_main_threads():
    """Other threads neither take a signal that waits for the main thread nor lose it."""

    def evaluate():
        with interrupt.deferred_interrupts():
            return list(interrupt.interruptible(range(3)))

    seen = []

    @interrupt.deferred_interrupts()
    def train():
        signal.raise_signal(signal.SIGINT)
        seen.extend(in_thread(evaluate))
        evaluate()

    with pytest.raises(interrupt.Interrupted):
        train()
    assert seen == [0, 1, 2]
