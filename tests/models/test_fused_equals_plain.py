"""A model with use_fused=True against the plain one: outputs, gradients, side effects and errors."""

import copy
import io
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

import cxv
import cxv_kernels
from cxv.models.blocks import Mlp, ResidualBranch
from cxv.models.variants import variant_of

SIDE = 8
SHARED = {
    "batch-norm": {"norm": "batch"},
    "learned-positions": {"positions": "learned"},
    "rotary-positions": {"positions": "rotary"},
    "pre-norm": {"pre_norm": True},
    "gelu": {"conv_act": True, "stem_act": True, "stem_pool": True},
    "conv-residual": {"conv_residual": "conv"},
    "conv-norm-residual": {"conv_residual": "conv_norm", "depth": 2},
    "every-other-layer": {"conv_every": 2, "norm_every": 2, "depth": 3},
    "small-stem": {"stem_convs": 1, "stem_padding": 0, "stem_stride": 2},
}
OWN = {
    cxv.CPV: {
        "default": {"depth": 2},
        "no-dropout": {"drop_rate": 0.0},
        "relu": {"attn_kernel": "relu"},
        "no-eps": {"attn_eps": 0.0},
        "batch-stabilizer": {"stabilizer": "batch", "depth": 2},
        "local-heads": {"local_heads": 1, "local_window": 8},
    },
    cxv.CNV: {"default": {"depth": 2}, "few-landmarks": {"num_landmarks": 5}, "front-pad": {"front_pad": True}},
    cxv.CLTV: {
        "default": {"depth": 2},
        "elu": {"feature_map": "elu"},
        "relu": {"feature_map": "relu"},
        "3x3": {"attn_kernel_size": 3},
    },
    cxv.HybridViP: {
        "default": {},
        "odd-heads": {"num_heads": 3, "head_dim": 5},
        "relu": {"attn_kernel": "relu"},
        "batch-stabilizer": {"stabilizer": "batch"},
    },
    cxv.HybridViN: {"default": {"num_landmarks": 16}},
    cxv.HybridViLT: {"default": {}, "elu": {"feature_map": "elu"}},
}
DROP_PATH = {"drop-path": {"drop_path_rate": 0.5, "depth": 3}}
CASES = [
    pytest.param(model, options, id=f"{model.__name__}-{name}")
    for model, own in OWN.items()
    for name, options in (own | DROP_PATH | (SHARED if issubclass(model, cxv.CXV) else {})).items()
]
CXV_MODELS = pytest.mark.parametrize("kind", [cxv.CPV, cxv.CNV, cxv.CLTV], ids=lambda kind: kind.__name__)
CHECKPOINTING = pytest.mark.parametrize("checkpointing", [False, True], ids=["stored", "checkpointed"])


@pytest.fixture(autouse=True)
def _chunks_of_two_images(monkeypatch):
    monkeypatch.setattr("cxv.models.blocks.CHUNK_TOKENS", 2 * (SIDE * SIDE + 1))


def build(kind, use_fused: bool, checkpointing: bool = False, **options) -> nn.Module:
    """A model in float64 whose weights are a function of its options."""
    torch.manual_seed(1)
    defaults = {"embed_dim": 16, "num_classes": 3, "img_size": SIDE, "depth": 1}
    if issubclass(kind, cxv.CXV):
        defaults["num_heads"] = 2
    else:
        defaults |= {"num_heads": 2, "head_dim": 8}
    model = variant_of(kind, options)(**defaults | options, use_fused=use_fused).double()
    if checkpointing:
        model.set_grad_checkpointing()
    return model


def images(batch: int) -> Tensor:
    return torch.randn(batch, 3, SIDE, SIDE, dtype=torch.float64, generator=torch.Generator().manual_seed(batch))


def gradients(model: nn.Module, y: Tensor, retain_graph: bool = False) -> list[Tensor]:
    weights = [p for p in model.parameters() if p.requires_grad]
    return list(torch.autograd.grad((y * y.detach().cos()).sum(), weights, retain_graph=retain_graph))


