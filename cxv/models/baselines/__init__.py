"""Table 1's other models, in the configurations of its rows."""

from .libraries import cct, convmixer, cvt, fnet, mlp_mixer, resnet, vit
from .wavemix import WaveMix

__all__ = ["WaveMix", "cct", "convmixer", "cvt", "fnet", "mlp_mixer", "resnet", "vit"]
