"""Our models in the released code's form, against plain modules written from the description of that code.

The modules keep the released parameter names, so the conversion in docs/evidence/released_code.md is tested too.
"""

import math
import re
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from models_support import create_or_skip
from torch import Tensor, nn

import cxv
from cxv.models.variants import StdLayerNorm

PAGE = Path(__file__).parents[2] / "docs" / "evidence" / "released_code.md"
FORMS = {  # family → the released form of our model
    "cpv": {"stabilizer": "batch", "norm": "layer_std"},
    "cnv": {"pinv_init": "batch", "num_landmarks": 16, "norm": "layer_std"},
    "cltv": {"attn_kernel_size": 3, "norm": "layer_std"},
    "hybrid-vip": {"stabilizer": "batch", "head_dim": 12},
    "hybrid-vin": {"pinv_init": "batch", "num_landmarks": 16, "head_dim": 12},
}


class ReleasedNorm(nn.Module):
    """Normalization over the channels of a pixel; eps is added to the standard deviation."""

    def __init__(self, dim: int):
        super().__init__()
        self.g = nn.Parameter(torch.ones(1, dim, 1, 1))
        self.b = nn.Parameter(torch.zeros(1, dim, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        centered = x - x.mean(dim=1, keepdim=True)
        return centered / (centered.square().mean(dim=1, keepdim=True).sqrt() + 1e-5) * self.g + self.b


class ReleasedAttention(nn.Module):
    """Attention of pixels (B, C, H, W), as tokens in raster order, or of tokens (B, N, C); without dropout."""

    def __init__(self, dim: int, heads: int, width: int):
        super().__init__()
        self.heads = heads

    def split(self, tokens: Tensor) -> Tensor:
        return tokens.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.attend(x) if x.dim() == 3 else self.attend(x.flatten(2).mT).mT.reshape(x.shape)


class ReleasedPerformer(ReleasedAttention):
    """FAVOR+ with one key maximum for the whole batch; autograd sees both maxima."""

    def __init__(self, dim: int, heads: int, width: int):
        super().__init__(dim, heads, width)
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, heads * width) for _ in range(3))
        self.to_out = nn.Linear(heads * width, dim)
        self.fast_attention = nn.Module()
        self.fast_attention.register_buffer("projection_matrix", torch.randn(int(width * math.log(width)), width))

    def attend(self, tokens: Tensor) -> Tensor:
        w = self.fast_attention.projection_matrix
        q, k, v = (self.split(to(tokens)) for to in (self.to_q, self.to_k, self.to_v))

        def features(x: Tensor, is_query: bool) -> Tensor:
            z = x.shape[-1] ** -0.25 * x @ w.T
            half_norm = x.square().sum(dim=-1, keepdim=True) / 2 * x.shape[-1] ** -0.5
            largest = z.max(dim=-1, keepdim=True).values if is_query else z.max()
            return len(w) ** -0.5 * ((z - half_norm - largest).exp() + 1e-4)

        phi_q, phi_k = features(q, True), features(k, False)
        weight = 1 / (phi_q * phi_k.sum(dim=2, keepdim=True)).sum(dim=-1, keepdim=True)
        out = phi_q @ (phi_k.mT @ v) * weight
        return self.to_out(out.transpose(1, 2).flatten(2))


