"""Share models on the Hugging Face Hub, with the mixin of huggingface_hub (extra ``hub``).

A repository has the file of :func:`cxv.save_safetensors`, a copy of its metadata in ``config.json`` for people and the
Hub, and a model card. Only the safetensors file is read back, and it cannot run code.
"""

import inspect
import json
from pathlib import Path
from typing import Any

from torch import Tensor, nn

try:
    from huggingface_hub import EvalResult, ModelCard, ModelCardData, PyTorchModelHubMixin, hf_hub_download
except ImportError as error:
    raise ImportError("cxv.hub needs huggingface_hub, which is not installed: pip install 'cxv[hub]'") from error

from .checkpoint import SAFETENSORS
from .errors import InputError
from .models.arguments import image_size
from .models.registry import load_model
from .sharing import describe, save_safetensors

PAPER = "https://arxiv.org/abs/2201.10271"
# Jinja: the mixin's variables, and ``text``, the card below its header.
CARD = "---\n{{ card_data }}\n---\n\n{{ text }}"
# force_download, token, cache_dir …, whatever this version of huggingface_hub has
_HUB_ARGUMENTS = tuple(
    name
    for name, parameter in inspect.signature(PyTorchModelHubMixin.from_pretrained).parameters.items()
    if parameter.kind is inspect.Parameter.KEYWORD_ONLY
)


