"""Products in panels: numbers, and a token's bits in any company, on any number of threads, on other processors."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from raylign.rollout.native import matmul
from raylign.rollout.native.kernels import as_array

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


def packed(weight: torch.Tensor) -> np.ndarray:
    pairs = weight.dtype == torch.bfloat16
    out = np.zeros(matmul.panels(*weight.shape, pairs), np.uint32 if pairs else np.float32)
    matmul.pack(as_array(weight), out)
    return out


def product(x: torch.Tensor, weight: np.ndarray, outputs: int, start: np.ndarray, threads: int = 1) -> np.ndarray:
    given = as_array(x)
    out = np.full((len(x), outputs), np.nan, np.float32)
    matmul.Products(threads)(given if x.dtype == torch.float32 else given.view(np.uint32), weight, start, out)
    return out


@DTYPES
@pytest.mark.parametrize("outputs", [1, 24, 64, 100])
def test_products_are_those_of_double_precision_and_a_tokens_bits_are_its_own(dtype: torch.dtype, outputs: int):
    torch.manual_seed(0)
    x, weight = torch.randn(27, 40).to(dtype), torch.randn(outputs, 40).to(dtype)
    panels = packed(weight)
    start = np.zeros(len(panels) * matmul.PANEL, np.float32)
    start[:outputs] = np.arange(outputs)
    whole = product(x, panels, outputs, start)
    wanted = x.double() @ weight.double().T + torch.arange(outputs)
    assert np.abs(whole - wanted.numpy()).max() < 1e-4
    for count in (1, 2, 3, 5, 6, 7, 11, 12, 13, 26):
        assert np.array_equal(product(x[27 - count :], panels, outputs, start), whole[27 - count :])


@DTYPES
def test_any_number_of_threads_gives_the_same_bits(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(matmul, "_SPLIT", 0)
    torch.manual_seed(0)
    x, panels = torch.randn(9, 64).to(dtype), packed(torch.randn(200, 64).to(dtype))
    start = np.zeros(len(panels) * matmul.PANEL, np.float32)
    one = product(x, panels, 200, start)
    for threads in (2, 3, 16):
        assert np.array_equal(product(x, panels, 200, start, threads), one)


def test_what_is_not_finite_shows_in_its_own_rows_alone():
    x, weight = torch.ones(14, 8), packed(torch.ones(40, 8))
    x[5, 3] = torch.inf
    x[6, 0] = torch.nan
    out = product(x, weight, 40, np.zeros(len(weight) * matmul.PANEL, np.float32))
    assert np.isposinf(out[5]).all()
    assert np.isnan(out[6]).all()
    assert (np.delete(out, [5, 6], axis=0) == 8).all()


OTHER_PROCESSORS = {
    "haswell": "+avx,+avx2,+fma,+sse,+sse2,+sse3,+ssse3,+sse4.1,+sse4.2,+bmi,+bmi2,+f16c",
    "x86-64": "+sse,+sse2",
}


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="compiles for older x86 processors")
@pytest.mark.parametrize("name", OTHER_PROCESSORS)
def test_the_tiles_of_older_processors_compute_the_same(name: str):
    """This file's other tests in a process that compiles for another processor; run there, since it is an older one."""
    environment = os.environ | {"NUMBA_CPU_NAME": name, "NUMBA_CPU_FEATURES": OTHER_PROCESSORS[name]}
    selected = [sys.executable, "-m", "pytest", "-k", "bits or finite", str(Path(__file__))]
    done = subprocess.run(selected, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-2000:]
    assert "11 passed" in done.stdout
