"""What the compiler makes of the Triton kernels for cards that are not here: tensor cores, no spills, sizes."""

import json
import sys
from pathlib import Path

import pytest
import torch

from cxv_kernels import OPS, explain_backend
from cxv_kernels._triton import TRITON_MISSING, interpreting
from cxv_kernels.ops.linear_attention.triton import configs

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tools"))

import triton_compile  # noqa: E402
import tune  # noqa: E402

pytestmark = pytest.mark.skipif(
    TRITON_MISSING is not None or interpreting(), reason=f"Triton: {TRITON_MISSING or 'interpreting'}"
)

# What the paper's models launch; of the other cases all in one dtype, the rest has the report.
MODELS = (
    "performer_attention softmax",
    "linear_attention softmax",
    "nystrom_attention residual",
    "conv_norm",
    "dropout",
    "gelu_dropout",
)
SHARED = {arch: card.block_shared for arch, card in triton_compile.CARDS.items()}  # bytes that a block may have
# Bytes: what scalar code makes of a single matrix product takes half of that. Float32's products are three.
CUBIN = {"float16": 192 << 10, "bfloat16": 192 << 10, "float32": 384 << 10}


def names(row):
    return f"{row.kernel} of {row.case}, {row.dtype}, sm_{row.arch}"


@pytest.fixture(scope="module")
def rows():
    """Every op in float16, the models' in bfloat16 and on a T4, attention in float32; the Performer narrow and wide."""
    performer = MODELS[:1]
    ops = [op for op in OPS if op != "kv_state"]  # the first half of linear_attention, but for elu
    calls = (
        (torch.float16, 80, 32, (*ops, "kv_state elu", triton_compile.IMPLICIT_GEMM)),
        (torch.float16, 75, 32, MODELS),
        (torch.bfloat16, 90, 32, MODELS),
        (torch.float32, 80, 32, performer),
        (torch.float32, 90, 32, performer),
        (torch.float16, 80, 16, performer),
        (torch.float16, 80, 64, performer),
        (torch.float16, 90, 64, performer),
    )
    found = [
        (arch, launch)
        for dtype, arch, dim, cases in calls
        for launch in triton_compile.launches(dtype, arch, dim=dim, only=cases)
    ]
    wide = triton_compile.launches(torch.float32, 80, dim=128, features=512, only=MODELS[:2])
    made = triton_compile.compile_all([*found, *((80, launch) for launch in wide)], disassemble=False)
    return list({id(row): row for row in made}.values())


@pytest.mark.slow
def test_every_op_compiles(rows):
    assert not [(names(row), row.error) for row in rows if row.error]
    served = {op for op in OPS if "has no" not in explain_backend(op, "cuda")["triton"]}
    launched = {arch: {row.case.partition(" ")[0] for row in rows if row.arch == arch} for arch in (80, 90)}
    assert served <= launched[80]
    assert {op.partition(" ")[0] for op in MODELS} <= launched[90]
    maps = {row.constants["MAP"] for row in rows if "MAP" in row.constants}
    assert {"favor", "favor_relu", "exact", "softmax", "elu", "relu"} <= maps
    assert any(row.case == triton_compile.IMPLICIT_GEMM for row in rows)


@pytest.mark.slow
def test_products_run_on_tensor_cores(rows):
    products = [row for row in rows if row.dot]
    for op in ("performer_attention", "linear_attention"):
        for arch in (80, 90):
            mine = [row for row in products if row.case.startswith(op) and row.arch == arch]
            assert len({row.kernel for row in mine}) >= 4  # keys and queries, forward and backward
    without = [row for row in products if row.instructions["HMMA"] + row.instructions["WGMMA"] == 0]
    assert {row.kernel for row in without if row.arch < 80} <= {"_convolve"}
    assert not [names(row) for row in without if row.arch >= 80 and row.dtype != "float32"]


@pytest.mark.slow
def test_float32_is_not_rounded_to_tf32(rows):
    """As long as torch.backends does not allow it, which it does for convolutions unless told otherwise: on tensor
    cores it is the sum of three products (tf32x3)."""
    products = [row for row in rows if row.dtype == "float32" and row.dot and row.kernel != "_convolve"]
    assert {row.constants["PRECISION"] for row in products} <= {"ieee", "tf32x3"}
    assert products


@pytest.mark.slow
def test_nothing_spills(rows):
    assert not {names(row): row.spills for row in rows if row.spills}
    sizes = {(row.constants.get("D"), row.constants.get("F"), row.dtype) for row in rows}
    assert {(16, 44, "float16"), (64, 266, "float16"), (128, 512, "float32"), (128, 128, "float32")} <= sizes


@pytest.mark.slow
def test_hoppers_products_overlap(rows):
    assert not [names(row) for row in rows if row.serialized]
    assert sum(row.instructions["WGMMA"] > 0 for row in rows) >= 8


@pytest.mark.slow
def test_sizes(rows):
    for row in rows:
        assert row.shared <= SHARED[row.arch], names(row)
        assert 0 < row.cubin <= CUBIN[row.dtype], names(row)
        assert 0 < row.registers <= 255, names(row)
        assert 0 < row.occupancy <= 1, names(row)


@pytest.mark.slow
def test_a_t4_gets_what_multiplies_no_matrices(rows):
    """But for the convolution that conv_norm's backward seldom needs."""
    older = [row for row in rows if row.arch == 75]
    assert {row.case.partition(" ")[0] for row in older} == {*MODELS, "nystrom_attention"} - set(MODELS[:3])
    assert {row.kernel for row in older if row.dot} == {"_convolve"}


