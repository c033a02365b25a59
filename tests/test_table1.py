"""Table 1's fifteen rows: paper.md's counts, the hybrids' fused ops, section 5's variants."""

import csv
import json
import sys
from pathlib import Path

import pytest
import torch
from conftest import needs_cpp
from matplotlib.figure import Figure
from torch import nn

import cxv
from cxv.models.registry import TABLE_1, has_fused_ops

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import counting
import table1
import table1_plot
import table1_report
import training_runs

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")

# torchsummary's parameters and all (M), multiply-adds as the counters of the time printed them and of all products (G)
ROWS = {
    "resnet-18": (11.174, 11.174, 0.5567, 0.555),
    "resnet-34": (21.282, 21.282, 1.1615, 1.159),
    "fnet-10": (1.324, 1.456, 1.3439, 1.344),
    "mlp-mixer-5": (21.321, 21.321, 3.0223, 3.020),
    "wavemix-5": (1.433, 1.294, 1.2930, 0.067),
    "convmixer-16": (1.339, 1.339, 1.3692, 1.343),
    "vit-10/4": (1.323, 1.454, 1.3439, 4.03),
    "hybrid-vin-6/8": (1.282, 1.413, 1.4093, 2.36),
    "hybrid-vip-6/8": (1.285, 1.417, 1.3046, 2.00),
    "hybrid-vilt-6/8": (1.282, 1.285, 1.3114, 1.40),
    "cct-6/4": (1.301, 1.432, 1.3231, 2.93),
    "cvt-5/4": (1.300, 1.303, 1.3297, 4.01),
    "cnv-5/4": (1.343, 1.345, 1.3948, 1.772),
    "cltv-5/4": (1.345, 1.346, 1.3758, 1.412),
    "cpv-5/4": (1.345, 1.346, 1.3732, 1.661),
}
# What Nyström attention saves by multiplying A⁺(softmax(q̃kᵀ)v) before softmax(qk̃ᵀ): layers · heads · (N·m² − m²·d)
REORDERED = {"cnv-5/4": 5 * 4 * (1024 - 32) * 64**2, "hybrid-vin-6/8": 6 * 8 * (1088 - 32) * 64**2}
HYBRIDS = ("hybrid-vilt-6/8", "hybrid-vin-6/8", "hybrid-vip-6/8")
OURS = ("cnv-5/4", "cltv-5/4", "cpv-5/4")


def build(name: str, **kwargs) -> nn.Module:
    if TABLE_1[name].__module__.endswith("baselines") and not name.startswith("resnet"):
        pytest.importorskip("vit_pytorch" if name[:3] in ("cct", "cvt") else "timm")
    return cxv.create_model(name, **kwargs)


def test_the_rows_are_the_papers():
    assert set(ROWS) == set(TABLE_1) == set(table1_report.PAPER)


@pytest.mark.parametrize("name", ROWS)
def test_parameters_and_macs(name):
    model = build(name)
    summed, total, macs, true = ROWS[name]
    assert round(counting.torchsummary_parameters(model, table1.TIMES.get(name, {})) / 1e6, 3) == summed
    assert round(counting.parameters(model) / 1e6, 3) == total
    image = torch.zeros(1, 3, 32, 32)
    assert counting.layer_macs(model, image) / 1e9 == pytest.approx(macs, rel=0.01)
    assert (counting.true_macs(model, image) + REORDERED.get(name, 0)) / 1e9 == pytest.approx(true, rel=0.01)


@pytest.mark.parametrize("name", ROWS)
def test_any_image_size_and_classes(name):
    small, shallow = {}, name
    if not name.startswith("resnet"):
        family, _, heads = name.partition("/")
        small, shallow = {"embed_dim": 16}, f"{family.rpartition('-')[0]}-3" + (f"/{heads}" if heads else "")
    build(name)  # skips where its library is missing
    model = cxv.create_model(shallow, img_size=24, in_chans=1, num_classes=7, **small).train()
    logits = model(torch.randn(2, 1, 24, 24))
    assert logits.shape == (2, 7)
    logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    twin = cxv.create_model(shallow, img_size=24, in_chans=1, num_classes=7, **small)
    twin.load_state_dict(model.state_dict())
    x = torch.randn(2, 1, 24, 24)
    assert torch.equal(twin.eval()(x), model.eval()(x))


