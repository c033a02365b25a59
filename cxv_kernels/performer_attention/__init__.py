"""The Triton kernels, until they move to ops/performer_attention/triton.py."""
