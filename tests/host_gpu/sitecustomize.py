"""Found by every Python process whose PYTHONPATH has this folder (device.py): CUDA's ops become the CPU's."""

import ctypes
import os
import warnings

if library := os.environ.get("HOST_GPU_ATEN"):
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that kernels of PyTorch's own are replaced
        ctypes.CDLL(library).host_gpu_install()
    for library in ("cudnn", "flash", "mem_efficient"):
        getattr(torch.backends.cuda, f"enable_{library}_sdp")(False)
