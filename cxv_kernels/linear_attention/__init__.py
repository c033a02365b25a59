"""The Triton kernels, until they move to ops/linear_attention/triton/."""
