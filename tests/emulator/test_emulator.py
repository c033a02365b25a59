"""The emulator that runs CUDA kernels on the host (simt.h): it finds errors and multiplies right."""

import ctypes

import pytest
import torch
from cuda_emulator import Arena, build, call, needs_cxx

pytestmark = needs_cxx
SEEDS = range(4)


@pytest.fixture(scope="module")
def simt(tmp_path_factory, csrc):
    return build("self_test.cpp", csrc, tmp_path_factory.mktemp("emulator"))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("race", "a race in shared memory"),
        ("race in a warp", "a race in shared memory"),
        ("race of a read and a later write", "a race in shared memory"),
        ("barrier of some", "not all threads reach"),
        ("collective of some", "not all threads reach"),
        ("collectives of two kinds", "not the same one"),
        ("unwritten", "not written"),
        ("beyond", "beyond the shared memory"),
        ("misaligned", "not of 16 bytes"),
    ],
)
def test_finds(simt, name, error, seed):
    with pytest.raises(AssertionError, match=error):
        call(simt.simt_self_test, name.encode(), seed)


@pytest.mark.parametrize("seed", SEEDS)
def test_accepts_accesses_that_a_barrier_orders(simt, seed):
    call(simt.simt_self_test, b"ordered", seed)


def test_finds_accesses_beside_tensors(simt):
    with Arena(simt) as arena:
        x, y = arena.put(torch.randn(32)), arena.result((32,), torch.float32)
        pointers = ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(y.data_ptr())
        call(simt.simt_copy, *pointers, 0)
        assert torch.equal(x, y)
        with pytest.raises(AssertionError, match="a read beside the tensors"):
            call(simt.simt_copy, *pointers, 1)
        with pytest.raises(AssertionError, match="a write beside the tensors"):
            call(simt.simt_copy, *reversed(pointers), 0)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_mma_multiplies_and_shows_a_wrong_fragment(simt, dtype, transposed):
    generator = torch.Generator().manual_seed(0)
    A, B = (torch.randn(16, 16, generator=generator).to(dtype).float() for _ in range(2))
    number = [torch.float16, torch.float32].index(dtype)
    products = []
    for swapped in (False, True):
        D = torch.empty(16, 16)
        pointers = (ctypes.c_void_p(t.data_ptr()) for t in (A, B, D))
        call(simt.simt_product, number, *pointers, ctypes.c_bool(transposed), ctypes.c_bool(swapped))
        products.append(D)
    torch.testing.assert_close(products[0], A @ B.T)
    assert not torch.allclose(products[1], A @ B.T, rtol=0.1, atol=0.1)


def test_tensor_cores_cut_off_what_is_small(simt):
    A, B, D = torch.full((16, 16), 2.0**-12), torch.full((16, 16), 1.5 * 2.0**-12), torch.empty(16, 16)
    A[:, 0] = B[:, 0] = 1
    pointers = (ctypes.c_void_p(t.data_ptr()) for t in (A, B, D))
    call(simt.simt_product, 0, *pointers, ctypes.c_bool(False), ctypes.c_bool(False))
    assert torch.equal(D, torch.ones(16, 16))
    assert (A @ B.T > 1).all()
