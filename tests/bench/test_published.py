"""Vim around mamba_ssm's functions, here stand-ins of the same signature, equals the plain Vim."""

import sys
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from visionmamba.bench.cases import check_available
from visionmamba.bench.efficiency import Efficiency
from visionmamba.bench.published import use_published_kernels
from visionmamba.models import VimConfig
from visionmamba.ops import causal_conv1d, selective_scan

TOLERANCE = 1e-5  # sums in another order, float32


def causal_conv1d_fn(x: Tensor, weight: Tensor, bias: Tensor, activation: str) -> Tensor:
    y = causal_conv1d(x.transpose(1, 2).contiguous(), weight, bias, activation=activation)
    return y.transpose(1, 2)


def selective_scan_fn(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor,
    delta_bias: Tensor,
    delta_softplus: bool,
) -> Tensor:
    u, delta, B, C = (tensor.transpose(1, 2).contiguous() for tensor in (u, delta, B, C))
    y = selective_scan(u, delta, A, B, C, D, dt_bias=delta_bias, dt_softplus=delta_softplus)
    return y.transpose(1, 2) * F.silu(z)


@pytest.fixture
def _published_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    functions = {
        "causal_conv1d": causal_conv1d_fn,
        "mamba_ssm.ops.selective_scan_interface": selective_scan_fn,
    }
    for name in ("causal_conv1d", "mamba_ssm", "mamba_ssm.ops", *functions):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    for name, function in functions.items():
        setattr(sys.modules[name], function.__name__, function)


@pytest.mark.usefixtures("_published_packages")
def test_published_layout_gives_the_plain_logits() -> None:
    model = VimConfig(image_size=32, patch_size=8, d_model=32, depth=2, num_classes=5).build()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = model(images)
        use_published_kernels(model)
        actual = model(images)
    assert (actual - expected).norm() / expected.norm() < TOLERANCE


def test_missing_packages_are_named() -> None:
    with pytest.raises(ImportError, match="needs mamba_ssm and causal_conv1d"):
        check_available("vim-mamba-ssm")
    with pytest.raises(ImportError, match="or leave the model out"):
        Efficiency(models=("vim", "vim-mamba-ssm"))
