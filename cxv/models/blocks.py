"""Building blocks of the models: pixels as tokens, residual branches, convolution with norm, and the MLP.

A residual branch saves only its input for the backward pass; :meth:`ResidualBranch.forward` implements this. The
functions above it apply linear maps to pixels, and the classes below it are the sub-layers.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Proxy
from torch.utils.checkpoint import checkpoint

import cxv_kernels
from cxv_kernels.tracing import record_call, refuse_torchscript
from cxv_kernels.validation import is_plain_tensor

# Tokens of a chunk, which backward recomputes at once. On a CPU the widest tensors of a chunk stay in the last-level
# cache. A GPU needs more work at a time; the number for GPUs has not been measured yet.
CHUNK_TOKENS = 8192
DEVICE_CHUNK_TOKENS = 65536


# --- pixels and tokens ------------------------------------------------------------------------------------------------


def to_tokens(x: Tensor) -> Tensor:
    """Reshape x (B, C, H, W) to (B, H·W, C), pixels in raster order. The result is a view if x is channels_last."""
    return x.flatten(2).transpose(1, 2)


def to_pixels(tokens: Tensor, like: Tensor) -> Tensor:
    """Return tokens (B, H·W, C) as a view (B, C, H, W), channels_last in memory."""
    # not unflatten, because torch.onnx.export(dynamo=False) treats the sizes of its result as constants
    return tokens.transpose(1, 2).view(tokens.shape[0], tokens.shape[2], *like.shape[2:])


def to_channels_last(x: Tensor) -> Tensor:
    """Convert x (B, C, H, W) to channels_last with operations that ``torch.func.vmap`` supports."""
    return x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)


# --- linear maps of pixels --------------------------------------------------------------------------------------------


def has_hooks(*modules: nn.Module) -> bool:
    """Return True if a hook can change or keep the input or output of one of these modules."""
    own = any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks for m in modules)
    shared = nn.modules.module
    forward = shared._global_forward_hooks or shared._global_forward_pre_hooks
    return bool(own or forward or shared._global_backward_hooks or shared._global_backward_pre_hooks)


def is_unmodified(layer: nn.Module) -> bool:
    """Return True if a fused op can use the weights of the layer directly.

    The layer is then an nn.Linear, nn.Conv2d ("same" padding) or nn.LayerNorm without hooks and with plain tensors as
    weights. Every other layer must be called: an adapter, a pruned layer, a layer with hooks, or a layer with quantized
    or distributed weights (tensor subclasses).
    """
    if type(layer) not in (nn.Linear, nn.Conv2d, nn.LayerNorm) or "forward" in layer.__dict__ or has_hooks(layer):
        return False
    if not all(t is None or is_plain_tensor(t) for t in (layer.weight, layer.bias)):
        return False
    if type(layer) is not nn.Conv2d:
        return True
    same = tuple(k // 2 for k in layer.kernel_size)
    return (layer.stride, layer.dilation, layer.padding, layer.padding_mode) == ((1, 1), (1, 1), same, "zeros")


def pointwise(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Apply the linear map ``weight`` (C_out, C_in) to every pixel of x (B, C_in, H, W)."""
    # In float32 on a CPU, oneDNN's convolution is up to twice as fast as the BLAS behind F.linear, and its backward is
    # a fifth faster if all tokens are one row of pixels.
    if x.device.type == "cpu" and x.dtype == torch.float32 and x.numel() and not torch.is_autocast_enabled("cpu"):
        row = to_tokens(x).reshape(1, 1, -1, x.shape[1]).permute(0, 3, 1, 2)
        y = F.conv2d(row, weight[:, :, None, None], bias)
        return to_pixels(to_tokens(y).reshape(x.shape[0], -1, y.shape[1]), x)
    return to_pixels(F.linear(to_tokens(x), weight, bias), x)


def linear(layer: nn.Module, x: Tensor) -> Tensor:
    """The linear map ``layer`` at every pixel of x (B, C_in, H, W); a modified one gets tokens."""
    if is_unmodified(layer):
        return pointwise(x, layer.weight, layer.bias)
    return to_pixels(layer(to_tokens(x)), x)


def convolve(conv: nn.Module, x: Tensor) -> Tensor:
    """conv(x), where a 1×1 kernel is a linear map."""
    if is_unmodified(conv) and conv.kernel_size == (1, 1) and conv.groups == 1:
        return pointwise(x, conv.weight.flatten(1), conv.bias)
    return conv(x)


# --- recomputation ----------------------------------------------------------------------------------------------------


