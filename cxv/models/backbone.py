"""The methods that timm expects of a model, for CPV, CNV, CLTV and the hybrids."""

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cxv_kernels.tracing import refuse_torchscript
from cxv_kernels.validation import python_numbers, to_numbers

from .arguments import check_at_least, check_images, classifier, image_size
from .blocks import ForwardState, ResidualBranch, records_or_transforms, to_channels_last

torch.fx.wrap("check_images")  # its branches depend on the shape, so a graph calls it as it is


class Backbone(nn.Module):
    """A ``stem``, ``layers`` that keep the size of their map, and a classifier ``head``.

    A subclass sets these three, and with :meth:`_init_features` the rest.
    """

    __prepare_scriptable__ = refuse_torchscript

    def _init_features(
        self, img_size: int | Sequence[int], in_chans: int, num_features: int, reduction: int, depth: int, pool: str
    ) -> None:
        """Set the attributes that timm reads.

        Args:
            img_size: pixels a side, or (H, W). in_chans: input channels.
            num_features: channels of the layers' maps. reduction: pixels of the image over those of a map, per side.
            depth: layers. pool: how maps become one vector; kept as ``pool`` and ``global_pool``.
        """
        image_size(img_size)  # raises if it is no size
        self.img_size, self.in_chans = img_size, in_chans
        self.num_features = self.head_hidden_size = num_features
        self.feature_info = [
            {"num_chs": num_features, "reduction": reduction, "module": f"layers.{i}"} for i in range(depth)
        ]
        self.pool = self.global_pool = pool
        self.grad_checkpointing = False

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only each layer's input for backward and recompute the rest."""
        self.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        """Return the last layer."""
        return self.head

    @python_numbers
    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a fresh one of ``num_classes`` (0: none), on the model's device and dtype.

        Raises:
            ValueError: fewer than 0 classes; a ``global_pool`` (None: as it is) other than the model's kind of pooling
                or, without classes, ``""``.
        """
        check_at_least(0, num_classes=num_classes)
        pool = self.global_pool if global_pool is None else global_pool
        if pool not in ((self.pool,) if num_classes else (self.pool, "")):
            raise ValueError(f"global_pool must be {self.pool!r}, or without classes '', got {pool!r}")
        self.num_classes, self.global_pool = num_classes, pool
        weight = self.stem[0].weight
        self.head = classifier(self.num_features, num_classes).to(weight.device, weight.dtype)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return timm's patterns of parameters by depth, for a learning rate that decays by layer."""
        return {"stem": r"^stem|^cls_token|^pos_embed", "blocks": [(r"^layers\.(\d+)", None), (r"^norm", (99999,))]}

    def no_weight_decay(self) -> set[str]:
        """Return the names of the parameters that timm's optimizers exempt from weight decay, besides vectors."""
        return {name for name, _ in self.named_parameters() if name.split(".")[-1] in ("cls_token", "pos_embed")}

    def _embed(self, x: Tensor) -> Tensor:
        """The first layer's input, given the stem's output (B, C', H', W')."""
        return x

    def _to_map(self, x: Tensor, size: Sequence[int], norm: bool) -> Tensor:
        """A layer's output as a map (B, C, H', W') of the stem's ``size`` (H', W')."""
        return x

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) → (B, C, H/stem_stride, W/stem_stride), channels_last in memory."""
        return self._run_layers(x, len(self.layers), ())[0]

    def _run_layers(
        self, x: Tensor, stop: int, kept: Collection[int], norm: bool = False
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """The output of layer ``stop`` − 1, and those of the layers ``kept`` as maps."""
        check_images(x, self.in_chans)
        # channels_last from end to end: attention, MLP and norm read a pixel's channels together, and of all that could
        # be converted the image is the smallest
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
        """layer(x), of which backward has x alone."""
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
        """The outputs of layers, as timm's models give them.

        Args:
            x: (B, in_chans, H, W). indices: layers, from the end if negative; an int takes the last so many, None all.
            norm: apply the norm that follows the last layer, if the model has one. stop_early: leave out the layers
                after the last of ``indices``. output_fmt: ``"NCHW"``. intermediates_only: see below.

        Returns:
            The outputs (B, C, H/stem_stride, W/stem_stride) of the layers of ``indices``, first layer first, without a
            class token; unless ``intermediates_only``, after the output of :meth:`forward_features`.

        Raises:
            ValueError: an index out of range, another ``output_fmt``.
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
        """Drop the layers after the last of ``indices`` (as in :meth:`forward_intermediates`) and the classifier.

        Args:
            indices: layers. prune_norm: drop the norm that follows the last layer too. prune_head: drop the classifier.

        Returns:
            ``indices`` from the first layer on.
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
        """The vector (B, C) that is classified, of the last layer's output (B, C, H', W')."""
        return x.permute(0, 2, 3, 1).mean((1, 2))  # as AdaptiveAvgPool2d, but its gradient is channels_last too

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """(B, C, H, W) → (B, num_classes); the pooled features (B, C) with ``pre_logits`` or without a classifier."""
        x = self._pool(x) if self.global_pool else x
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) → logits (B, num_classes)."""
        return self.forward_head(self.forward_features(x))
