"""Found by every Python process whose PYTHONPATH has this folder (device.py): CUDA's ops become the CPU's."""

import ctypes
import os
import warnings

if aten := os.environ.get("FAKE_DEVICE_ATEN"):
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that kernels of PyTorch's own are replaced
        ctypes.CDLL(aten).fake_device_install()
    for library in ("cudnn", "flash", "mem_efficient"):  # they have no CPU kernel of the same name
        getattr(torch.backends.cuda, f"enable_{library}_sdp")(False)