def test_names_that_are_not():
    with pytest.raises(ValueError, match="did you mean 'vit-10/4'"):
        cxv.create_model("vit-10")
    with pytest.raises(ValueError, match="depth of a resnet must be 18 or 34, got 50"):
        cxv.create_model("resnet-50")
    with pytest.raises(ValueError, match="did you mean 'resnet-18'"):
        cxv.create_model("resnet-18/2")
    assert {name for name in TABLE_1 if has_fused_ops(name)} == {*HYBRIDS, *OURS}


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm.models.vision_transformer", None)
    with pytest.raises(ImportError, match=r"vit is built with timm.models.vision_transformer, .*cxv\[baselines\]"):
        cxv.create_model("vit-10/4")


@needs_cpp
@pytest.mark.parametrize("name", HYBRIDS)
def test_hybrids_fused_match_their_reference(name, monkeypatch):
    monkeypatch.setattr("cxv.models.residual.CHUNK_TOKENS", 2 * 65)  # chunks of two images, the last of one
    small = {"embed_dim": 16, "head_dim": 6, "img_size": 8, "num_classes": 4}
    reference, fused = (
        cxv.create_model(name.replace("6/8", "2/3"), use_fused=u, **small).double().train() for u in (False, True)
    )
    fused.load_state_dict(reference.state_dict())
    x = torch.randn(5, 3, 8, 8, dtype=torch.float64)
    results = []
    for model in (reference, fused):
        torch.manual_seed(7)  # the same elements are dropped
        y = model(x)
        results.append((y, *torch.autograd.grad(y.square().sum(), model.parameters())))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


def test_a_hybrid_refuses_another_image_size():
    model = cxv.create_model("hybrid-vip-1/2", embed_dim=8, head_dim=4, img_size=8)
    with pytest.raises(ValueError, match="made for images of 8×8"):
        model(torch.zeros(1, 3, 9, 9))


VARIANTS = {
    "one stem convolution": {"stem_convs": 1},
    "three": {"stem_convs": 3},
    "no padding": {"stem_padding": 0},
    "stem GELU": {"stem_act": True},
    "stem max-pool": {"stem_pool": True},
    "conv GELU": {"conv_act": True},
    "conv in every second layer": {"conv_every": 2},
    "residual around conv": {"conv_residual": "conv"},
    "residual around conv and norm": {"conv_residual": "conv_norm"},
    "learned positions": {"positions": "learned"},
    "rotary positions": {"positions": "rotary"},
    "batch norm": {"norm": "batch"},
    "eps on σ": {"norm": "layer_std"},
    "norm in every second layer": {"norm_every": 2},
    "pre-norm": {"pre_norm": True},
}
OWN = {
    "cpv": {
        "relu": {"attn_kernel": "relu"},
        "eps 0": {"attn_eps": 0.0},
        "local": {"local_heads": 1, "local_window": 7},
    },
    "cnv": {"front pad": {"front_pad": True, "num_landmarks": 7}},
    "cltv": {"3×3": {"attn_kernel_size": 3}},
}


@pytest.mark.parametrize(
    ("family", "variant"),
    [(f, v) for f in OWN for v in (*VARIANTS, *OWN[f])],
)
def test_variants_train_and_round_trip(family, variant):
    """Each is another function, fused and not alike, and its weights load into its twin."""
    options = VARIANTS.get(variant) or OWN[family][variant]
    shape = {"embed_dim": 16, "img_size": 10, "num_classes": 4, "drop_rate": 0.0}
    torch.manual_seed(0)
    plain = cxv.create_model(f"{family}-3/2", **shape).double()
    reference, fused = (
        cxv.create_model(f"{family}-3/2", use_fused=u, **shape, **options).double().train() for u in (False, True)
    )
    fused.load_state_dict(reference.state_dict())
    shared = {k: v for k, v in reference.state_dict().items() if k in plain.state_dict()}
    if all(v.shape == plain.state_dict()[k].shape for k, v in shared.items()):
        plain.load_state_dict(shared, strict=False)
    x = torch.randn(3, 3, 10, 10, dtype=torch.float64)
    loss = reference(x).square().sum()
    torch.testing.assert_close(fused(x).square().sum(), loss, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(plain(x).square().sum(), loss)
    optimizer = torch.optim.SGD(reference.parameters(), lr=1e-3)
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in reference.parameters())
    optimizer.step()
    twin = cxv.create_model(f"{family}-3/2", **shape, **options).double()
    twin.load_state_dict(reference.state_dict())
    assert torch.equal(twin.eval()(x), reference.eval()(x))