@pytest.mark.slow
def test_machine_code(rows):
    """Of a head with 32 channels and 110 features: the instructions in the loop over tokens, and what ``rows`` has."""
    found = [(80, launch) for launch in triton_compile.launches(torch.float16, 80, only=MODELS[:1])]
    read = {row.kernel: row for row in triton_compile.compile_all(found)}
    known = {row.kernel: row for row in rows if row.case == MODELS[0] and (row.arch, row.dtype) == (80, "float16")}
    for kernel in ("key_pass", "query_pass", "query_backward", "key_backward"):
        assert 10 < read[kernel].issued < 1000
        for row in (read[kernel], known[kernel]):
            assert row.instructions["HMMA"] > 0
            assert row.spills == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--arch", "70"], "argument --arch: invalid choice"),
        (["--dtype", "float64"], "argument --dtype: invalid choice"),
    ],
)
def test_bad_values(run_script, arguments, words):
    message = run_script("tools/compile_report.py", *arguments, status=2)
    assert words in message
    assert "compile_report: error: " in message.splitlines()[-1]


@pytest.mark.slow
def test_report(run_script, tmp_path):
    file = tmp_path / "rows.json"
    arguments = ("--arch", 80, "--dtype", "float16", "--dims", 32, "--cases", "gelu_dropout", "--json", file)
    printed = run_script("tools/compile_report.py", *arguments)
    assert "gelu_dropout plain" in printed
    assert "0 do not compile, 0 with a fault" in printed
    assert {row["case"] for row in json.loads(file.read_text())["rows"]} == {"gelu_dropout plain"}


@pytest.mark.slow
def test_the_tuner_drops_what_does_not_fit(run_script, tmp_path):
    """Without a GPU; configs.py reads the table that it writes."""
    table, tried = tmp_path / "table.json", tmp_path / "tried.json"
    options = ("--arch", 90, "--dims", 32, "--dtype", "float16", "--kernels", "reduce", "--candidates", 2)
    run_script("tools/tune.py", "--rank-by", "compile", *options, "--table", table, "--json", tried)
    found = json.loads(tried.read_text())
    assert found["ranked_by"] == "compile"
    assert {entry["kernel"] for entry in found["tried"]} == {"reduce"}
    for entry in found["tried"]:
        assert len(entry["candidates"]) == 2
        assert entry["candidates"][0] == entry["packaged"]
        assert entry["seconds"] == [None] * 2  # nothing was timed
        assert not entry["notes"][entry["candidates"].index(entry["chosen"])]
    written = json.loads(table.read_text())
    assert found["table"] == written
    with configs.override(written):
        for entry in found["tried"]:
            assert configs.lookup("reduce", 90, entry["dim"], entry["features"], torch.float16) == entry["chosen"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"spills": 3}, "3 spills"),
        ({"shared": 1 << 20}, "shared memory"),
        ({"serialized": True}, "wait for one another"),
        ({}, ""),
    ],
)
def test_a_candidates_faults(change, words):
    row = triton_compile.Compiled("k", "c", "float16", 90, {}, {}, **change)
    assert (words in row.fault) if words else row.fault == ""


@pytest.mark.parametrize(
    ("costs", "chosen"), [((100.0, 99.0), 0), ((100.0, 97.0), 1), ((100.0, None, 50.0, 40.0), 3), ((None, None), 0)]
)
def test_the_cheapest_candidate(costs, chosen):
    """The packaged one, the first, unless another is cheaper by 2 %; those of no known cost only if all are."""
    assert tune._cheapest(range(len(costs)), costs) == chosen


def test_the_cheapest_of_those_left():
    assert tune._cheapest([2, 1], [10.0, 30.0, 20.0]) == 2
    assert tune._cheapest([], [10.0]) == 0


SASS = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/                   ISETP.GE.AND P0, PT, R2, R3, PT ;
        /*0020*/                   FADD R4, R4, R5 ;
        /*0030*/                   FMUL R4, R4, R5 ;
        /*0040*/                   FFMA R4, R4, R5, R6 ;
        /*0050*/              @!P1 BRA 0x30 ;
        /*0060*/              @P0  BRA 0x20 ;
        /*0070*/                   EXIT ;
        /*0080*/                   BRA 0x80;
"""


@pytest.mark.parametrize(("blocks", "count"), [(1, 5), (3, 5 + 2 * 3)])
def test_instructions_of_a_round(blocks, count):
    """The outer loop is five instructions from 0x20 to 0x60, three of them the loop inside."""
    assert triton_compile.instructions_of_a_round(SASS, blocks) == count


def test_without_a_loop_all_instructions_are_one_round():
    assert triton_compile.instructions_of_a_round("/*0000*/ MOV R1, R2 ; /*0010*/ EXIT ;", 1) == 2


@pytest.mark.parametrize(
    ("arch", "registers", "shared", "warps", "share"),
    [
        (90, 32, 0, 4, 1.0),  # 64 warps of 32·32 registers are all of them
        (90, 33, 0, 4, 0.75),  # rounded up to 40: 12 blocks of 4 warps
        (80, 16, 40 << 10, 4, 0.25),  # 164 K hold 4 blocks of 41 K
        (80, 16, 0, 1, 0.5),  # 32 blocks at most
        (75, 255, 0, 8, 0.25),
    ],
)
def test_occupancy(arch, registers, shared, warps, share):
    assert triton_compile.CARDS[arch].occupancy(registers, shared, warps) == share