class HubModel(
    nn.Module,
    PyTorchModelHubMixin,
    library_name="cxv",
    paper_url=PAPER,
    model_card_template=CARD,
    pipeline_tag="image-classification",
    tags=["cxv", "image-classification", "linear-attention"],
):
    """A model with its metadata, and the methods ``save_pretrained``, ``push_to_hub`` and ``from_pretrained``.

    ``.model`` is the wrapped model, and ``.metadata`` has its metadata.

    Args:
        model: A model of :func:`cxv.create_model`.
        **metadata: As in :func:`cxv.save_safetensors`.

    Raises:
        InputError: If the metadata do not fit the model.

    Example::

        HubModel.from_checkpoint("runs/digits-cpv-2-4").push_to_hub("me/cpv-digits")
        model = HubModel.from_pretrained("me/cpv-digits")
    """

    def __init__(self, model: nn.Module, **metadata: Any):
        super().__init__()
        self.model = model
        self.metadata = describe(model, **metadata)
        self._hub_mixin_config = self.metadata

    @classmethod
    def from_checkpoint(cls, path: str | Path, which: str = "best") -> "HubModel":
        """Load a run of ``cxv train``, a ``.pt`` or a ``.safetensors`` file; see :func:`cxv.training.load_model`."""
        model, checkpoint = load_model(path, which)
        return cls(model, **describe(checkpoint))

    def forward(self, x: Tensor) -> Tensor:
        """Map images (B, in_chans, H, W), normalized by ``metadata["normalization"]``, to logits (B, num_classes)."""
        return self.model(x)

    def _save_pretrained(self, save_directory: Path) -> None:
        save_safetensors(self.model, save_directory / SAFETENSORS, **self.metadata)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        map_location: str = "cpu",
        use_fused: bool | None = None,
        **kwargs: Any,
    ) -> "HubModel":
        """Load a model from the Hub or from a directory that ``save_pretrained`` wrote, in ``eval()`` mode.

        Args:
            pretrained_model_name_or_path: Name of the repository, or the directory.
            map_location: Device of the model.
            use_fused: As in :func:`cxv.training.load_model`.
            **kwargs: Arguments of huggingface_hub's ``from_pretrained``.

        Raises:
            InputError: If the file is damaged or from another program, or a keyword is unknown. The arguments of the
                model are those of the file; :func:`cxv.create_model` with ``checkpoint`` can change them.
        """
        unknown = sorted(kwargs.keys() - set(_HUB_ARGUMENTS))
        if unknown:
            allowed = ", ".join((*_HUB_ARGUMENTS, "map_location", "use_fused"))
            raise InputError(
                f"{unknown[0]}: from_pretrained has no such keyword (allowed: {allowed}); to change the model, use "
                "cxv.create_model(NAME, checkpoint=FILE, …)"
            )
        return super().from_pretrained(
            pretrained_model_name_or_path, map_location=map_location, use_fused=use_fused, **kwargs
        )

    @classmethod
    def _from_pretrained(
        cls,
        *,
        model_id: str,
        map_location: str = "cpu",
        use_fused: bool | None = None,
        **options: Any,  # of the download, and config.json: the file itself says what counts
    ) -> "HubModel":
        path = Path(model_id) / SAFETENSORS
        if not Path(model_id).is_dir():
            names = ("revision", "cache_dir", "force_download", "local_files_only", "token")
            path = hf_hub_download(model_id, SAFETENSORS, **{name: options.get(name) for name in names})
        model, checkpoint = load_model(path, device=map_location, use_fused=use_fused)
        return cls(model, **describe(checkpoint)).eval()

    def generate_model_card(self, *args: Any, **kwargs: Any) -> ModelCard:
        """Describe the model, how it was trained and scored, and how to use it, from the metadata.

        Args:
            **kwargs: ``model_card_kwargs`` of ``save_pretrained`` and ``push_to_hub``: entries of the card's header in
                place of ours, e.g. ``license="mit"``, and variables of a subclass's ``model_card_template``.
        """
        m, info = self.metadata, self._hub_mixin_info
        data = m["args"].get("data")
        top1 = m["metrics"].get("test_top1")
        scored = data is not None and top1 is not None
        results = EvalResult("image-classification", data, data, "accuracy", top1 / 100) if scored else None
        score = {"model_name": m["model_name"], "eval_results": [results]} if scored else {}
        header = ModelCardData(**info.model_card_data.to_dict() | score | kwargs)
        variables = {"repo_url": info.repo_url, "paper_url": info.paper_url, "docs_url": info.docs_url}
        variables |= {"text": self._card_text()} | kwargs
        return ModelCard.from_template(header, template_str=info.model_card_template, **variables)

    def _card_text(self) -> str:
        m, pixels = self.metadata, self.metadata["normalization"]
        height, width = image_size(m["img_size"])
        parameters = sum(p.numel() for p in self.model.parameters())
        rows = {
            "parameters": f"{parameters:,}",
            "input": f"{m['in_chans']}×{height}×{width}, pixels in [0, 1] − {pixels['mean']}, ÷ {pixels['std']}",
            "classes": f"{len(m['classes'])}: {', '.join(m['classes'][:20])}" + (", …" if m["classes"][20:] else ""),
            "trained on": m["args"].get("data", "not recorded"),
            "seed": "not recorded" if m["seed"] is None else m["seed"],
            "epoch": "not recorded" if m["epoch"] is None else m["epoch"],
        } | {name.replace("_", " "): f"{value:.4g}" for name, value in m["metrics"].items()}
        rows |= m["notes"]
        table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
        selected = ""
        if "test_top1" in m["metrics"] and "validation_top1" not in m["metrics"]:
            selected = (
                "\nThe test set itself may have picked the epoch, as in the paper: its top-1 is flattering by that.\n"
            )
        return f"""# {m["model_name"]}

An image classifier of the Python package `cxv` (Convolutional X-formers for Vision, [Jeevan & Sethi]({PAPER})).

| | |
|---|---|
{table}
{selected}
## Use

```python
from cxv.hub import HubModel

model = HubModel.from_pretrained("THIS REPOSITORY")  # model.metadata["classes"] has the names
logits = model(images)  # (B, {m["in_chans"]}, {height}, {width}), normalized as above
```

or, with the file at hand, `cxv predict --checkpoint {SAFETENSORS} IMAGE`.

## Training

```json
{json.dumps({"arguments of the model": m["model_kwargs"], "arguments of cxv train": m["args"]}, indent=2)}
```
"""