@pytest.mark.parametrize(("convs", "macs", "count"), [(1, 1.377, 1.326), (2, 1.395, 1.343), (3, 1.399, 1.348)])
def test_table_2_counts(convs, macs, count):
    """The stems of Table 2: multiply-adds (G) and torchsummary's parameters (M) of CNV."""
    model = cxv.CNV(stem_convs=convs)
    assert counting.layer_macs(model, torch.zeros(1, 3, 32, 32)) / 1e9 == pytest.approx(macs, rel=0.001)
    assert round(counting.torchsummary_parameters(model, table1.TIMES["cnv-5/4"]) / 1e6, 3) == count


def test_variants_refuse_what_is_not_allowed():
    for options, message in (
        ({"stem_convs": 4}, "stem_convs must be one of 1, 2, 3, got 4"),
        ({"norm": "group"}, "norm must be one of 'layer', 'layer_std', 'batch', got 'group'"),
        ({"conv_residual": "all"}, "conv_residual must be one of None, 'conv', 'conv_norm', got 'all'"),
        ({"positions": "sine"}, "positions must be one of None, 'learned', 'rotary', got 'sine'"),
        ({"local_heads": 5}, r"local_heads must be in \[0, 4\], got 5"),
    ):
        with pytest.raises(ValueError, match=message):
            cxv.CPV(**options)
    with pytest.raises(ValueError, match="learned positions were made for 64 tokens"):
        cxv.CPV(depth=1, embed_dim=16, img_size=8, positions="learned")(torch.zeros(1, 3, 9, 9))


def test_local_attention_is_softmax_over_the_neighbourhood():
    from cxv.models.attention import local_attention

    q, k, v = (torch.randn(2, 2, 11, 4, dtype=torch.float64) for _ in range(3))
    for window in (3, 4, 11, 20):
        block = torch.arange(11) // window
        near = (block[:, None] - block).abs() <= 1
        expected = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=near)
        torch.testing.assert_close(local_attention(q, k, v, window), expected)


def test_rotary_positions_depend_on_the_distance_alone():
    from cxv.models.attention import rotate

    q, k = (torch.randn(6, dtype=torch.float64).expand(1, 1, 9, 6) for _ in range(2))
    scores = rotate(q) @ rotate(k).transpose(-2, -1)
    for offset in range(-8, 9):
        diagonal = scores[0, 0].diagonal(offset)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-6, atol=1e-6)
    assert not torch.allclose(scores[0, 0, 0, 1], scores[0, 0, 0, 2])


def test_haar_is_orthonormal():
    from cxv.models.wavemix import haar

    x = torch.randn(2, 3, 6, 8, dtype=torch.float64)
    low, details = haar(x)
    assert low.shape == (2, 3, 3, 4)
    assert details.shape == (2, 9, 3, 4)
    torch.testing.assert_close(low.square().sum() + details.square().sum(), x.square().sum())
    assert details.abs().max() > 0
    assert haar(torch.ones(1, 1, 4, 4))[1].abs().max() == 0


