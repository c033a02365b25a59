"""The methods that timm expects from a model, for CPV, CNV, CLTV and the hybrids."""

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cxv_kernels.tracing import refuse_torchscript
from cxv_kernels.validation import python_numbers, to_numbers

from .arguments import check_at_least, check_images, check_rates, classifier, image_size
from .blocks import ForwardState, ResidualBranch, records_or_transforms, to_channels_last

torch.fx.wrap("check_images")  # its branches depend on the shape, so a graph calls the function itself


class Backbone(nn.Module):
    """Base class of models with a ``stem``, ``layers`` that keep the size of the feature map, and a ``head``.

    It checks the common arguments (see :class:`cxv.CXV`) and makes the first two convolutions of the stem; a subclass
    makes the rest. ``pool`` is the pooling, stored as ``pool`` and ``global_pool``.
    """

    __prepare_scriptable__ = refuse_torchscript

    def __init__(
        self,
        img_size: int | Sequence[int],
        in_chans: int,
        embed_dim: int,
        depth: int,
        drop_rate: float,
        drop_path_rate: float,
        stem_stride: int,
        pool: str,
    ):
        super().__init__()
        check_at_least(4, embed_dim=embed_dim)
        check_at_least(1, in_chans=in_chans, depth=depth, stem_stride=stem_stride)
        check_rates(drop_rate=drop_rate, drop_path_rate=drop_path_rate)
        if embed_dim % 4:
            raise ValueError(f"embed_dim must be a multiple of 4, got {embed_dim}")
        image_size(img_size)  # raises for an invalid size
        self.img_size, self.in_chans, self.embed_dim = img_size, in_chans, embed_dim
        self.num_features = self.head_hidden_size = embed_dim  # timm reads these and feature_info
        self.feature_info = [
            {"num_chs": embed_dim, "reduction": stem_stride, "module": f"layers.{i}"} for i in range(depth)
        ]
        self.pool = self.global_pool = pool
        self.grad_checkpointing = False
        self.stem = nn.Sequential(
            nn.Conv2d(in_chans, embed_dim // 4, 3, stride=stem_stride, padding=1),
            nn.Conv2d(embed_dim // 4, embed_dim // 2, 3, padding=1),
        )

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Save only the input of each layer for the backward pass, and recompute the rest there."""
        self.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        """Return the classifier."""
        return self.head

    @python_numbers
    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a new one, on the device and in the dtype of the model.

        Args:
            num_classes: Number of classes. 0 removes the classifier.
            global_pool: The pooling of the model or, without classes, ``""`` for none. Default: unchanged.

        Raises:
            ValueError: If ``num_classes`` is negative or ``global_pool`` is not allowed.
        """
        check_at_least(0, num_classes=num_classes)
        pool = self.global_pool if global_pool is None else global_pool
        if pool not in ((self.pool,) if num_classes else (self.pool, "")):
            raise ValueError(f"global_pool must be {self.pool!r}, or without classes '', got {pool!r}")
        self.num_classes, self.global_pool = num_classes, pool
        weight = self.stem[0].weight
        self.head = classifier(self.num_features, num_classes).to(weight.device, weight.dtype)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return patterns of parameter names by depth, from which timm computes layer-wise learning rates."""
        return {"stem": r"^stem|^cls_token|^pos_embed", "blocks": [(r"^layers\.(\d+)", None), (r"^norm", (99999,))]}

    def no_weight_decay(self) -> set[str]:
        """Return the names of the parameters that timm's optimizers exempt from weight decay, besides vectors."""
        return {name for name, _ in self.named_parameters() if name.split(".")[-1] in ("cls_token", "pos_embed")}

    def _embed(self, x: Tensor) -> Tensor:
        """Return the input of the first layer for the output of the stem (B, C', H', W')."""
        return x

    def _to_map(self, x: Tensor, size: Sequence[int], norm: bool) -> Tensor:
        """Return the output of a layer as a map (B, C, H', W') with the ``size`` (H', W') of the stem's output."""
        return x

    def forward_features(self, x: Tensor) -> Tensor:
        """Map images (B, in_chans, H, W) to features (B, C, H/stem_stride, W/stem_stride), channels_last in memory."""
        return self._run_layers(x, len(self.layers), ())[0]

    def _run_layers(
        self, x: Tensor, stop: int, kept: Collection[int], norm: bool = False
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Return the output of layer ``stop`` − 1, and the outputs of the layers ``kept`` as maps."""
        check_images(x, self.in_chans)
        # Attention, MLP and norm read all channels of a pixel together, so all tensors are channels_last. The image is
        # the smallest tensor to convert.
        x = self.stem(to_channels_last(x))
        size = x.shape[2:] if kept else ()
        x = self._embed(x)
        outputs = {}
        for i, layer in enumerate(self.layers):
            if i == stop:
                break
            x = self._checkpointed(layer, x) if self.grad_checkpointing and torch.is_grad_enabled() else layer(x)
            if i in kept:
                outputs[i] = self._to_map(x, size, norm)
        return x, outputs

    def _checkpointed(self, layer: nn.Module, x: Tensor) -> Tensor:
        """Return layer(x) and save only x for the backward pass."""
        if torch.compiler.is_compiling():
            return checkpoint(layer, x, use_reentrant=False)
        if records_or_transforms():
            return layer(x)
        changing = (m for m in layer.modules() if not isinstance(m, ResidualBranch))
        return ForwardState(layer, changing).checkpoint(layer, x, preserve_rng_state=True)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Return the outputs of several layers, with the interface of timm's models.

        Args:
            x: Images, shape (B, in_chans, H, W).
            indices: Indices of layers, counted from the end if negative. An int selects that many last layers, None
                selects all layers.
            norm: Apply the norm that follows the last layer, if the model has one.
            stop_early: Skip the layers after the last one of ``indices``.
            output_fmt: ``"NCHW"``.
            intermediates_only: Return only the list, without the output of :meth:`forward_features`.

        Returns:
            The output of :meth:`forward_features`, and a list of the outputs (B, C, H/stem_stride, W/stem_stride) of
            the selected layers, in the order of the layers, without a class token.

        Raises:
            ValueError: If an index is out of range or ``output_fmt`` is not ``"NCHW"``.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt must be 'NCHW', got {output_fmt!r}")
        kept = self._feature_indices(indices)
        x, outputs = self._run_layers(x, max(kept) + 1 if stop_early else len(self.layers), kept, norm)
        features = list(outputs.values())
        return features if intermediates_only else (x, features)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove the layers after the last one of ``indices``, and the classifier.

        Args:
            indices: Indices of layers, as in :meth:`forward_intermediates`.
            prune_norm: Also remove the norm that follows the last layer.
            prune_head: Remove the classifier.

        Returns:
            List of the indices, counted from the first layer.
        """
        kept = self._feature_indices(indices)
        self.layers = self.layers[: max(kept) + 1]
        if prune_norm and hasattr(self, "norm"):
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
        return kept

    def _feature_indices(self, indices: int | Sequence[int] | None) -> list[int]:
        depth, indices = len(self.layers), to_numbers(indices)
        if indices is None or isinstance(indices, int):
            indices = range(-(depth if indices is None else indices), 0)
        if not indices or not all(-depth <= i < depth for i in indices):
            raise ValueError(f"indices must be layers from {-depth} to {depth - 1}, got {list(indices)}")
        return [i % depth for i in indices]

    def _pool(self, x: Tensor) -> Tensor:
        """Pool the output of the last layer (B, C, H', W') into the vector (B, C) that is classified."""
        return x.permute(0, 2, 3, 1).mean((1, 2))  # AdaptiveAvgPool2d, but with a gradient that is channels_last

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Map features (B, C, H, W) to logits (B, num_classes), or to pooled features (B, C) with ``pre_logits``."""
        x = self._pool(x) if self.global_pool else x
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (B, in_chans, H, W) to logits (B, num_classes)."""
        return self.forward_head(self.forward_features(x))
