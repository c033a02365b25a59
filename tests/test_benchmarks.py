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
import attn_speed  # noqa: E402
import attn_speed_report  # noqa: E402
import common  # noqa: E402
import counting  # noqa: E402
import floors  # noqa: E402
import memory  # noqa: E402
import model_floor  # noqa: E402
import model_ledger  # noqa: E402
import model_mem  # noqa: E402
import model_mem_report  # noqa: E402
import peers  # noqa: E402
import training  # noqa: E402
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
    monkeypatch.setattr(attn_mem.backends, "resolve", lambda op, tensor, backend=None, *_, **__: backend or "cpp")
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


def test_no_cuda(capsys):
    with pytest.raises(SystemExit):
        attn_mem.main(["--device", "cuda"])
    assert "--device: cuda is not available" in capsys.readouterr().err


# --- attn_speed ---

SPEED = ["--quick", "--no-compile", "--device", "cpu", "--threads", "1"]
SPEED_JSON = BENCHMARKS / "results" / "attn_speed-cpu.json"


@pytest.fixture(autouse=True)
def threads():
    """The script sets them for its process; here that is the tests'."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def speed(tmp_path, *arguments):
    """The exit status and the JSON of a tiny run."""
    status = attn_speed.main([*SPEED, *arguments, "--out", str(tmp_path)])
    return status, json.loads((tmp_path / "attn_speed-cpu.json").read_text())


def of(case, implementation):
    return next(row for row in case["rows"] if row["implementation"] == implementation)


@pytest.fixture(scope="module")
def quick_speed(tmp_path_factory):
    threads = torch.get_num_threads()
    status, results = speed(tmp_path_factory.mktemp("speed"))
    torch.set_num_threads(threads)
    assert status == 0
    return results


def test_quick_speed_is_complete(quick_speed):
    cases = [(case["op"], case["variant"]) for case in quick_speed["ops"]]
    assert cases == [
        ("performer_attention", ""),
        *(("linear_attention", m) for m in ("softmax", "elu", "relu")),
        ("nystrom_attention", ""),
        ("conv_norm", "channels_last"),
        ("conv_norm", "NCHW"),
    ]
    assert {"device_name", "python", "torch", "cxv", "dtype", "threads", "build", "peers"} <= set(
        quick_speed["environment"]
    )
    assert [case["op"] for case in quick_speed["scaling"]] == ["performer_attention", "linear_attention"]
    assert quick_speed["rates"]["flops"] > 0
    assert quick_speed["rates"]["bandwidth"] > 0
    assert len(quick_speed["floors"]) == 2 * (len(cases) + 2)  # two passes; the convolution alone twice


def test_quick_speed_checks_what_it_measures(quick_speed):
    for case in quick_speed["ops"]:
        assert of(case, case["baseline"])["status"] == "ok"
        for row in case["rows"]:
            if row["status"] != "ok":
                assert row["status"] in ("= reference", "not installed", "left out")
                assert row["peak_bytes"] is row["forward"] is None
                continue
            assert row["forward"]["q1_s"] <= row["forward"]["median_s"] <= row["forward"]["q3_s"]
            assert len(row["forward_backward"]["samples_s"]) >= 3
            assert row["saved_bytes"] is not None
            if row["implementation"] == "fused":
                assert row["max_relative_error"] <= row["tolerance"]
    for line in quick_speed["floors"]:
        assert line["times_floor"] == pytest.approx(line["measured_s"] / line["floor_s"])


def test_tables_are_drawn_from_the_json_alone(quick_speed, tmp_path, capsys):
    path = tmp_path / "again.json"
    path.write_text(json.dumps(quick_speed))
    assert attn_speed.main(["--markdown", str(path)]) == 0
    printed = capsys.readouterr().out.rstrip("\n")
    assert printed == attn_speed_report.report(json.loads(path.read_text()))
    for name in ("Performer", "linear elu", "Nyström", "conv_norm NCHW", "conv2d alone", "× floor", "faster from N"):
        assert name in printed
    tables = [[line for line in part.splitlines() if line[:1] == "|"] for part in printed.split("\n\n")]
    assert all(len({line.count("|") for line in table}) <= 1 for table in tables)


def test_a_wrong_kernel_gets_no_speed_anywhere(tmp_path, monkeypatch, capsys):
    right = attn_speed.attention

    def wrong(op, variant, projection, backend):
        attend = right(op, variant, projection, backend or "reference")
        return attend if backend else lambda q, k, v: attend(q, k, v) * 1.001

    monkeypatch.setattr(attn_speed, "attention", wrong)
    monkeypatch.setattr(attn_speed.backends, "resolve", lambda op, tensor, backend=None, *_, **__: backend or "cpp")
    status, results = speed(tmp_path, "--ops", "performer")
    assert status == 1
    printed = capsys.readouterr().out
    assert "FAILED: error" in printed
    assert "FAILED its check" in printed
    assert of(results["ops"][0], "reference")["status"] == "ok"
    judged = [row for part in ("ops", "scaling", "crossover") for case in results[part] for row in case["rows"]]
    judged = [row for row in judged if row["implementation"] == "fused"]
    assert len(judged) == 5
    for row in judged:
        assert (row["status"], row["peak_bytes"], row["forward"]) == ("failed", None, None)
    assert results["scaling"][0]["exponent"] is None
    assert all(found["tokens"] is None for found in results["crossover"][0]["faster_from"])
    assert {line["implementation"] for line in results["floors"]} == {"reference"}


def test_what_does_not_compile_is_a_row(tmp_path, monkeypatch):
    def broken(*_, **__):
        def run(*_):
            raise ValueError("no compiler\nand more")

        return run

    monkeypatch.setattr(torch, "compile", broken)
    arguments = ["--quick", "--device", "cpu", "--ops", "conv_norm", "--out", str(tmp_path)]
    assert attn_speed.main(arguments) == 0
    results = json.loads((tmp_path / "attn_speed-cpu.json").read_text())
    row = of(results["ops"][0], "torch.compile")
    assert (row["status"], row["note"], row["forward"]) == ("does not compile", "ValueError: no compiler", None)
    assert of(results["ops"][0], "conv2d, layer_norm")["status"] == "ok"
    assert results["crossover"] == results["scaling"] == []


def test_out_of_memory_in_one_implementation_leaves_the_others(tmp_path, monkeypatch):
    def full(*_):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(attn_speed.F, "scaled_dot_product_attention", full)
    status, results = speed(tmp_path, "--ops", "linear")
    assert status == 0
    assert of(results["ops"][0], "sdpa")["status"] == "out of memory"
    assert of(results["ops"][0], "reference")["status"] == "ok"
    assert {found["tokens"] for found in results["crossover"][0]["faster_from"]} == {64}


def test_a_run_that_dies_keeps_what_it_had(tmp_path, monkeypatch):
    def dies(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(attn_speed, "crossovers", dies)
    with pytest.raises(KeyboardInterrupt):
        speed(tmp_path, "--ops", "linear")
    assert [path.name for path in tmp_path.iterdir()] == ["attn_speed-cpu.json"]
    results = json.loads((tmp_path / "attn_speed-cpu.json").read_text())
    assert len(results["ops"]) == 3
    assert results["floors"]
    assert results["scaling"]
    assert results["crossover"] == []
    attn_speed_report.report(results)


def test_the_memory_of_a_run_that_dies_is_kept(tmp_path, monkeypatch):
    def dies(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(attn_mem, "check_model", dies)
    arguments = ["--quick", "--device", "cpu", "--lengths", "64", "--mechanisms", "linear", "--out", str(tmp_path)]
    with pytest.raises(KeyboardInterrupt):
        attn_mem.main(arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["attn_mem-cpu.json"]
    results = json.loads((tmp_path / "attn_mem-cpu.json").read_text())
    assert {row["implementation"] for row in results["attention"]} >= {"reference", "fused"}
    assert results["models"] == []


@pytest.mark.parametrize("op", peers.PEERS)
def test_peers_compute_the_same(op):
    package, build = peers.PEERS[op]
    if peers.version_of(package) is None:
        pytest.skip(f"{package} is not installed")
    projection = attn_speed.projection_on(torch.device("cpu"))
    q, k, v = qkv(tokens=128, batch=1, heads=1)
    ours = attn_speed.attention(op, "softmax", projection, "reference")(q, k, v)
    assert common.relative_error([build(1, projection).as_ours(q, k, v)], [ours.double()]) < 1e-4


def test_a_peer_that_computes_something_else_gets_no_time(tmp_path, monkeypatch, capsys):
    other = peers.Peer(lambda q, k, v: 1.01 * attn_mem.attention("linear", "reference", None)(q, k, v))
    monkeypatch.setitem(peers.PEERS, "linear_attention", ("other", lambda heads, projection: other))
    status, results = speed(tmp_path, "--ops", "linear")
    assert status == 0
    row = of(results["ops"][0], "other")
    assert (row["status"], row["forward"]) == ("differs", None)
    assert "computes something else: error 1.0e-02" in capsys.readouterr().out


def test_exponent_is_that_of_a_power():
    assert common.exponent({n: 3e-9 * n**1.25 for n in (64, 256, 1024)}) == pytest.approx(1.25)
    assert common.exponent({64: 1.0, 256: 4.4, 1024: 15.0}) == pytest.approx(0.9767, abs=1e-3)
    assert common.exponent({64: 1.0}) is None


def test_crossover_of_wins():
    assert common.crossover({64: False, 128: True, 256: True}) == 128
    assert common.crossover({256: True, 64: True, 128: False}) == 256
    assert common.crossover({64: True, 128: False}) is None
    assert common.crossover({}) is None


def test_faster_from_needs_every_longer_length():
    def row(name, tokens, seconds):
        timing = memory.Timing((seconds,)) if seconds else None
        return common.Row(name, "fused", {}, tokens, forward=timing, forward_backward=timing)

    rows = [row("linear", n, t) for n, t in {64: 1, 128: 3, 256: 1, 512: 1}.items()]
    rows += [row("performer", n, t) for n, t in {64: 1, 128: 1, 256: 1, 512: None}.items()]
    rows += [row("sdpa", n, 2) for n in (64, 128, 256)] + [row("sdpa", 512, None)]
    found = {(f["name"], f["pass"]): f["tokens"] for f in attn_speed.faster_from(rows)}
    assert found["linear", "forward"] == found["linear", "forward_backward"] == 256  # SDPA did not fit at 512
    assert found["performer", "forward"] is None


@pytest.mark.parametrize("name", ["performer", "linear", "nystrom"])
def test_work_of_attention_is_that_of_its_products(name):
    """What PyTorch counts in the reference, less the denominators, which the floors leave out."""
    batch, heads, tokens, features = 2, 4, 256, 110
    settings = attn_speed.settings_of(attn_speed.parse(["--device", "cpu"]))
    q, k, v = (x.detach() for x in qkv(tokens))
    projection = attn_speed.projection_on(torch.device("cpu"))
    op = f"{name}_attention"
    found = counting.flops(lambda: attn_speed.attention(op, "softmax", projection, "reference")(q, k, v))
    denominators = 2 * batch * heads * tokens * features if name == "performer" else 0
    forward, both = attn_speed.attention_work(op, settings, batch, tokens)
    assert forward.flop == found - denominators
    assert both.flop > 2 * forward.flop
    assert forward.nbytes == 4 * nbytes(q)


def test_work_of_conv_norm_is_that_of_its_convolution():
    x, weight = (torch.randn(2, 8, 6, 6, requires_grad=True), torch.randn(8, 8, 3, 3, requires_grad=True))

    def run():
        torch.nn.functional.conv2d(x, weight, padding=1).sum().backward()

    assert counting.flops(run) == floors.conv_work(2 * 36, 8, 8, 4)[1].flop
    assert floors.Work(2e9, 1e9).seconds(1e9, 1e9) == 2
    assert floors.Rates(2, "a", 1, "b").best(floors.Rates(1, "c", 3, "d")) == floors.Rates(2, "a", 3, "d")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--ops", "linear,magic"], "--ops: must be some of performer, linear, nystrom, conv_norm, got 'magic'"),
        (["--budget", "0"], "--budget: must be a positive number of seconds, got '0'"),
        (["--budget", "soon"], "--budget: must be a positive number of seconds, got 'soon'"),
        (["--threads", "0"], "--threads: must be an integer of at least 1, got '0'"),
        (["--markdown", "missing.json"], "--markdown: no such file: missing.json"),
        (["--markdown", __file__], "is not a JSON of this benchmark"),
        (["--out", __file__], "--out: cannot make"),
    ],
)
def test_bad_values_of_speed(arguments, words, capsys):
    with pytest.raises(SystemExit) as exit_status:
        attn_speed.main(arguments)
    message = capsys.readouterr().err
    assert exit_status.value.code == 2
    assert message.startswith("attn_speed: error: ")
    assert words in message
    assert message.count("\n") == 1


# --- model_mem ---

MODEL_MEM_JSON = BENCHMARKS / "results" / "model_mem-cpu.json"


def model_memory(tmp_path, *arguments):
    """The exit status and the JSON of a tiny run."""
    given = ["--quick", "--device", "cpu", "--threads", "1", "--models", "cltv-5/4", *arguments]
    status = model_mem.main([*given, "--out", str(tmp_path)])
    return status, json.loads((tmp_path / "model_mem-cpu.json").read_text())


@pytest.fixture(scope="module")
def quick_model_mem(tmp_path_factory):
    threads, folder = torch.get_num_threads(), tmp_path_factory.mktemp("models")
    status, results = model_memory(folder)
    torch.set_num_threads(threads)
    assert status == 0
    assert (folder / "model_mem-cpu.png").stat().st_size > 10_000
    return results


def test_quick_model_mem_is_complete(quick_model_mem):
    rows = quick_model_mem["memory"]
    assert [row["mode"] for row in rows] == 2 * list(training.MODES)
    assert {row["dtype"] for row in rows} == {"bfloat16", "float32"}
    for row in rows:
        assert row["status"] == "ok"
        assert row["kept"] >= sum(row["ledger"].values()) > 0
        assert (row["inference"] is not None) == (row["mode"] in ("eager", "fused"))
        assert (row["largest_batch_by"] == "predicted") == (row["mode"] != "reference")
        if row["predicted"]:
            assert sum(row["predicted"].values()) == pytest.approx(row["kept"], rel=0.02)
    for row in quick_model_mem["speed"]:
        assert len(row["step"]["samples_s"]) >= (1 if row["mode"] == "reference" else 2)
        assert row["images_per_s"] == pytest.approx(4 / row["step"]["median_s"])
    assert {row["side"] for row in quick_model_mem["sizes"]} == {8, 16, 32}


def test_model_tables_are_drawn_from_the_json_alone(quick_model_mem, tmp_path, capsys):
    path = tmp_path / "again.json"
    path.write_text(json.dumps(quick_model_mem))
    assert model_mem.main(["--markdown", str(path)]) == 0
    printed = capsys.readouterr().out.rstrip("\n")
    assert printed == model_mem_report.report(json.loads(path.read_text()))
    for name in ("peak, GB", "batch in 16 GB (predicted)", "images/s"):
        assert name in printed
    tables = [[line for line in part.splitlines() if line[:1] == "|"] for part in printed.split("\n\n")]
    assert all(len({line.count("|") for line in table}) <= 1 for table in tables)
    assert model_mem.main(["--plot", str(path)]) == 0
    assert path.with_suffix(".png").stat().st_size > 10_000


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_products_of_a_step_are_counted(dtype, monkeypatch):
    """One second each: a 3×3 convolution has three (the first has no gradient of the image), a map three per chunk."""
    monkeypatch.setattr(model_floor, "fastest", lambda *forms: len([form() for form in forms]) / len(forms))
    for cached in (model_floor.conv_seconds, model_floor.map_seconds):
        cached.cache_clear()
    chunks, fused = 4, 2 + 3 + 3
    fused += chunks * (3 * (3 + 1) + 3 + (3 + 1) + 3)  # q, k, v and fc1 again in backward
    try:
        assert model_floor.floor("cltv-1/4", dtype) == (fused, fused + 1 + chunks * 4)
    finally:
        for cached in (model_floor.conv_seconds, model_floor.map_seconds):
            cached.cache_clear()


def test_a_wrong_model_gets_no_number(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(model_mem, "check_model", lambda *_: ({"conv_norm": "cpp"}, 0.5))
    status, results = model_memory(tmp_path, "--dtype", "float32")
    assert status == 1
    assert "FAILED: error 5.0e-01" in capsys.readouterr().out
    assert [row["status"] for row in results["memory"]] == ["ok", "ok", "failed", "failed"]
    assert {row["mode"] for row in results["speed"]} == {"eager", "reference"}
    assert results["sizes"] == []
    assert results["memory"][2]["kept"] is None


def test_a_model_that_does_not_fit_is_a_row(tmp_path, monkeypatch):
    build = training.build

    def full(name, mode):
        if mode == "eager":
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return build(name, mode)

    monkeypatch.setattr(model_mem, "build", full)
    status, results = model_memory(tmp_path, "--dtype", "float32")
    assert status == 0
    assert [row["status"] for row in results["memory"]][:2] == ["out of memory", "ok"]
    assert "eager" not in [row["mode"] for row in results["speed"]]
    model_mem_report.report(results)


@pytest.mark.parametrize("compiles", [True, False])
def test_compiled_models_are_a_row(tmp_path, monkeypatch, compiles):
    def compiled(model, **_):
        if compiles:
            return model
        return lambda images: (_ for _ in ()).throw(ValueError("no compiler\nand more"))

    monkeypatch.setattr(torch, "compile", compiled)
    status, results = model_memory(tmp_path, "--dtype", "float32", "--compile")
    assert status == 0
    row = next(row for row in results["speed"] if row["mode"] == "torch.compile")
    if compiles:
        assert row["step"]["median_s"] > 0
        assert row["note"].startswith("compiled in")
    else:
        assert (row["status"], row["step"], row["note"]) == ("fails", None, "ValueError: no compiler")


def test_the_eager_model_is_the_reference_but_for_dropout():
    images, labels = training.random_batch(2, 8, torch.device("cpu"), torch.float32)
    torch.manual_seed(0)
    eager = training.build("cpv-2/2", "eager")
    with training.served_ops() as served:
        eager.train()(images).sum().backward()
    assert "dropout" not in served
    torch.manual_seed(0)
    reference = training.build("cpv-2/2", "reference")
    assert torch.equal(eager.eval()(images), reference.eval()(images))
    with training.served_ops() as served:
        training.loss_of(reference.train(), images, labels, torch.float32)
    assert served["dropout"] == "reference"


@pytest.mark.parametrize("mode", training.MODES)
def test_ledger_is_all_that_autograd_saves(mode):
    model = training.build("cpv-2/2", mode).train()
    images, labels = training.random_batch(2, 16, torch.device("cpu"), torch.float32)
    loss = lambda: training.loss_of(model, images, labels, torch.float32)  # noqa: E731
    loss()
    given = (*model.parameters(), *model.buffers(), images, labels)
    ledger = model_ledger.measured(model, images, labels, torch.float32)
    assert ledger.total == memory.saved_for_backward(loss, given).beyond_inputs
    assert ledger.total == pytest.approx(ledger.allocated, abs=3 * model_ledger.RNG_STATE)
    assert not model._forward_hooks


def test_a_ledger_by_hand():
    """The stem, what it hands to conv + norm, and the head, of a model without layers to speak of."""
    model = training.build("cltv-1/1", "fused").train()
    model.layers = torch.nn.ModuleList()
    model.head = torch.nn.Linear(64, 10)
    images, labels = training.random_batch(2, 4, torch.device("cpu"), torch.float32)
    training.loss_of(model, images, labels, torch.float32)
    kinds = model_ledger.measured(model, images, labels, torch.float32).kinds
    pixels = 2 * 4 * 4
    head = 2 * 64 * 4 + 2 * 10 * 4  # the pooled features, log-softmax
    expected = {model_ledger.STEM: pixels * (3 + 32) * 4, model_ledger.HEAD: head}
    assert {kind: nbytes for kind, nbytes in kinds.items() if nbytes > 8} == pytest.approx(expected, abs=8)


def test_largest_that_fits():
    for limit in range(20):
        assert model_mem.largest_that(lambda n, limit=limit: n <= limit, 12) == min(limit, 12)


def test_line_through_peaks():
    assert model_mem.line_through({"8": 30, "16": 51, "32": 78}) == (14, 2)
    assert model_mem.line_through({"8": 30}) is None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--models", "cpv-5/4,magic"], "--models: must be some of cpv-5/4, cnv-5/4, cltv-5/4, got 'magic'"),
        (["--dtype", "bfloat16,int8"], "--dtype: must be some of float64, float32, float16, bfloat16, got 'int8'"),
        (["--batch", "0"], "--batch: must be an integer of at least 1, got '0'"),
        (["--budget", "-1"], "--budget: must be a positive number of seconds, got '-1'"),
        (["--markdown", "missing.json"], "--markdown: no such file: missing.json"),
        (["--plot", __file__], "is not a JSON of this benchmark"),
        (["--out", __file__], "--out: cannot make"),
    ],
)
def test_bad_values_of_model_mem(arguments, words, capsys):
    with pytest.raises(SystemExit) as exit_status:
        model_mem.main(arguments)
    message = capsys.readouterr().err
    assert exit_status.value.code == 2
    assert message.startswith("model_mem: error: ")
    assert words in message
    assert message.count("\n") == 1