@pytest.mark.slow
def test_table1_runs_and_is_redrawn(tmp_path, capsys):
    assert table1.main(["--quick", "--dtype", "float32", "--models", "cltv-5/4,resnet-18", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    results = json.loads((tmp_path / "table1-cpu.json").read_text())
    assert [(r["name"], r["fused"]) for r in results["rows"]] == [
        ("resnet-18", False),
        ("cltv-5/4", False),
        ("cltv-5/4", True),
    ]
    assert all(r["status"] == "ok" and r["peak"]["float32"] > r["kept"]["float32"] > 0 for r in results["rows"])
    eager, fused = results["rows"][1:]
    assert fused["kept"]["float32"] < eager["kept"]["float32"] / 3
    lines = list(csv.DictReader((tmp_path / "table1-cpu.csv").open()))
    assert float(lines[1]["paper_gpu_gb"]) == 1.8
    assert int(lines[2]["kept_float32"]) == fused["kept"]["float32"]
    assert "1.345" in printed
    (tmp_path / "table1-cpu.png").unlink()
    assert table1.main(["--plot", str(tmp_path / "table1-cpu.json")]) == 0
    assert (tmp_path / "table1-cpu.png").stat().st_size > 10_000
    assert table1.main(["--markdown", str(tmp_path / "table1-cpu.json")]) == 0
    assert "| resnet-18 | 11.2 | 11.174 |" in capsys.readouterr().out


def test_train_fills_in_accuracies(tmp_path, folder, monkeypatch, capsys):
    """Two seeds of a small model; the row counts as measured, so that only training is done."""
    cpu, settings = torch.device("cpu"), {"models": ("cpv-5/4",), "dtypes": (torch.float32,), "batch": 32}
    found = table1.empty(table1.Settings(**settings, device=cpu, budget=1.0, repeats=2, threads=1))
    numbers = {"peak": {"float32": 2 * 10**9}, "kept": {"float32": 1}}
    numbers |= {part: {"float32": {"median_s": 1.0}} for part in ("train", "inference")}
    found["rows"] = [vars(table1.Row("cpv-5/4", fused, batch=32, **numbers)) for fused in (False, True)]
    path = tmp_path / "table1-cpu.json"
    path.write_text(json.dumps(found))
    trained, train = [], training_runs.train
    monkeypatch.setattr(training_runs, "train", lambda config, log: trained.append(config) or train(config, log))
    arguments = ["--train", "--resume", "--out", str(tmp_path), "--runs", str(tmp_path / "runs"), "--device", "cpu"]
    arguments += ["--models", "cpv-5/4", "--dtype", "float32", "--threads", "1", "--data", "folder", "--epochs", "2"]
    arguments += ["--data-dir", str(folder), "--dataset", "cifar10", "--embed-dim", "16", "--batch-size", "6"]
    assert table1.main([*arguments, "--seeds", "0"]) == 0
    assert table1.main([*arguments, "--seeds", "0,1"]) == 0
    assert [(c.model, c.seed, c.optimizer, c.epochs, c.sgd_epochs) for c in trained] == [
        ("cpv-5/4", seed, "dualopt", 1, 1) for seed in (0, 1)
    ]
    runs = [json.loads(line) for line in (tmp_path / "table1-cifar10.jsonl").read_text().splitlines()]
    best = [run["summary"]["best_test"]["test_top1"] for run in runs]
    mean, spread = sum(best) / 2, training_runs.spread(best)
    printed = capsys.readouterr().out
    assert "91.42" in printed
    assert spread in printed
    results = json.loads(path.read_text())
    total = results["trained"]["cifar10"]["models"]["cpv-5/4"]["best_test"]
    assert (total["best"], total["mean"]) == (max(best), pytest.approx(mean))
    (line, _) = csv.DictReader(path.with_suffix(".csv").open())
    assert float(line["cifar10_sd"]) == pytest.approx(abs(best[0] - best[1]) / 2**0.5)
    report = table1_report.report(results)
    assert f"| cpv-5/4 | cifar10 | 91.42 | {max(best):.2f} | {spread} |" in report
    assert "cifar10: 2 runs" in report
    assert "data folder, batch_size 6, embed_dim 16" in report
    status = table1_report.status(results)
    assert f"| {max(best):.2f}, {spread} / not yet measured / not yet measured |" in status
    assert "| 89.56 / 59.23 / 49.56 | not yet measured |" in status
    points = table1_plot.points(results)
    assert [point[:3] for point in points if point[0] != "paper"] == [
        ("eager", "cpv-5/4", 2.0),
        ("fused", "cpv-5/4", 2.0),
    ]
    assert {point[3] for point in points if point[0] != "paper"} == {total["mean"]}
    assert ("paper", "cpv-5/4", 3.2, 91.42, 0.0) in points
    assert {point[0] for point in table1_plot.points(found)} == {"paper"}
    with pytest.raises(SystemExit, match="2"):
        table1.main([*arguments, "--epochs", "3"])
    assert "table1-cifar10.jsonl have epochs = 2, and now it is 3: choose another" in capsys.readouterr().err


def test_labels_keep_apart_while_there_is_room():
    figure = Figure()
    axes = figure.subplots()
    figure.draw_without_rendering()
    places = []
    for i in range(len(table1_plot.PLACES) + 1):
        places.append(table1_plot._label(axes, f"model-{i}", (0.5, 0.5), "black", places))
    *apart, last = places
    assert not any(a.overlaps(b) for i, a in enumerate(apart) for b in apart[:i])
    assert any(last.overlaps(place) for place in apart)
    assert [text.get_text() for text in axes.texts] == [f"model-{i}" for i in range(len(places))]
