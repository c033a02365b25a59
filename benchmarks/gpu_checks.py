"""gpu_suite.py's checks: every op by every backend, and the models' gradients, against float64; CUDA graphs.

On its own it checks one backend in one process, for tools that watch a process (compute-sanitizer) and for libraries
built another way: ``python benchmarks/gpu_checks.py --backend cuda --size small --json FILE``.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from common import DTYPES, TOLERANCE, Parser, some_of, write_json
from gpu_models import served_by
from gpu_speed import IMPLICIT_GEMM, Settings, convolving, explain
from gpu_worker import Emit
from torch import Tensor, nn
from training import MODEL_TOLERANCE, build, loss_of, random_batch, served_ops, weights_dtype

from cxv_kernels import backends, checks

# (batch, heads, tokens, channels of a head, whether no size divides anything)
SIZES = {
    "tiny": (1, 2, 33, 16, True),
    "small": (2, 2, 200, 32, True),
    "wide": (2, 3, 130, 64, True),
    "models": (32, 4, 1024, 32, False),
    "long": (4, 8, 4096, 64, False),
}
LOSS_SCALE = 1024.0  # as a gradient scaler would, so that float16 holds the small ones


def check_op(settings: Settings, emit: Emit, op: str, backend: str, size: str, dtypes: Sequence[str]) -> None:
    """Every case of the op by one backend in these dtypes, forward and backward."""
    *shape, ragged = SIZES[size]
    exact_on = "cpu" if ragged else settings.device  # large ones would take the CPU seconds each
    for case in checks.cases(*shape, ragged=ragged):
        if case.op != op or (backend == IMPLICIT_GEMM and case.label != "channels_last"):
            continue
        for dtype in dtypes:
            row = {"op": op, "case": case.label, "backend": backend, "dtype": dtype, "size": size}
            served = explain(op, backend, settings.device, DTYPES[dtype], case.dim)
            if served != "serves":
                emit(row | {"status": "not served", "note": served})
                continue
            try:
                with convolving(backend) as name:
                    result = checks.run(case, name, settings.device, DTYPES[dtype], exact_on)
            except Exception as error:
                words = " ".join(f"{type(error).__name__}: {error}".split())
                emit(row | {"status": "failed", "note": words[:1000]})
                if settings.where.type == "cuda":
                    torch.cuda.synchronize()  # raises where no later kernel would run
                continue
            status = "ok" if result.passed else "failed"
            emit(row | {"status": status, "max_error": result.error, "of_tolerance": result.ratio})


@contextmanager
def deterministic_cudnn() -> Iterator[None]:
    """In the block: else a weight's gradient may be summed in another order, and have other bits, at each call."""
    before, torch.backends.cudnn.deterministic = torch.backends.cudnn.deterministic, True
    try:
        yield
    finally:
        torch.backends.cudnn.deterministic = before


@deterministic_cudnn()
def check_graph(settings: Settings, emit: Emit, op: str, backend: str, dtype: str) -> None:
    """The op's cases captured in a CUDA graph, forward and backward: a replay on new inputs gives the same bits."""
    for case in checks.cases(2, 4, 64 if settings.quick else 1024, 32, ragged=False, device=settings.device):
        if case.op != op:
            continue
        row = {"op": op, "case": case.label, "backend": backend, "dtype": dtype}
        served = backends.explain_backend(op, settings.device, DTYPES[dtype], case.dim)[backend]
        if served != "serves":
            emit(row | {"status": "not served", "note": served})
            continue
        held = [torch.randn(shape, device=settings.device).to(DTYPES[dtype]) for shape in case.shapes]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        seeds = _seeds(case, held, backend)

        def run(held: list[Tensor] = held, case: checks.Case = case, seeds: list[Tensor] = seeds) -> list[Tensor]:
            inputs = [t.detach().requires_grad_() for t in held]
            out = case.function(*inputs, backend=backend)
            outs = list(out) if isinstance(out, tuple) else [out]
            return [*(o.detach() for o in outs), *torch.autograd.grad(outs, inputs, seeds)]

        with torch.cuda.stream(stream):
            for _ in range(2):
                run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = run()
        for t in held:
            t.copy_(torch.randn(t.shape, device=t.device))
        graph.replay()
        torch.cuda.synchronize()
        equal = all(torch.equal(a, b) for a, b in zip(captured, run(), strict=True))
        emit(row | {"status": "ok" if equal else "failed", "note": None if equal else "a replay gives other bits"})


