"""The ops as tests/ops calls them: one ``Case`` per op and variant, its inputs, and the error model."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial

import pytest
import torch
from conftest import ON_GPU, heads, needs_cpp
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import cxv_kernels
from cxv_kernels._triton import interpreting
from cxv_kernels.ops.linear_attention.triton import configs
from cxv_kernels.testing import CALLS, Call, Sizes, tolerance
from cxv_kernels.validation import FLOAT_DTYPES

gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
# TRITON_INTERPRET=1 runs Triton's kernels on the CPU, where they cannot be compiled: tests/test_triton.py starts it
BACKENDS = (
    [pytest.param("triton")]
    if interpreting()
    else [pytest.param("cpu", marks=needs_cpp), *(pytest.param(name, marks=gpu) for name in ("cuda", "triton"))]
)
if not ON_GPU:
    BACKENDS = BACKENDS[:1]
every_backend = pytest.mark.parametrize("backend", BACKENDS)
and_reference = pytest.mark.parametrize("backend", ["reference", *BACKENDS])


def device_of(backend: str) -> str:
    """The device that a backend's kernels run on."""
    return "cpu" if backend in ("reference", "cpu") or interpreting() else "cuda"


def dtypes_of(backend: str) -> Sequence[torch.dtype]:
    """The dtypes that the tests give to a backend."""
    if backend in ("reference", "cpu"):
        return FLOAT_DTYPES
    if interpreting():  # its bfloat16 products are wrong; the definitions and gradcheck are in float64
        return torch.float32, torch.float16
    return (torch.float32, torch.float16, *([torch.bfloat16] if backend == "triton" else []))


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


with_dtypes = pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        pytest.param(*param.values, dtype, marks=param.marks, id=f"{param.values[0]}-{name_of(dtype)}")
        for param in BACKENDS
        for dtype in dtypes_of(param.values[0])
    ],
)
"""(backend, dtype): all that run here."""
in_float64 = pytest.mark.parametrize("backend", ["reference", BACKENDS[0]])  # a GPU's kernels have no float64


TINY = Sizes(1, 2, 5, 6, 3, 4, (3, 3))
ODD = Sizes()
SMALL = Sizes(1, 2, 20, 23, 8, 5, (4, 5)) if interpreting() else ODD
SIZES = {
    "one": Sizes(1, 1, 1, 1, 1, 3, (2, 2)),
    "odd": ODD,
    "power-of-two": Sizes(1, 2, 64, 64, 16, 16, (8, 8)),
    "wide": Sizes(1, 2, 50, 50, 70, 129, (5, 13)),
    "long": Sizes(2, 2, 1030, 2200, 8, 33, (40, 41)),
}


@dataclass(frozen=True)
class Case:
    """A call of an op: ``function(*inputs, **constants, backend=…)``; constants are tensors without gradient.

    ``amplification``: by how much the op enlarges roundings: small denominators, exponents of several units.
    """

    op: str
    label: str
    function: Callable
    shapes: Callable[[Sizes], Sequence[tuple[int, ...]]]
    amplification: float = 1
    constants: Callable[[Sizes], dict[str, Tensor]] = field(default=lambda sizes: {})
    takes_mask: bool = False
    smooth: bool = True  # finite differences see the whole derivative: no maximum is detached

    def __str__(self) -> str:
        return f"{self.op}-{self.label}" if self.label else self.op

    def inputs(self, sizes: Sizes = ODD, dtype: torch.dtype = torch.float64, grad: bool = False) -> list[Tensor]:
        """Normal random inputs, those of conv_norm and of the residual scaled as a layer's are."""
        drawn = [heads(*shape) for shape in self.shapes(sizes)]
        if self.op == "conv_norm":
            drawn[1] /= (9 * sizes.dim) ** 0.5
            drawn[-2] = 1 + 0.2 * drawn[-2]
            if self.label == "channels_last":
                drawn[0] = drawn[0].contiguous(memory_format=torch.channels_last)
        if self.label == "residual" and self.op == "nystrom_attention":
            drawn[-1] /= drawn[-1].shape[2] ** 0.5
        return [t.to(dtype).requires_grad_(grad) for t in drawn]

    def bind(self, backend: str, sizes: Sizes = ODD, **constants: Tensor | None) -> Callable[..., tuple[Tensor, ...]]:
        """A function of the inputs that returns a tuple of outputs; skips the test if a GPU's backend lacks the op."""
        bound = self.constants(sizes) | constants
        if (reason := self.support(backend)) != "supported":
            pytest.skip(f"{backend}: {reason}")

        def call(*inputs: Tensor) -> tuple[Tensor, ...]:
            placed = {k: t.to(inputs[0].device) if isinstance(t, Tensor) else t for k, t in bound.items()}
            out = self.function(*inputs, **placed, backend=backend)
            return out if isinstance(out, tuple) else (out,)

        return call

    def support(self, backend: str) -> str:
        """ "supported", or why a GPU's backend does not have the op."""
        on_gpu = backend in ("cuda", "triton") and ON_GPU
        return cxv_kernels.explain_backend(self.op, "cuda")[backend] if on_gpu else "supported"

    def depth(self, sizes: Sizes) -> int:
        """The terms of the longest sum."""
        if self.op == "conv_norm":
            return max(9 * sizes.dim, 9 * sizes.value_dim, sizes.batch * sizes.image[0] * sizes.image[1])
        return max(sizes.queries, sizes.keys, 1)


