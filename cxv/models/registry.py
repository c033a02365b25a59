"""Models by name: the paper's ``family-layers/heads``."""

import difflib
import fnmatch
import re
from typing import Any

from .cxv import CLTV, CNV, CPV, CXV

FAMILIES: dict[str, type[CXV]] = {"cltv": CLTV, "cnv": CNV, "cpv": CPV}
_NAMED = [f"{family}-5/4" for family in FAMILIES]


def list_models(filter: str = "") -> list[str]:
    """The names of the paper's models, those that match ``filter`` (shell wildcards) if it is given.

    Any other depth and number of heads can be built too: ``create_model("cpv-3/8")``.
    """
    return sorted(fnmatch.filter(_NAMED, filter) if filter else _NAMED)


def create_model(name: str, **kwargs: Any) -> CXV:
    """Build a model by name.

    Args:
        name: ``family-depth/heads``, e.g. ``"cpv-5/4"``; case does not matter.
        **kwargs: the model's own, e.g. ``num_classes``, ``in_chans``, ``use_fused``; see :class:`cxv.CXV`.

    Raises:
        ValueError: no such model, or ``depth`` or ``num_heads`` given besides the name.
    """
    match = re.fullmatch(r"([a-z]+)-(\d+)/(\d+)", name.lower())
    if match is None or match[1] not in FAMILIES:
        close = difflib.get_close_matches(name.lower(), _NAMED, n=1, cutoff=0.4)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(
            f"model must be one of {', '.join(map(repr, list_models()))}, or the same families with other "
            f"layers/heads, got {name!r}{hint}"
        )
    twice = {"depth", "num_heads"} & kwargs.keys()
    if twice:
        raise ValueError(f"{' and '.join(sorted(twice))} come from the name {name!r}: give them there")
    return FAMILIES[match[1]](depth=int(match[2]), num_heads=int(match[3]), **kwargs)
