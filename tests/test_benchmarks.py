"""The benchmarks measure what they say: against allocations and saved tensors counted by hand."""

import json
import sys
import time
from pathlib import Path

import pytest
import torch

import cxv_kernels

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import attn_mem  # noqa: E402
import common  # noqa: E402
import memory  # noqa: E402
from attn_mem_plot import draw  # noqa: E402

MB = 1_000_000
SMALL = 4096  # bytes: alignment, and scalars that an op may need


def floats(megabytes):
    return torch.empty(megabytes * MB // 4)


def qkv(tokens=256, batch=2, heads=4, dim=32, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return tuple(
        torch.randn(batch, heads, tokens, dim, generator=generator).to(dtype).requires_grad_() for _ in range(3)
    )


def nbytes(tensor):
    return tensor.numel() * tensor.element_size()


# --- allocated ---


def test_peak_of_one_after_the_other():
    def run():
        first = floats(8)
        del first
        return floats(4)

    assert memory.allocated(run) == (8 * MB, 4 * MB)


def test_peak_of_both_at_once():
    def run():
        first, _second = floats(8), floats(4)
        return first[:10]  # keeps the whole storage

    assert memory.allocated(run) == (12 * MB, 8 * MB)


def test_frees_of_older_memory_do_not_hide_the_peak():
    held = [floats(16)]

    def run():
        held.clear()
        return floats(8)

    assert memory.allocated(run) == (8 * MB, 8 * MB)


def test_frees_of_memory_that_an_earlier_measurement_saw():
    held = []
    memory.allocated(lambda: held.append(floats(16)))

    def run():
        held.clear()
        return floats(8)

    assert memory.allocated(run) == (8 * MB, 8 * MB)


def test_nothing_allocated():
    assert memory.allocated(lambda: None) == (0, 0)


def test_peak_inside_cpp_ops():
    a, b = torch.randn(512, 512), torch.randn(512, 512)
    assert memory.allocated(lambda: torch.matmul(a, b)) == (1024 * 1024, 1024 * 1024)
    q, k, v = (x.detach() for x in qkv())
    peak, kept = memory.allocated(lambda: cxv_kernels.linear_attention(q, k, v))
    assert nbytes(q) <= kept <= peak


def test_peak_in_backward():
    x = floats(4).zero_().requires_grad_()
    grad = torch.ones_like(x)
    # exp's output, which backward needs, and the gradient
    assert memory.allocated(lambda: torch.autograd.grad(x.exp(), x, grad)) == (8 * MB, 4 * MB)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_peak_on_cuda():
    def run():
        first = torch.empty(8 << 20, dtype=torch.uint8, device="cuda")
        del first
        return torch.empty(4 << 20, dtype=torch.uint8, device="cuda")

    older = torch.empty(1 << 20, dtype=torch.uint8, device="cuda")
    assert memory.allocated(run, "cuda") == (8 << 20, 4 << 20)
    del older


# --- saved_for_backward ---


def test_exp_saves_its_output():
    x = torch.randn(1000, requires_grad=True)
    assert memory.saved_for_backward(x.exp, [x]) == (4000, 4000)


def test_inputs_are_left_out_and_storages_count_once():
    x = torch.randn(1000, requires_grad=True)
    assert memory.saved_for_backward(lambda: x * x, [x]) == (0, 4000)
    assert memory.saved_for_backward(lambda: x[:500].sin() + x[500:].sin(), [x]) == (0, 4000)
    assert memory.saved_for_backward(lambda: x * x) == (4000, 4000)


def test_a_view_counts_as_its_whole_storage():
    x = torch.randn(1000, requires_grad=True)
    assert memory.saved_for_backward(lambda: (x + 1)[:10].sin(), [x]) == (4000, 4000)


def test_save_for_backward_of_a_custom_function():
    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x, x.new_empty(50))
            return x.clone()

    x = torch.randn(1000, requires_grad=True)
    assert memory.saved_for_backward(lambda: Function.apply(x), [x]) == (200, 4200)


def test_fused_linear_attention_saves_the_state_alone():
    q, k, v = qkv()
    if cxv_kernels.backends.resolve("linear_attention", q) == "reference":
        pytest.skip("no fused kernel here")
    batch, heads, _, dim = q.shape
    saved = memory.saved_for_backward(lambda: cxv_kernels.linear_attention(q, k, v), (q, k, v))
    state = batch * heads * dim * dim * 4
    assert state <= saved.beyond_inputs <= state + 4 * batch * heads * dim * 4  # S, and a few numbers per channel
    assert saved.total == saved.beyond_inputs + 3 * nbytes(q)


@pytest.mark.parametrize("mechanism", ["performer", "linear", "nystrom"])
@pytest.mark.parametrize("backend", ["reference", None])
def test_saved_bytes_agree_with_the_allocator(mechanism, backend):
    """What the forward pass leaves allocated is what it saved and its output: nothing is kept past the hooks."""
    q, k, v = qkv()
    projection = cxv_kernels.orthogonal_projection(110, 32, generator=torch.Generator().manual_seed(0))
    attend = attn_mem.attention(mechanism, backend, projection)
    attend(q, k, v)
    kept = memory.allocated(lambda: attend(q, k, v)).kept
    saved = memory.saved_for_backward(lambda: attend(q, k, v), (q, k, v, projection)).beyond_inputs
    assert saved - SMALL <= kept <= saved + nbytes(q) + SMALL  # the output may be among the saved


# --- interleaved ---


def test_interleaved_takes_turns():
    order = []
    runs = [lambda i=i: order.append(i) for i in range(3)]
    timings = memory.interleaved(runs, max_repeats=4)
    assert order == [0, 1, 2] * 4
    assert all(len(t.samples) == 4 and t.median >= 0 and t.spread >= 0 for t in timings)


def test_interleaved_stops_at_its_limits():
    fast, slow = [], []

    def wait():
        slow.append(0)
        time.sleep(0.02)

    memory.interleaved([lambda: fast.append(0), wait], budget=0.01, min_repeats=3, max_repeats=9)
    assert (len(fast), len(slow)) == (9, 3)
    slow.clear()
    (timing,) = memory.interleaved([wait], min_repeats=3, limit=0.01)
    assert len(slow) == 1
    assert timing.spread == 0


def test_interleaved_goes_on_without_what_runs_out_of_memory():
    left = [None, None]

    def full():
        if not left:
            raise torch.OutOfMemoryError("full")
        left.pop()

    def wrong():
        raise RuntimeError("something else")

    lost, kept = memory.interleaved([full, lambda: None], max_repeats=4)
    assert lost is None
    assert len(kept.samples) == 4
    with pytest.raises(RuntimeError, match="something else"):
        memory.interleaved([wrong])


def test_timing_quartiles():
    timing = memory.Timing((4.0, 1.0, 2.0, 3.0, 5.0))
    assert (timing.median, timing.quartiles, timing.spread) == (3.0, (2.0, 4.0), 2.0)
    assert timing.noisy
    assert not memory.Timing((1.0, 1.1, 1.2)).noisy


# --- the script ---


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    out = tmp_path_factory.mktemp("results")
    assert attn_mem.main(["--quick", "--device", "cpu", "--out", str(out)]) == 0
    return json.loads((out / "attn_mem-cpu.json").read_text()), out / "attn_mem-cpu.png"


def test_quick_run_is_complete(quick):
    results, png = quick
    assert png.read_bytes().startswith(b"\x89PNG")
    rows = results["attention"]
    lengths = results["settings"]["lengths"]
    assert [r["tokens"] for r in rows if r["name"] == "sdpa"] == lengths
    for mechanism in ("performer", "linear", "nystrom"):
        mine = [(r["tokens"], r["implementation"]) for r in rows if r["name"] == mechanism]
        assert mine == [(n, implementation) for n in lengths for implementation in ("reference", "fused")]
    assert {r["name"] for r in results["models"]} == set(attn_mem.TABLE1_GB)
    assert {"device_name", "python", "torch", "cxv", "triton", "dtype", "threads", "build"} <= set(
        results["environment"]
    )


def test_quick_run_checks_what_it_measures(quick):
    for row in quick[0]["attention"] + quick[0]["models"]:
        if row["status"] == "= reference":
            assert set(row["backends"].values()) == {"reference"}
            assert row["peak_bytes"] is row["forward"] is None
            continue
        assert row["status"] == "ok"
        assert row["peak_bytes"] > 0
        if row["implementation"] == "fused":
            assert set(row["backends"].values()) != {"reference"}
            assert row["max_relative_error"] <= row["tolerance"]
        if row["tokens"]:
            timing = row["forward_backward"]
            assert timing["q1_s"] <= timing["median_s"] <= timing["q3_s"]
            assert row["saved_bytes"] <= row["saved_bytes_with_inputs"]


def test_a_wrong_kernel_gets_no_speed(tmp_path, monkeypatch, capsys):
    right = attn_mem.attention

    def wrong(mechanism, backend, projection):
        attend = right(mechanism, backend, projection)
        return attend if backend == "reference" else lambda q, k, v: attend(q, k, v) * 1.001

    monkeypatch.setattr(attn_mem, "attention", wrong)
    monkeypatch.setattr(attn_mem.backends, "resolve", lambda op, tensor, backend=None: backend or "cpp")
    arguments = ["--quick", "--device", "cpu", "--no-models", "--lengths", "64", "--mechanisms", "nystrom,sdpa"]
    assert attn_mem.main([*arguments, "--out", str(tmp_path)]) == 1
    assert "FAILED" in capsys.readouterr().out
    row = json.loads((tmp_path / "attn_mem-cpu.json").read_text())["attention"][1]
    assert (row["status"], row["peak_bytes"], row["forward"]) == ("failed", None, None)


def test_out_of_memory_is_a_row(tmp_path, monkeypatch, capsys):
    def full(*_):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(attn_mem, "attention", lambda *_: full)
    arguments = ["--quick", "--device", "cpu", "--no-models", "--lengths", "64", "--mechanisms", "nystrom,sdpa"]
    assert attn_mem.main([*arguments, "--out", str(tmp_path)]) == 0
    assert "out of memory" in capsys.readouterr().out
    rows = json.loads((tmp_path / "attn_mem-cpu.json").read_text())["attention"]
    assert [r["status"] for r in rows if r["implementation"] in ("reference", "torch")] == ["out of memory", "ok"]


def test_out_of_memory_in_the_timing_rounds_is_a_row(tmp_path, monkeypatch, capsys):
    calls = []

    def full_later(q, k, v):
        calls.append(0)
        if len(calls) > 4:  # the check's two, the peak's and the saved bytes' had their memory
            raise torch.OutOfMemoryError("full")
        return q + k + v

    monkeypatch.setattr(attn_mem, "attention", lambda mechanism, backend, _: full_later)
    arguments = ["--quick", "--device", "cpu", "--no-models", "--lengths", "64", "--mechanisms", "nystrom,sdpa"]
    assert attn_mem.main([*arguments, "--out", str(tmp_path)]) == 0
    assert "out of memory" in capsys.readouterr().out
    reference, *_, sdpa = json.loads((tmp_path / "attn_mem-cpu.json").read_text())["attention"]
    assert (reference["status"], sdpa["status"]) == ("out of memory", "ok")
    assert reference["peak_bytes"] > 0
    assert reference["saved_bytes"] == 0
    assert reference["forward"] is reference["forward_backward"] is None
    assert sdpa["forward"]


def test_crossover_is_where_it_wins_from_there_on():
    def row(name, tokens, peak):
        implementation = "torch" if name == "sdpa" else "fused"
        return attn_mem.Row(name, implementation, {}, tokens, peak=peak)

    wins = {256: True, 512: False, 1024: True, 2048: True}
    rows = [row("linear", n, 1 if win else 3) for n, win in wins.items()] + [row("sdpa", n, 2) for n in wins]
    found = {f["quantity"]: f["tokens"] for f in attn_mem.crossovers(rows)}
    assert found == {"time": None, "peak": 1024}
    assert "none up to 2,048" in attn_mem.crossover_lines(attn_mem.crossovers(rows), 2048)[0]


def test_redraws_from_the_json_alone(quick, tmp_path):
    path = tmp_path / "again.json"
    path.write_text(json.dumps(quick[0]))
    assert attn_mem.main(["--plot", str(path)]) == 0
    assert (tmp_path / "again.png").read_bytes() == quick[1].read_bytes()
    draw(quick[0] | {"models": []}, tmp_path / "left.png")
    draw(quick[0] | {"attention": []}, tmp_path / "right.png")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--batch", "0"], "--batch: must be an integer of at least 1, got '0'"),
        (["--lengths", "256,x"], "--lengths: must be an integer of at least 1, got 'x'"),
        (["--mechanisms", "linear,magic"], "must be some of performer, linear, nystrom, sdpa, got 'magic'"),
        (["--threads", "-1"], "--threads: must be an integer of at least 1, got '-1'"),
        (["--dtype", "int8"], "--dtype: invalid choice: 'int8'"),
        (["--device", "tpu"], "--device: invalid choice: 'tpu'"),
        (["--plot", "missing.json"], "--plot: no such file: missing.json"),
        (["--plot", __file__], "is not a JSON of this benchmark"),
        (["--out", __file__], "--out: cannot make"),
        (["--nonsense"], "unrecognized arguments: --nonsense"),
    ],
)
def test_bad_values(arguments, words, capsys):
    with pytest.raises(SystemExit) as exit_status:
        attn_mem.main(arguments)
    message = capsys.readouterr().err
    assert exit_status.value.code == 2
    assert message.startswith("attn_mem: error: ")
    assert words in message
    assert message.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_no_cuda(capsys):
    with pytest.raises(SystemExit):
        attn_mem.main(["--device", "cuda"])
    assert "--device: cuda is not available" in capsys.readouterr().err
