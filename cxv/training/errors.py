"""Where :mod:`cxv.training.verify` finds its exception; everything else imports :mod:`cxv.errors`."""

from ..errors import InputError

__all__ = ["InputError"]
