"""The tests of this folder need TRITON_INTERPRET=1 before Triton is imported: tests/test_triton.py runs them so."""

from cxv_kernels._triton import interpreting

collect_ignore_glob = [] if interpreting() else ["test_*.py"]