def step(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """All that a training step gives and leaves, from one seed."""
    torch.manual_seed(2)
    x = x.clone().requires_grad_()
    y = model(x)
    (y * y.detach().cos()).sum().backward()
    found = {"output": y.detach(), "gradient of the input": x.grad}
    found |= {f"gradient of {name}": p.grad for name, p in model.named_parameters()}
    found |= {f"buffer {name}": b.clone() for name, b in model.named_buffers()}
    return found | {"random state": torch.get_rng_state()}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Within 1e-12 of the largest gradient, or of the largest element of another tensor."""
    assert found.keys() == expected.keys()
    largest = max(
        (t.abs().max().item() for k, t in expected.items() if k.startswith("gradient") and t.numel()), default=0
    )
    for name, t in expected.items():
        if not t.is_floating_point():
            assert torch.equal(found[name], t), name
        elif t.numel():
            scale = largest if name.startswith("gradient") else t.abs().max().item()
            assert (found[name] - t).abs().max().item() <= 1e-12 * scale, name


@pytest.mark.parametrize(("kind", "options"), CASES)
def test_training_step_equals_plain(kind, options):
    """One full chunk, and three, the last one not full; checkpointed where the model can be."""
    for batch in (2, 5):
        expected = step(build(kind, False, **options).train(), images(batch))
        for checkpointing in (False, True)[: 1 + issubclass(kind, cxv.CXV)]:
            assert_equal(step(build(kind, True, checkpointing, **options).train(), images(batch)), expected)


@pytest.mark.parametrize(("kind", "options"), CASES)
def test_inference_equals_plain(kind, options):
    plain, fused = (build(kind, use_fused, **options).eval() for use_fused in (False, True))
    for context in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        for batch in (0, 1, 3, 4):
            with context():
                expected, found = plain(images(batch)), fused(images(batch))
            assert found.shape == expected.shape
            assert_equal({"output": found}, {"output": expected})
    with torch.no_grad():  # training mode without gradients, as for BatchNorm's recalibration
        expected, found = (run_in_training(model, images(5)) for model in (plain, fused))
    assert_equal(found, expected)


def run_in_training(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    torch.manual_seed(3)
    found = {"output": model.train()(x)}
    return found | {f"buffer {name}": b for name, b in model.named_buffers()} | {"random state": torch.get_rng_state()}


class Centered(ResidualBranch):
    """A branch that subtracts the batch's mean."""

    couples_images = True

    def forward_chunk(self, x, dropout):
        return dropout(x - x.mean(), residual=x)


def test_coupled_images_run_as_one_batch():
    """A custom branch that couples images sees the whole batch, with and without gradients."""
    x = torch.randn(5, 16, SIDE, SIDE, dtype=torch.float64, requires_grad=True)
    plain, fused = Centered(16, use_fused=False), Centered(16, use_fused=True)
    torch.testing.assert_close(fused(x), plain(x), rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(fused(x), plain(x), rtol=1e-12, atol=1e-12)
    found, expected = (torch.autograd.grad(m(x).square().sum(), x)[0] for m in (fused, plain))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("names", [("reference", "auto"), ("auto", "reference")], ids=" then ".join)
@CHECKPOINTING
@CXV_MODELS
def test_backward_uses_the_backend_of_forward(kind, checkpointing, names):
    """Backward runs after the block, twice, and gives the bits of a step that is inside the block as a whole."""
    model, x = build(kind, True, checkpointing).train(), images(5)

    def forward() -> Tensor:
        torch.manual_seed(4)
        return model(x)

    with cxv_kernels.use_backend(names[0]):
        expected = gradients(model, forward())
        y = forward()
    with cxv_kernels.use_backend(names[1]):
        for retain_graph in (True, False):
            assert all(map(torch.equal, gradients(model, y, retain_graph), expected))
        assert cxv_kernels.get_backend() == names[1]


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_bound_function_keeps_its_backend_in_a_checkpoint(use_reentrant):
    q = torch.randn(2, 2, 30, 8, dtype=torch.float64, requires_grad=True)
    attention = lambda q: cxv_kernels.linear_attention(q, q, q)  # noqa: E731
    with cxv_kernels.use_backend("reference"):
        (expected,) = torch.autograd.grad(attention(q).sin().sum(), q)
        y = checkpoint(cxv_kernels.bind_backend(attention), q, use_reentrant=use_reentrant)
    y.sin().sum().backward()
    assert torch.equal(q.grad, expected)


def change_weights(model: nn.Module) -> None:
    torch.optim.SGD(model.parameters(), lr=0.1).step()


def change_projection(model: nn.Module) -> None:
    model.layers[0].attn.redraw_projection_()


def change_one_weight(model: nn.Module) -> None:
    with torch.no_grad():
        model.layers[0].mlp.fc2.weight.mul_(2)


@pytest.mark.parametrize("change", [change_weights, change_projection, change_one_weight], ids=lambda c: c.__name__)
@pytest.mark.parametrize("mode", ["plain", "fused", "checkpointed", "plain-checkpointed"])
def test_changed_weights_raise_in_backward(mode, change):
    """As PyTorch raises of a plain model: a recomputation would silently give the gradients of other weights."""
    model = build(cxv.CPV, mode in ("fused", "checkpointed"), "checkpointed" in mode).train()
    model(images(3)).sum().backward()
    y = model(images(3))
    change(model)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    model(images(3)).sum().backward()  # and the model is as good as before


def evaluate(model: nn.Module) -> None:
    model.eval()


def stop_dropout(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, ResidualBranch):
            module.drop_rate = 0.25


def replace_layers(model: nn.Module) -> None:
    for layer in model.layers:
        layer.mlp.fc1 = copy.deepcopy(layer.mlp.fc1)
        nn.init.zeros_(layer.mlp.fc1.weight)


def replace_weights(model: nn.Module) -> None:
    for module in model.modules():
        for name, p in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(torch.zeros_like(p)))


@pytest.mark.parametrize("change", [evaluate, stop_dropout, replace_layers, replace_weights], ids=lambda c: c.__name__)
@pytest.mark.parametrize("norm", ["layer", "batch"])
@CHECKPOINTING
@CXV_MODELS
def test_changes_after_forward_do_not_reach_backward(kind, checkpointing, norm, change):
    results = []
    for use_fused in (False, True):
        model = build(kind, use_fused, use_fused and checkpointing, norm=norm).train()
        if checkpointing and change is stop_dropout:
            pytest.skip("set_grad_checkpointing reads the rate of dropout again")
        weights = list(model.parameters())
        torch.manual_seed(4)
        y = model(images(5))
        change(model)
        state = {name: (id(m), m.training) for name, m in model.named_modules()}
        results.append(torch.autograd.grad(y.sin().sum(), weights))
        assert state == {name: (id(m), m.training) for name, m in model.named_modules()}
    names = [f"gradient {i}" for i in range(len(weights))]
    assert_equal(*(dict(zip(names, grads, strict=True)) for grads in reversed(results)))


@CHECKPOINTING
@CXV_MODELS
def test_frozen_and_thawed_weights(kind, checkpointing):
    """As in a GAN, whose discriminator is frozen and thawed: requires_grad_() between forward and backward."""
    results = []
    for use_fused in (False, True):
        model = build(kind, use_fused, use_fused and checkpointing).train()
        model.layers.requires_grad_(False)
        x = images(5).requires_grad_()
        torch.manual_seed(4)
        y = model(x)
        model.layers.requires_grad_(True)
        results.append({"gradient": torch.autograd.grad(y.sin().sum(), x)[0]})
        torch.manual_seed(4)
        y = model(x)
        model.layers.requires_grad_(False)
        results[-1]["gradient, frozen"] = torch.autograd.grad(y.sin().sum(), x)[0]
        assert not any(p.requires_grad or p.grad is not None for p in model.layers.parameters())
    assert_equal(results[1], results[0])


@pytest.mark.parametrize("leaf", [True, False], ids=["parameters", "computed"])
@CHECKPOINTING
@CXV_MODELS
def test_functional_call(kind, checkpointing, leaf):
    """The weights of torch.func.functional_call are those of the recomputation, also when they are computed."""
    results = []
    for use_fused in (False, True):
        model = build(kind, use_fused, use_fused and checkpointing).train()
        lent = {name: nn.Parameter(2 * p.detach()) for name, p in model.named_parameters()}
        given = lent if leaf else {name: 1.5 * p for name, p in lent.items()}
        torch.manual_seed(4)
        y = torch.func.functional_call(model, given, (images(5),))
        grads = torch.autograd.grad(y.sin().sum(), list(lent.values()))
        results.append({f"gradient of {name}": g for name, g in zip(lent, grads, strict=True)})
    assert_equal(results[1], results[0])


def test_second_derivative():
    x, results = images(3), []
    for use_fused in (False, True):
        model = build(cxv.CPV, use_fused).eval()
        first = torch.autograd.grad(model(x).sin().sum(), model.layers.parameters(), create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), model.layers.parameters(), allow_unused=True)
        results.append({f"gradient {i}": g for i, g in enumerate(second) if g is not None})
    assert_equal(results[1], results[0])


