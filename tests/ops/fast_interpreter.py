"""Triton's interpreter without the work that it repeats, which is most of what it does for tensors of a few numbers."""

import functools

import pytest
import triton.language as tl
from triton.runtime import interpreter


def speed_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Patch the language once per function and not at every call, and make equal types and shapes once."""
    patch, make_tensor, make_block = interpreter._patch_lang, tl.tensor.__init__, tl.block_type.__init__
    np_dtypes, tensors, blocks = {}, {}, {}

    @functools.cache
    def patch_once(fn):
        scope = patch(fn)
        scope.restore = lambda: None  # nothing else uses the language in this process
        return scope

    def np_dtype(dtype, make=interpreter._get_np_dtype):
        if dtype.name not in np_dtypes:
            np_dtypes[dtype.name] = make(dtype)
        return np_dtypes[dtype.name]

    def tensor_init(self, handle, type):
        if type.name not in tensors:
            make_tensor(self, None, type)
            tensors[type.name] = dict(vars(self))
        vars(self).update(tensors[type.name], handle=handle)

    def block_init(self, element_ty, shape):
        key = (element_ty.name, *(getattr(size, "value", size) for size in shape))
        if key not in blocks:
            make_block(self, element_ty, shape)
            blocks[key] = dict(vars(self))
        vars(self).update(blocks[key])

    monkeypatch.setattr(interpreter, "_patch_lang", patch_once)
    monkeypatch.setattr(interpreter, "_get_np_dtype", np_dtype)
    monkeypatch.setattr(tl.tensor, "__init__", tensor_init)
    monkeypatch.setattr(tl.block_type, "__init__", block_init)
