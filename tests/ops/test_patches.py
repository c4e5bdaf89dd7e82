"""Patches as rows on the CPU and the GPU, against torch's unfold."""

import pytest
import torch
from torch.nn import functional as F

from tests.ops.oracles import OPCHECK_WARNING
from visionmamba.ops.patches import cut_patches

DEVICES = ("cpu", pytest.param("cuda", marks=pytest.mark.gpu))
# (picture), patch size, stride, grid; the last two reach beyond the picture
CASES = [
    ((2, 3, 64, 96), 16, 16, (4, 6)),
    ((2, 3, 48, 40), 16, 8, (5, 4)),
    ((1, 1, 16, 16), 16, 16, (1, 1)),
    ((2, 3, 28, 42), 14, 14, (2, 3)),
    ((2, 4, 33, 41), 16, 16, (3, 3)),
    ((1, 3, 30, 50), 8, 6, (5, 8)),
]
DTYPES = [
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.bfloat16, torch.float32),
    (torch.float64, torch.float64),
]


def unfolded(images, patch_size, stride, grid):
    height, width = ((side - 1) * stride + patch_size for side in grid)
    images = F.pad(images, (0, width - images.shape[3], 0, height - images.shape[2]))
    return F.unfold(images, patch_size, stride=stride).transpose(1, 2)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_rows_are_the_patches(case, dtypes, device):
    shape, *sizes = case
    images = torch.randn(shape, device=device).to(dtypes[0])
    expected = unfolded(images.double(), *sizes).to(dtypes[1])
    assert torch.equal(cut_patches(images, *sizes, dtypes[1]), expected)


@pytest.mark.parametrize("device", DEVICES)
def test_strided_pictures_are_read_in_place(device):
    images = torch.randn(2, 3, 40, 70, device=device)
    for view in (images[..., 3:67], images[:, :, 4:36, :64], images.transpose(2, 3)[..., :32]):
        grid = view.shape[2] // 16, view.shape[3] // 16
        view = view[..., : grid[0] * 16, : grid[1] * 16]
        expected = unfolded(view.double(), 16, 16, grid).float()
        assert torch.equal(cut_patches(view, 16, 16, grid, torch.float32), expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradient_of_the_pictures(case, device):
    shape, *sizes = case
    images = torch.randn(shape, device=device, dtype=torch.float64, requires_grad=True)
    expected = unfolded(images, *sizes)
    dpatches = torch.randn_like(expected)
    (wanted,) = torch.autograd.grad(expected, images, dpatches)
    single = images.detach().float().requires_grad_()
    patches = cut_patches(single, *sizes, torch.float32)
    (actual,) = torch.autograd.grad(patches, single, dpatches.float())
    assert torch.allclose(actual.double(), wanted, atol=1e-5)


@OPCHECK_WARNING
@pytest.mark.parametrize("device", DEVICES)
def test_opcheck(device):
    images = torch.randn(2, 3, 33, 41, device=device, requires_grad=True)
    arguments = (images, 16, 16, 3, 3, torch.float32)
    torch.library.opcheck(torch.ops.visionmamba.cut_patches, arguments)
