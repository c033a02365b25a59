"""Models for tests."""

import pytest
from torch import nn

import cxv


def create_or_skip(name: str, **options) -> nn.Module:
    """A model by name; the test is skipped if the library of a baseline is not installed."""
    try:
        return cxv.create_model(name, **options)
    except ImportError as error:
        pytest.skip(str(error))
