"""What says whether Triton runs on a device, and what runs where it does not."""

import importlib.util

import pytest
import torch

from tests.ops.oracles import scan_inputs
from visionmamba.ops import triton
from visionmamba.ops.kernel_cache import UnavailableError
from visionmamba.ops.selective_scan.chunked import selective_scan_chunked
from visionmamba.ops.triton import ops

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def asked_afresh():
    """Answers of one test are not those of another."""
    triton._problem.cache_clear()
    ops._is_available.cache_clear()
    yield
    triton._problem.cache_clear()
    ops._is_available.cache_clear()


@pytest.fixture
def without_triton(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)


def test_names_the_remedy_where_triton_is_missing(without_triton):
    with pytest.raises(UnavailableError, match="pip install triton"):
        triton.check_available(CPU)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a driver is found here")
def test_names_the_missing_driver():
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed here; torch's Linux wheels for CUDA bring it")
    with pytest.raises(UnavailableError, match="driver"):
        triton.check_available(CPU)


def test_scans_in_plain_pytorch_and_says_so(without_triton):
    *inputs, z, dt_bias, initial_state = scan_inputs(9, batch=1, d_inner=3, d_state=2).values()
    given = (*inputs, z, dt_bias, initial_state, True, False)
    with pytest.warns(UserWarning, match="in plain PyTorch: triton is not installed"):
        y, state, checkpoints = ops.selective_scan(*given, True)
    expected_y, expected_state, _ = selective_scan_chunked(*given, None)
    assert torch.equal(y, expected_y)
    assert torch.equal(state, expected_state)
    assert checkpoints.shape == (1, 0, 3, 2)