def records_or_transforms() -> bool:
    """Return True while PyTorch records or transforms operations, which rules out chunks and recomputation.

    TorchScript tracing and ``make_fx`` would unroll the loop over chunks for the batch size of the example.
    ``torch.func`` and ``disable_saved_tensors_hooks`` do not support ``torch.utils.checkpoint``.
    """
    return (
        torch.jit.is_tracing()
        or torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None
        or torch._C._are_functorch_transforms_active()
        or not torch._C._autograd._saved_tensors_hooks_is_enabled()
    )


class ForwardState:
    """Store the state of a module, so that ``torch.utils.checkpoint`` can recompute a forward pass in backward.

    Create it directly before the forward pass. The recomputation then uses the backend, the ``training`` and
    ``requires_grad`` flags, the submodules and the weights of the forward pass, even if
    ``torch.func.functional_call`` had replaced them. Afterwards the module has its own state again.

    Args:
        module: The module that is recomputed.
        changing: Submodules whose forward pass can change their buffers, such as BatchNorm. The recomputation gets
            copies with the values from before the forward pass, so no buffer is updated twice.

    Raises:
        RuntimeError: In the backward pass, if a weight or another buffer was modified in place after the forward pass.
    """

    def __init__(self, module: nn.Module, changing: Iterable[nn.Module] = ()):
        self._backend = cxv_kernels.get_backend()
        self._attributes: list[tuple[dict, str, Any]] = []  # submodules and training flags
        self._tensors: list[tuple[dict, str, Tensor, int | None, bool]] = []  # with version and requires_grad
        self._copies: list[tuple[dict, str, Tensor]] = []
        changing = set(changing)
        for m in module.modules():
            self._attributes.append((m.__dict__, "training", m.training))
            self._attributes += [(m._modules, name, child) for name, child in m._modules.items()]
            for table in (m._parameters, m._buffers):
                for name, t in table.items():
                    if t is None:
                        continue
                    if table is m._buffers and m in changing:
                        self._copies.append((table, name, t.detach().clone()))
                    else:
                        self._tensors.append((table, name, t, _version(t), t.requires_grad))

    def checkpoint(self, function: Callable[..., Tensor], *args: Any, preserve_rng_state: bool) -> Tensor:
        """Return ``function(*args)`` and save only the tensors in ``args`` for the backward pass."""
        is_forward = True

        def run(*args: Any) -> Tensor:
            nonlocal is_forward
            if is_forward:
                is_forward = False
                return function(*args)
            with self._restored():
                return function(*args)

        return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=preserve_rng_state)

    @contextmanager
    def _restored(self) -> Iterator[None]:
        state = self._attributes + [(table, name, copy.clone()) for table, name, copy in self._copies]
        for table, name, tensor, version, requires_grad in self._tensors:
            if _version(tensor) != version:
                raise RuntimeError(
                    "one of the variables needed for gradient computation has been modified by an inplace operation: "
                    f"{name!r} of shape {tuple(tensor.shape)} is at version {_version(tensor)}; expected version "
                    f"{version} instead. The model recomputes activations in the backward pass, so call backward() "
                    "before anything changes its weights or buffers (an optimizer's step(), redraw_projection_(), …)."
                )
            now = table.get(name)
            value = now if _is_sharded(tensor, now) else tensor
            if value.requires_grad != requires_grad:  # gradients flow through the graph of the forward pass alone
                value = value.detach().requires_grad_(requires_grad)
            state.append((table, name, value))
        replaced = []
        try:
            for table, name, value in state:
                if table.get(name) is not value:
                    replaced.append((table, name, table.get(name)))
                    table[name] = value
            with cxv_kernels.use_backend(self._backend):
                yield
        finally:
            for table, name, value in replaced:
                table[name] = value


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


def _is_sharded(then: Tensor, now: Tensor | None) -> bool:
    """Return True if FSDP has replaced the shard ``then`` by the whole parameter ``now``, outside of the forward pass.

    Its hooks do this again before the recomputation, which must then use ``now``.
    """
    if now is None or now is then:
        return False
    like = (now.shape, now.dtype, now.device) == (then.shape, then.dtype, then.device)
    return type(then) not in (Tensor, nn.Parameter) or not like


# --- residual branches ------------------------------------------------------------------------------------------------