class ReleasedNystrom(ReleasedAttention):
    """Nyström attention with 16 landmarks, zeros before the tokens, and pseudo-inverses that start from one scale."""

    def __init__(self, dim: int, heads: int, width: int):
        super().__init__(dim, heads, width)
        self.to_qkv = nn.Linear(dim, 3 * heads * width, bias=False)
        self.to_out = nn.Sequential(nn.Linear(heads * width, dim), nn.Dropout(0))
        self.res_conv = nn.Conv2d(heads, heads, (33, 1), padding=(16, 0), groups=heads, bias=False)

    def attend(self, tokens: Tensor) -> Tensor:
        padded = F.pad(tokens, (0, 0, -tokens.shape[1] % 16, 0))
        q, k, v = map(self.split, self.to_qkv(padded).chunk(3, dim=-1))
        q = q * q.shape[-1] ** -0.5
        q_means, k_means = (x.unflatten(2, (16, -1)).sum(dim=3) / (x.shape[2] // 16) for x in (q, k))
        first, inner, last = ((a @ b.mT).softmax(dim=-1) for a, b in ((q, k_means), (q_means, k_means), (q_means, k)))
        z = inner.mT / (inner.abs().sum(dim=-1).max() * inner.abs().sum(dim=-2).max())
        identity = torch.eye(16, dtype=z.dtype)
        for _ in range(6):
            product = inner @ z
            z = 0.25 * z @ (13 * identity - product @ (15 * identity - product @ (7 * identity - product)))
        out = (first @ z) @ (last @ v) + self.res_conv(v)
        return self.to_out(out.transpose(1, 2).flatten(2))[:, -tokens.shape[1] :]


class ReleasedLinear(ReleasedAttention):
    """Linear attention of 3×3 convolutions: softmax of k over the pixels, of q over a head's channels."""

    def __init__(self, dim: int, heads: int, width: int):
        super().__init__(dim, heads, width)
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Conv2d(dim, dim, 3, padding=1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (to(x).flatten(2).unflatten(1, (self.heads, -1)) for to in (self.to_q, self.to_k, self.to_v))
        q, k = ((t * t.shape[2] ** -0.25).softmax(dim=dim) for t, dim in ((q, 2), (k, 3)))
        return self.to_out(((k @ v.mT).mT @ q).reshape(x.shape))


class ReleasedMlp(nn.Module):
    """Of pixels, by 1×1 convolutions, or of tokens, by linear layers."""

    def __init__(self, dim: int, of_tokens: bool = False):
        super().__init__()
        widen, narrow = (
            nn.Linear(*widths) if of_tokens else nn.Conv2d(*widths, 1) for widths in ((dim, 2 * dim), (2 * dim, dim))
        )
        self.net = nn.Sequential(widen, nn.GELU(), nn.Dropout(0), narrow, nn.Dropout(0))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class ReleasedTransformer(nn.Module):
    """One attention and one MLP, each with a residual connection."""

    def __init__(self, attention: type, dim: int, heads: int):
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleList([attention(dim, heads, dim // heads), ReleasedMlp(dim)])])

    def forward(self, x: Tensor) -> Tensor:
        ((attention, mlp),) = self.layers
        x = attention(x) + x
        return mlp(x) + x


class Released(nn.Module):
    """Two stem convolutions; layers of 3×3 convolution, norm and transformer; average pooling; one linear layer."""

    def __init__(self, attention: type, dim: int = 16, heads: int = 2, depth: int = 2, classes: int = 4):
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(3, dim // 4, 3, 1, 1), nn.Conv2d(dim // 4, dim // 2, 3, 1, 1))
        self.layers = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(dim if i else dim // 2, dim, 3, padding=1),
                ReleasedNorm(dim),
                ReleasedTransformer(attention, dim, heads),
            )
            for i in range(depth)
        )
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(dim, classes))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


class PreNorm(nn.Module):
    def __init__(self, dim: int, fn: nn.Module):
        super().__init__()
        self.norm, self.fn = nn.LayerNorm(dim), fn

    def forward(self, x: Tensor) -> Tensor:
        return self.fn(self.norm(x))


class ReleasedHybrid(nn.Module):
    """Three stem convolutions, a class token and positions, pre-norm layers, norm and linear layer on the token."""

    def __init__(self, attention: type, dim: int = 16, heads: int = 2, depth: int = 2, classes: int = 4):
        super().__init__()
        widths = (3, dim // 4, dim // 2, dim)
        self.to_patch_embedding = nn.Sequential(*(nn.Conv2d(*widths[i : i + 2], 3, 1, 1) for i in range(3)))
        self.pos_embedding = nn.Parameter(torch.randn(1, 65, dim))
        self.cls_token = nn.Parameter(torch.randn(1, 1, dim))
        self.transformer = nn.Module()
        self.transformer.layers = nn.ModuleList(
            nn.ModuleList([PreNorm(dim, attention(dim, heads, 12)), PreNorm(dim, ReleasedMlp(dim, of_tokens=True))])
            for _ in range(depth)
        )
        self.mlp_head = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, classes))

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.to_patch_embedding(x).flatten(2).mT
        x = torch.cat((self.cls_token.expand(len(x), -1, -1), tokens), dim=1) + self.pos_embedding
        for attention, mlp in self.transformer.layers:
            x = attention(x) + x
            x = mlp(x) + x
        return self.mlp_head(x[:, 0])


ATTENTIONS = (cxv.models.attention.PerformerAttention, cxv.models.attention.NystromAttention)
RELEASED = {
    "cpv": partial(Released, ReleasedPerformer),
    "cnv": partial(Released, ReleasedNystrom),
    "cltv": partial(Released, ReleasedLinear),
    "hybrid-vip": partial(ReleasedHybrid, ReleasedPerformer),
    "hybrid-vin": partial(ReleasedHybrid, ReleasedNystrom),
}


@pytest.fixture(scope="module")
def from_released():
    """The conversion of a state_dict that the documentation shows."""
    names: dict = {}
    (block,) = (b for b in re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.S | re.M) if "def " in b)
    exec(compile(block, str(PAGE), "exec"), names)
    return names["from_released"]


def make_ours(name: str, **options) -> nn.Module:
    """Our model in the size of the released ones here, without dropout."""
    return cxv.create_model(f"{name}-2/2", embed_dim=16, img_size=8, num_classes=4, drop_rate=0.0, **options).double()


def words(value: str | dict | bool) -> str:
    """A parameter in a test's id."""
    if isinstance(value, dict):
        return "-".join(f"{k}={v}" for k, v in value.items()) or "default"
    return value if isinstance(value, str) else "coupled" if value else "independent"


@torch.no_grad()
def sharpen(model: nn.Module) -> None:
    """Enlarge the weights of the maps, so that attention is far from uniform, as in a trained model."""
    for p in model.parameters():
        p.mul_(3 if p.dim() > 1 and p.shape[0] > 1 else 1)


def steps(model: nn.Module, count: int) -> Tensor:
    """The losses of AdamW steps on random images; the model changes."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(4, 3, 8, 8, dtype=torch.float64, generator=generator)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(count):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), torch.arange(4))
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


@pytest.mark.parametrize("name", FORMS)
def test_released_form_trains_as_the_released_code(name, from_released):
    """Ten AdamW steps in float64 give the same losses and parameters to 1e-10: forward and backward are the same."""
    released, ours = RELEASED[name]().double(), make_ours(name, **FORMS[name])
    ours.load_state_dict(from_released(released.state_dict()))
    torch.testing.assert_close(steps(ours, 10), steps(released, 10), rtol=0, atol=1e-10)
    expected = from_released(released.state_dict())
    assert sum(t.numel() for t in expected.values()) == sum(t.numel() for t in released.state_dict().values())
    for key, tensor in ours.state_dict().items():
        torch.testing.assert_close(tensor, expected[key], rtol=0, atol=1e-10, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize(
    ("name", "default"),
    [
        ("cpv", {"stabilizer": "head"}),
        ("cpv", {"norm": "layer"}),
        ("cnv", {"pinv_init": "head"}),
        ("cnv", {"norm": "layer"}),
        ("cltv", {"norm": "layer"}),
        ("hybrid-vip", {"stabilizer": "head"}),
        ("hybrid-vin", {"pinv_init": "head"}),
    ],
    ids=words,
)
def test_each_default_differs_from_the_released_code(name, default, from_released):
    """The same weights give other logits as soon as one argument of the released form is left at its default."""
    released = RELEASED[name]().double()
    sharpen(released)
    ours = make_ours(name, **FORMS[name] | default)
    ours.load_state_dict(from_released(released.state_dict()))
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    assert (released(x) - ours(x)).abs().max() > 1e-6


def test_std_norm_adds_eps_to_the_standard_deviation():
    x = torch.randn(5, 7, dtype=torch.float64)
    norm = StdLayerNorm(7, eps=0.1).double()
    with torch.no_grad():
        norm.weight.uniform_(1, 2)
        norm.bias.uniform_(1, 2)
    expected = (x - x.mean(1, keepdim=True)) / (x.std(1, correction=0, keepdim=True) + 0.1) * norm.weight + norm.bias
    torch.testing.assert_close(norm(x), expected)


@pytest.mark.parametrize(
    ("name", "options", "coupled"),
    [
        ("cpv", {}, False),
        ("cpv", {"stabilizer": "batch"}, True),
        ("hybrid-vip", {"stabilizer": "batch"}, True),
        ("cnv", {}, False),
        ("cnv", {"pinv_init": "batch"}, True),
        ("hybrid-vin", {"pinv_init": "batch"}, True),
        ("cltv", {}, False),
    ],
    ids=words,
)
def test_batch_forms_couple_images(name, options, coupled):
    """``couples_images`` tells whether the logits of an image depend on the other images of its batch."""
    model = make_ours(name, **options)
    sharpen(model)
    x = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    alone = torch.cat([model(x[i : i + 1]) for i in range(3)])
    assert bool((model(x) - alone).abs().max() > 1e-9) == coupled
    assert all(m.couples_images == coupled for m in model.modules() if isinstance(m, ATTENTIONS))


# --- Table 1's baselines ---


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
@pytest.mark.parametrize("name", cxv.list_models())
def test_norms_and_activations_are_the_released_ones(name):
    """Every norm has PyTorch's default eps of 1e-5, every GELU is exact."""
    for module in create_or_skip(name, img_size=16).modules():
        assert getattr(module, "eps", None) in (None, 1e-5)
        assert getattr(module, "approximate", "none") == "none"


DROPOUTS = {  # name → its dropouts with drop_rate=0.3 in the order of the calls: the layer that each follows, its rate
    "vit-3/4": 3 * [("Linear", 0.3), ("GELU", 0.3), ("Linear", 0.3)],
    "mlp-mixer-3": 3 * 2 * [("GELU", 0.3), ("Linear", 0.3)],
    "fnet-3": 3 * [("GELU", 0.3), ("Linear", 0.3)],
    "wavemix-3": 3 * 4 * [("GELU", 0.3), ("Conv2d", 0.3)],
    "cvt-3/4": 3 * [("Conv2d", 0.3), ("GELU", 0.3), ("Conv2d", 0.3)],
    # the positions; then in each layer the attention map (0.1), its projection, F.gelu and the MLP's second layer
    "cct-2/4": [("other", 0.3), *(2 * [("other", 0.1), ("Linear", 0.3), ("other", 0.3), ("Linear", 0.3)])],
}


@pytest.mark.parametrize("name", DROPOUTS)
def test_dropouts_are_where_the_released_code_has_them(name):
    """WaveMix calls its MLP for each of the four levels of the transform."""
    model = create_or_skip(name, img_size=16, drop_rate=0.3).train()
    calls: list[tuple[str, float]] = []
    outputs: list[tuple[Tensor, str]] = []

    def record(module: nn.Module, inputs: tuple, output: Tensor) -> None:
        if isinstance(module, nn.Dropout) and module.p:
            source = [layer for tensor, layer in outputs if tensor is inputs[0]]
            calls.append((*(source or ["other"]), module.p))
        elif isinstance(module, nn.Linear | nn.Conv2d | nn.GELU):
            outputs.append((output, type(module).__name__))

    for module in model.modules():
        module.register_forward_hook(record)
    model(torch.randn(2, 3, 16, 16))
    assert calls == DROPOUTS[name]


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
@pytest.mark.parametrize("name", [n for n in cxv.list_models() if n.partition("-")[0] not in ("resnet", "cct")])
def test_weights_are_drawn_as_in_the_released_code(name):
    """PyTorch's default, uniform within ±1/√fan_in; class tokens and positions are normal with sd 1."""
    model = create_or_skip(name, img_size=16)
    for path, layer in model.named_modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            bound = layer.weight[0].numel() ** -0.5
            for p in (layer.weight, *([] if layer.bias is None else [layer.bias])):
                assert p.abs().max() <= bound * (1 + 1e-6), path
                assert p.numel() < 100 or 0.8 < p.std() * 3**0.5 / bound < 1.2, path
    for name, p in model.named_parameters():
        if name in ("cls_token", "pos_embed"):
            assert 0.7 < p.std() < 1.3, name