def image(c_in: int, c_out: int, size: tuple[int, int] = (6, 9), batch: int = 2) -> Sizes:
    """Sizes of conv_norm."""
    return Sizes(batch=batch, dim=c_in, value_dim=c_out, image=size)


def projection(features: int, dim: int) -> Tensor:
    """A projection (M, D) in float64, the same in every call."""
    generator = torch.Generator().manual_seed(3)
    return cxv_kernels.orthogonal_projection(features, dim, generator=generator, dtype=torch.float64)


def mask_of(sizes: Sizes) -> Tensor:
    """A key mask (B, N_k) that hides most of image 0, and all of image 1 if there is one."""
    mask = torch.arange(sizes.batch * sizes.keys).view(sizes.batch, sizes.keys) % 3 == 0
    mask[1:2] = False
    return mask


def random_features(sizes: Sizes) -> dict[str, Tensor]:
    return {"projection": projection(sizes.dim + 4, sizes.dim)}


def dropout_seed(sizes: Sizes) -> dict[str, Tensor]:
    return {"seed": torch.tensor(12345)}


def calls_of(op: str) -> list[Call]:
    return [call for call in CALLS if call.op == op]


MAPS = tuple(call.label for call in calls_of("linear_attention"))
LINEAR = [Case(*call, 4 if call.label == "relu" else 1, takes_mask=True) for call in calls_of("linear_attention")]
PERFORMER = [
    Case(*call, 2 if call.label == "relu" else 8, random_features, True, smooth=call.label != "softmax")
    for call in calls_of("performer_attention")
]
STATE = [Case(*call, 4, takes_mask=True) for call in calls_of("kv_state")]
FEATURES = [Case(*call, 4, random_features, smooth="relu" in call.label) for call in calls_of("performer_features")]
NYSTROM = [
    Case(op, label, partial(function, num_landmarks=3), shapes, 8)
    for op, label, function, shapes in calls_of("nystrom_attention")
]
CONV_NORM = [Case(*call, 4) for call in calls_of("conv_norm")]
DROPOUT = [
    *(Case(*call, 1, dropout_seed) for call in calls_of("dropout")),
    *(Case(*call, 4, dropout_seed) for call in calls_of("gelu_dropout")),
]
FOUR_KERNELS = ("key_pass", "query_pass", "query_backward", "key_backward")
LINEAR_FAMILY = [*LINEAR, *PERFORMER]
ATTENTION_CASES = [*LINEAR_FAMILY, *NYSTROM]
MASKED = [case for case in (*LINEAR, *PERFORMER, *STATE) if case.takes_mask]
CASES = [*LINEAR, *PERFORMER, *STATE, *FEATURES, *NYSTROM, *CONV_NORM, *DROPOUT]
ONE_PER_OP = list({case.op: case for case in reversed(CASES) if case.label != "no-bias"}.values())
# And those of other tensors, strides or steps. The others differ in a constant alone: in the formula, not in what is
# read, written, traced or saved.
_OTHERS = ["kv_state-elu", "performer_features-softmax-key", "nystrom_attention-residual", "dropout-residual"]
_OTHERS += ["conv_norm-channels_last", "conv_norm-no-bias"]
TRACED = [case for case in CASES if case in ONE_PER_OP or str(case) in _OTHERS]
VARIED = TRACED if interpreting() else CASES  # for such properties: all cases take long in Triton's interpreter


