"""Table 1's other models, in the configurations of its rows."""

from .fnet import FNet
from .libraries import cct, convmixer, cvt, mlp_mixer, resnet, vit
from .wavemix import WaveMix

__all__ = ["FNet", "WaveMix", "cct", "convmixer", "cvt", "mlp_mixer", "resnet", "vit"]