def _seeds(case: checks.Case, held: list[Tensor], backend: str) -> list[Tensor]:
    with torch.no_grad():
        out = case.function(*held, backend=backend)
    return [torch.randn_like(o) for o in (out if isinstance(out, tuple) else (out,))]


# --- models ------------------------------------------------------------------------------------------------------


def model_gradients(model: nn.Module, images: Tensor, labels: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """The loss and every parameter's gradient; the dropout's seeds are the same at each call."""
    torch.manual_seed(1)
    loss = loss_of(model, images, labels, dtype)
    names = [name for name, _ in model.named_parameters()]
    grads = torch.autograd.grad(loss * LOSS_SCALE, list(model.parameters()))
    return {"loss": loss.detach().double()} | {n: g.double() / LOSS_SCALE for n, g in zip(names, grads, strict=True)}


def distance(found: dict[str, Tensor], exact: dict[str, Tensor]) -> tuple[float, str]:
    """The largest ‖found − exact‖ / ‖exact‖, and whose it is; a parameter counts with at least 1 % of all gradients."""
    total = torch.stack([g.norm() for name, g in exact.items() if name != "loss"]).norm()
    errors = {n: float((found[n] - e).norm() / torch.maximum(e.norm(), total / 100)) for n, e in exact.items()}
    worst = max(errors, key=lambda n: errors[n] if errors[n] == errors[n] else float("inf"))
    return errors[worst], worst


def check_model(settings: Settings, emit: Emit, model: str, dtype: str, batch: int, side: int) -> None:
    """The loss and all gradients of the model by every backend, and of its reference, against the reference in float64.

    In 16 bits under autocast; the reference's own distance says how much of it is the dtype's.
    """
    device, kind = settings.where, DTYPES[dtype]
    torch.manual_seed(0)
    weights = build(model, "reference").state_dict()

    def gradients(mode: str, kind: torch.dtype) -> dict[str, Tensor]:
        made = build(model, mode)
        made.load_state_dict(weights)
        images, labels = random_batch(batch, side, device, kind)
        return model_gradients(made.to(device, weights_dtype(kind)).train(), images, labels, kind)

    with checks.without_tf32():
        exact = gradients("reference", torch.float64)
        reference, _ = distance(gradients("reference", kind), exact)
        tolerance = MODEL_TOLERANCE * TOLERANCE[kind]
        for backend in settings.backends:
            row: dict[str, Any] = {"model": model, "dtype": dtype, "backend": backend, "tolerance": tolerance}
            row["reference_error"] = reference
            try:
                with served_by(backend), served_ops() as served:
                    error, worst = distance(gradients("fused", kind), exact)
            except Exception as failure:
                emit(row | {"status": "failed", "note": " ".join(f"{type(failure).__name__}: {failure}".split())[:500]})
                if device.type == "cuda":
                    torch.cuda.synchronize()
                continue
            status = "not served" if backend not in served.values() else "ok" if error <= tolerance else "failed"
            emit(row | {"status": status, "error": error, "worst": worst, "served": served})


# --- on its own --------------------------------------------------------------------------------------------------


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; exits with status 2 and one line on a bad value."""
    parser = Parser("gpu_checks", description=__doc__.partition("\n")[0])
    parser.add_argument("--backend", choices=backends.BACKENDS[2:], required=True)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--size", choices=tuple(SIZES), default="small")
    parser.add_argument("--dtype", type=some_of(tuple(DTYPES)), default=("float32", "float16"), help="comma-separated")
    parser.add_argument("--ops", type=some_of(backends.OPS), default=backends.OPS, help="comma-separated")
    parser.add_argument("--json", type=Path, metavar="FILE", required=True)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Check; write the rows after each; 0, or 1 if one fails."""
    arguments = parse(argv)
    rows: list[dict[str, Any]] = []

    def emit(row: dict[str, Any]) -> None:
        rows.append(row)
        write_json(arguments.json, {"rows": rows})

    settings = Settings(arguments.device, (arguments.backend,))
    for op in arguments.ops:
        check_op(settings, emit, op, arguments.backend, arguments.size, arguments.dtype)
    served = [row for row in rows if row["status"] != "not served"]
    failed = [row for row in served if row["status"] != "ok"]
    print(f"{arguments.backend}: {len(served)} checks, {len(failed)} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
