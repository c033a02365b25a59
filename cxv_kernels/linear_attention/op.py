from ..ops.linear_attention.op import triton_state  # noqa: F401  for triton.py