def every(cases: Sequence[Case]) -> pytest.MarkDecorator:
    """Parametrize a test by ``case``."""
    return pytest.mark.parametrize("case", cases, ids=str)


def gradient_like(out: Tensor) -> Tensor:
    """A fixed gradient of an output, exact in every dtype."""
    return ((torch.arange(out.shape[-1], device=out.device) % 5 - 2).to(out.dtype) / 2).expand(out.shape)


def run(
    call: Callable[..., tuple[Tensor, ...]], inputs: Sequence[Tensor], grads: Sequence[Tensor] | None = None
) -> list[Tensor]:
    """Outputs, then the gradients of all inputs, for ``grads`` or for fixed gradients of the outputs."""
    inputs = [t.detach().requires_grad_() for t in inputs]
    outs = call(*inputs)
    if grads is None:
        grads = [gradient_like(o) for o in outs]
    pairs = [(o, g) for o, g in zip(outs, grads, strict=True) if o.requires_grad]
    gradients = torch.autograd.grad([o for o, _ in pairs], inputs, [g.to(o) for o, g in pairs], allow_unused=True)
    gradients = [torch.zeros_like(t) if g is None else g for g, t in zip(gradients, inputs, strict=True)]
    return [t.detach() for t in (*outs, *gradients)]


def needed_gradients(
    call: Callable[..., tuple[Tensor, ...]], inputs: Sequence[Tensor], needed: Sequence[int]
) -> list[Tensor | None]:
    """The gradients of the inputs at the places ``needed``, and None for the others, for fixed ones of the outputs."""
    leaves = [t.detach().clone().requires_grad_(i in needed) for i, t in enumerate(inputs)]
    if outs := [out for out in call(*leaves) if out.requires_grad]:
        torch.autograd.backward(outs, [gradient_like(out) for out in outs])
    return [t.grad for t in leaves]


def assert_close_to_float64(
    case: Case,
    backend: str,
    inputs: Sequence[Tensor],
    sizes: Sizes = ODD,
    amplification: float = 1,
    grads: Sequence[Tensor] | None = None,
    **constants: Tensor | None,
) -> list[Tensor]:
    """Compare outputs and gradients with the float64 reference on the same inputs, within the error model.

    ``grads``: of the outputs, see `run`. Returns outputs and gradients.
    """
    dtype = inputs[0].dtype
    placed = [t.detach().to(device_of(backend)) for t in inputs]
    wants = run(case.bind("reference", sizes, **constants), [t.detach().double() for t in inputs], grads)
    gots = run(case.bind(backend, sizes, **constants), placed, grads)
    for place, (got, want) in enumerate(zip(gots, wants, strict=True)):
        assert got.shape == want.shape
        assert place < len(gots) - len(inputs) or got.dtype == inputs[place - len(gots)].dtype
        error = (got.cpu().double() - want).abs()
        bound = tolerance(want, dtype, case.depth(sizes), amplification * case.amplification)
        assert error.numel() == 0 or error.max() <= bound, f"result {place}: {error.max():.2e} > {bound:.2e}"
    return gots


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fresh memory is filled with NaN, which shows where a kernel leaves it."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(4).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class OpCalls(TorchDispatchMode):
    """Records (op, arguments) of the calls of our ops."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[Callable, tuple]] = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.namespace.startswith("cxv_kernels"):
            self.made.append((op, args))
        return op(*args, **(kwargs or {}))


def short_splits(**options: int | bool) -> AbstractContextManager[None]:
    """A table of Triton's launch options that cuts few tokens into several splits; with other options, too."""
    entries = {name: configs.lookup(name, 0, 32, None, torch.float32) for name in FOUR_KERNELS}
    short = {"TOKENS": 64, "BLOCK_N": 32} | options
    return configs.override({name: {"default": entry | short} for name, entry in entries.items()})