class DropoutFn:
    """Dropout of pixels (B, C, H, W) with a mask from a seed, so that a recomputation drops the same elements.

    Args:
        rate: Probability of a zero.
        seed: See :func:`cxv_kernels.dropout_seed`. None disables dropout.
        first_image: Index in the batch of the first image, which selects the slice of the batch's mask.
        path: Stochastic depth (Huang et al. 2016): a factor for the branch of each image, shape (B,), or None.
        backend: As in :func:`cxv_kernels.dropout`.
    """

    def __init__(self, rate: float, seed: Tensor | None, first_image: int, path: Tensor | None, backend: str | None):
        self.rate, self.seed, self.first_image, self.path, self.backend = rate, seed, first_image, path, backend

    def __call__(self, x: Tensor, residual: Tensor) -> Tensor:
        """Return residual + path · dropout(x)."""
        tokens, residual = to_tokens(x), to_tokens(residual)
        if self.path is not None:
            tokens = tokens if self.seed is None else self._dropout(cxv_kernels.dropout, tokens)
            out = residual + tokens * self.path[:, None, None].to(tokens.dtype)
        elif self.seed is not None:
            out = self._dropout(cxv_kernels.dropout, tokens, residual=residual)
        else:
            out = tokens + residual
        return to_pixels(out, x)

    def gelu(self, x: Tensor) -> Tensor:
        """Return dropout(GELU(x))."""
        tokens = to_tokens(x)
        return to_pixels(F.gelu(tokens) if self.seed is None else self._dropout(cxv_kernels.gelu_dropout, tokens), x)

    def _dropout(self, op: Callable[..., Tensor], tokens: Tensor, **options: Any) -> Tensor:
        offset = self.first_image * tokens.shape[1:].numel()
        return op(tokens, self.rate, self.seed, offset=offset, backend=self.backend, **options)