class Counter(nn.Module):
    """Counts its calls, and multiplies by noise."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * torch.rand_like(x)


def add_counters(model: nn.Module) -> None:
    for layer in model.layers:
        layer.mlp.fc1 = nn.Sequential(layer.mlp.fc1, Counter())
        layer.conv_norm.norm = nn.Sequential(nn.BatchNorm2d(16).double(), Counter())


def normalize_spectrum(model: nn.Module) -> None:
    for layer in model.layers:
        nn.utils.parametrizations.spectral_norm(layer.mlp.fc1)
        nn.utils.parametrizations.spectral_norm(layer.conv_norm.conv)
        nn.utils.parametrizations.weight_norm(layer.attn.proj)


@pytest.mark.parametrize("change", [add_counters, normalize_spectrum], ids=lambda c: c.__name__)
@pytest.mark.parametrize("mode", ["fused", "checkpointed", "plain-checkpointed"])
@CXV_MODELS
def test_side_effects_happen_once(kind, mode, change):
    """Running statistics, counters, power iterations and random numbers: one step, also if a layer is recomputed."""
    results = []
    for use_fused, checkpointing in ((False, False), ("plain" not in mode, "checkpointed" in mode)):
        model = build(kind, use_fused, checkpointing, depth=2).train()
        torch.manual_seed(1)
        change(model)
        results.append(step(model, images(5)))
    assert_equal(results[1], results[0])


@pytest.mark.parametrize("kind", OWN, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("grad", [False, True], ids=["no-grad", "grad"])
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*TorchScript.*")
def test_torchscript_trace_is_of_any_batch_size(kind, grad):
    """Traced with two chunks, run with eight, and with one after a round trip through a file."""
    model, file = build(kind, True).eval(), io.BytesIO()
    with torch.set_grad_enabled(grad):
        traced, plain = (torch.jit.trace(m, images(4)) for m in (model, build(kind, False).eval()))
        torch.testing.assert_close(traced(images(16)), model(images(16)), rtol=1e-7, atol=1e-8)
        torch.jit.save(traced, file)
        file.seek(0)
        for batch in (1, 16):  # PyTorch's traces have constants in float32
            assert_equal({"output": torch.jit.load(file)(images(batch))}, {"output": plain(images(batch))})
            file.seek(0)


@pytest.mark.parametrize("grad", [False, True], ids=["no-grad", "grad"])
@CHECKPOINTING
def test_make_fx_records_the_whole_batch(checkpointing, grad):
    """Nothing of the chunks is in the graph, which is for the traced batch size, as a plain model's is."""
    model = build(cxv.CPV, True, checkpointing).eval()
    with torch.set_grad_enabled(grad):
        graph = make_fx(model)(images(5))
        assert_equal({"output": graph(images(5))}, {"output": model(images(5))})
    assert not [node for node in graph.graph.nodes if "split.Tensor" in str(node.target) or "slice" in str(node.target)]
    with pytest.raises(RuntimeError, match="shape"):
        graph(images(16))