class ResidualBranch(nn.Module):
    """x (B, C, H, W) → x + branch(x), dropout included. A subclass defines the branch as :meth:`forward_chunk`.

    With ``use_fused`` the batch is split into chunks of images, and only x is saved for backward, which recomputes one
    chunk at a time (see :class:`ForwardState`). If a layer inside was modified, or PyTorch records or transforms the
    branch (tracing, ``torch.func``), the branch runs once on the whole batch and saves activations like
    ``use_fused=False``.

    Args:
        dim: C, the channels.
        drop_rate: Probability of dropout in training.
        use_fused: Use the fused ops, see above. False uses the reference.
        pre_norm: Apply a LayerNorm before the branch.
        recompute: If False, save the activations of the whole batch, which is faster and needs more memory.
        drop_path_rate: Probability in training that an image skips the branch.
    """

    num_dropouts = 1  # number of dropouts in the branch
    first_image = 0  # index in the batch of x's first image, so that a slice of a batch uses its slice of the masks
    couples_images = False  # True if an image changes the results of others; the batch is then one chunk
    __prepare_scriptable__ = refuse_torchscript

    def __init__(
        self,
        dim: int,
        drop_rate: float = 0.0,
        use_fused: bool = False,
        pre_norm: bool = False,
        recompute: bool = True,
        drop_path_rate: float = 0.0,
    ):
        super().__init__()
        self.pre_norm = nn.LayerNorm(dim) if pre_norm else None
        self.drop_rate, self.drop_path_rate = drop_rate, drop_path_rate
        self.use_fused = use_fused
        self.recompute = recompute
        self.backend = None if use_fused else "reference"

    def forward_chunk(self, x: Tensor, *dropouts: DropoutFn) -> Tensor:
        """Return x + branch(x) for some images of the batch. The last dropout adds x."""
        raise NotImplementedError

    def forward(self, x: Tensor, inplace: bool = False) -> Tensor:
        """Return x + branch(x). With ``inplace`` and without gradients, the result may be written into x."""
        if isinstance(x, Proxy):
            return record_call(self, x)
        grad, compiling = torch.is_grad_enabled(), torch.compiler.is_compiling()
        noise = self._draw_noise(x.device)
        whole = (
            not self.use_fused
            or not all(map(is_unmodified, self.children()))  # a modified layer sees the whole batch, once
            or (grad and not self.recompute)
            or (compiling and (not grad or torch.compiler.is_exporting()))
            or (not compiling and records_or_transforms())
        )
        if whole:
            return self._run(x, self.first_image, *noise)
        if compiling:  # the compiler plans memory itself; dropout draws from seeds: there is no random state to restore
            return checkpoint(self._run, x, self.first_image, *noise, use_reentrant=False, preserve_rng_state=False)
        size = self._chunk_size(x)
        chunks = [(part, self.first_image + i * size, *noise) for i, part in enumerate(x.split(size))]
        if grad:
            state = ForwardState(self)
            outputs = [state.checkpoint(self._run, *chunk, preserve_rng_state=False) for chunk in chunks]
            # as tokens: torch.cat takes a channels_last image alone for a contiguous one
            return outputs[0] if len(chunks) == 1 else to_pixels(torch.cat([to_tokens(y) for y in outputs]), x)
        if len(chunks) == 1:
            return self._run(*chunks[0])
        out = None
        for chunk in chunks:
            y, start = self._run(*chunk), chunk[1] - self.first_image
            if out is None:  # autocast may have changed the dtype
                out = x if inplace and y.dtype == x.dtype else torch.empty_like(x, dtype=y.dtype)
            out[start : start + size] = y
            del y  # before the next chunk takes memory
        return out

    def normed(self, x: Tensor) -> Tensor:
        """Return x (B, C, H, W), or its norm if the branch has one."""
        return x if self.pre_norm is None else to_pixels(self.pre_norm(to_tokens(x)), x)

    def _chunk_size(self, x: Tensor) -> int:
        """Return the number of images per chunk, at least 1."""
        if self.couples_images:
            return max(1, x.shape[0])
        tokens = CHUNK_TOKENS if x.device.type == "cpu" else DEVICE_CHUNK_TOKENS
        return max(1, tokens // max(1, x.shape[2] * x.shape[3]))

    def _draw_noise(self, device: torch.device) -> tuple[Any, ...]:
        """Return the rates of dropout and stochastic depth (0 in evaluation) and the seeds for nonzero rates."""
        drop, path = (self.drop_rate, self.drop_path_rate) if self.training else (0.0, 0.0)
        count = (self.num_dropouts if drop else 0) + (1 if path else 0)
        return drop, path, *(cxv_kernels.dropout_seed(device) for _ in range(count))

    def _run(self, x: Tensor, first_image: int, drop_rate: float, path_rate: float, *seeds: Tensor) -> Tensor:
        """Return forward_chunk(x) with the masks of these seeds."""
        path = None
        if path_rate:
            *seeds, seed = seeds
            path = cxv_kernels.dropout(
                x.new_ones(x.shape[0]), path_rate, seed, offset=first_image, backend=self.backend
            )
        masks = seeds or [None] * self.num_dropouts
        return self.forward_chunk(x, *(DropoutFn(drop_rate, s, first_image, path, self.backend) for s in masks))

    def extra_repr(self) -> str:
        path = f", drop_path_rate={self.drop_path_rate:g}" if self.drop_path_rate else ""
        return f"drop_rate={self.drop_rate}, use_fused={self.use_fused}{path}"


class Mlp(ResidualBranch):
    """x + MLP(x): 1×1 convolution, GELU, dropout, 1×1 convolution, dropout. Further arguments: ResidualBranch."""

    num_dropouts = 2

    def __init__(self, dim: int, hidden_dim: int, *args: Any, **kwargs: Any):
        super().__init__(dim, *args, **kwargs)
        self.fc1 = nn.Conv2d(dim, hidden_dim, 1)
        self.fc2 = nn.Conv2d(hidden_dim, dim, 1)

    def forward_chunk(self, x: Tensor, dropout1: DropoutFn, dropout2: DropoutFn) -> Tensor:
        hidden = dropout1.gelu(convolve(self.fc1, self.normed(x)))
        return dropout2(convolve(self.fc2, hidden), residual=x)


class ConvNorm(nn.Module):
    """The convolutional sub-layer: 3×3 convolution, then LayerNorm over channels (sections 3.3 and 3.4), in one op.

    Modified or replaced layers are called separately: a LayerNorm gets tokens (B, N, C), another norm gets pixels.
    """

    __prepare_scriptable__ = refuse_torchscript

    def __init__(self, in_chans: int, out_chans: int, use_fused: bool):
        super().__init__()
        self.conv = nn.Conv2d(in_chans, out_chans, 3, padding=1)
        self.norm: nn.Module = nn.LayerNorm(out_chans)
        self.backend = None if use_fused else "reference"

    def owns_output(self) -> bool:
        """Return True if no other code can hold the output, because the layers are unmodified."""
        return is_unmodified(self.conv) and type(self.norm) is nn.LayerNorm

    def forward(self, x: Tensor) -> Tensor:
        """Map x (B, in_chans, H, W) to (B, out_chans, H, W)."""
        if isinstance(x, Proxy):
            return record_call(self, x)
        conv, norm = self.conv, self.norm
        unmodified = type(norm) is nn.LayerNorm and is_unmodified(norm) and is_unmodified(conv)
        if unmodified and conv.kernel_size == (3, 3) and conv.groups == 1:
            return cxv_kernels.conv_norm(
                x, conv.weight, conv.bias, norm.weight, norm.bias, norm.eps, backend=self.backend
            )
        return self.normalize(conv(x))

    def normalize(self, y: Tensor) -> Tensor:
        """Apply the norm to y (B, out_chans, H, W)."""
        return to_pixels(self.norm(to_tokens(y)), y) if isinstance(self.norm, nn.LayerNorm) else self.norm(y)