@pytest.mark.filterwarnings("ignore:.*performance drop.*")
@CHECKPOINTING
@CXV_MODELS
def test_function_transforms(kind, checkpointing):
    """torch.func.grad of the kernels, vmap of the references, and saved-tensor hooks that are not allowed."""
    model, plain = build(kind, True, checkpointing).eval(), build(kind, False).eval()
    weights, x = {name: p.detach() for name, p in model.named_parameters()}, images(3)

    def loss(model: nn.Module, weights: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(model, weights, (x,)).sin().sum()

    def named(grads: dict[str, Tensor]) -> dict[str, Tensor]:
        return {f"gradient of {name}": g for name, g in grads.items()}

    expected = named(torch.func.grad(partial(loss, plain))(weights, x))
    assert_equal(named(torch.func.grad(partial(loss, model))(weights, x)), expected)
    with torch.autograd.graph.disable_saved_tensors_hooks("not here"):
        found = torch.autograd.grad(model(x).sin().sum(), list(model.parameters()))
    assert_equal(dict(zip(expected, found, strict=True)), expected)
    with cxv_kernels.use_backend("reference"):
        found = torch.func.vmap(torch.func.grad(partial(loss, model)), (None, 0))(weights, x[:, None])
    assert_equal({name: g.sum(0) for name, g in named(found).items()}, expected)


class Keeper(nn.Module):
    """Returns its input, and keeps it."""

    def forward(self, x: Tensor) -> Tensor:
        self.kept, self.copy = x, x.clone()
        return x


@pytest.mark.parametrize("name", ["norm", "conv"])
def test_inference_writes_over_no_tensor_of_others(name):
    """A module of a user's may keep what it returns, or return what it was given."""
    model = build(cxv.CPV, True, depth=2).eval()
    layer = model.layers[1]
    layer.conv_norm.norm = nn.Identity()
    setattr(layer.conv_norm, name, Keeper())
    with torch.no_grad():
        _, features = model.forward_intermediates(images(5), [0, 1])
        expected, _ = model.eval()._run_layers(images(5), 1, ())
    keeper = getattr(layer.conv_norm, name)
    assert torch.equal(keeper.kept, keeper.copy)
    assert_equal({"output": features[0]}, {"output": expected})


@pytest.mark.parametrize("batch", [1, 4, 5])
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no-grad"])
@CXV_MODELS
def test_memory_layout_equals_plain(kind, grad, batch):
    """A chunk of one image leaves the result channels_last."""
    with torch.set_grad_enabled(grad):
        expected, found = (build(kind, f).forward_features(images(batch)).stride() for f in (False, True))
    assert found == expected


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("inplace", [False, True])
def test_dtype_under_autocast(training, inplace):
    """A branch gives the dtype of the plain one, with and without gradients, if autocast changes it."""
    x = torch.randn(5, 16, SIDE, SIDE)
    for grad in (True, False):
        dtypes = []
        for use_fused in (False, True):
            branch = Mlp(16, 32, 0.5, use_fused).train(training)
            with torch.set_grad_enabled(grad), torch.autocast("cpu", torch.bfloat16):
                dtypes.append(branch(x.clone(), inplace).dtype)
        assert dtypes[0] == dtypes[1]


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no-grad"])
def test_strided_inputs_and_subclasses(grad):
    class Tagged(Tensor):
        pass

    x = torch.randn(6, SIDE, 32, SIDE, dtype=torch.float64)
    plain, fused = build(cxv.CPV, False).layers[0].mlp.eval(), build(cxv.CPV, True).layers[0].mlp.eval()
    inputs = {
        "every other channel": x.transpose(1, 2)[:, ::2],
        "every other image": x.transpose(1, 2)[::2, :16],
        "one image for all": x.transpose(1, 2)[:1, :16].expand(5, -1, -1, -1),
        "subclass": x.transpose(1, 2)[:, :16].as_subclass(Tagged),
    }
    with torch.set_grad_enabled(grad):
        for name, t in inputs.items():
            expected, found = plain(t), fused(t)
            assert type(found) is type(expected), name
            assert_equal({name: found}, {name: expected})
