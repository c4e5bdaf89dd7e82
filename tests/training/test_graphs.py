"""Training by CUDA graphs equals training launch by launch."""

import pytest
import torch
from torch import nn

from visionmamba import VimConfig
from visionmamba.models import DetectorConfig, SegmenterConfig
from visionmamba.training.graphs import can_be_recorded, graph_forward

on_gpu = pytest.mark.gpu

CONFIG = VimConfig(image_size=32, patch_size=8, d_model=64, depth=3, num_classes=5)


def losses_of(model: nn.Module, *, accumulate: int = 1, steps: int = 8) -> list[float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(8, 3, 32, 32, generator=generator).cuda() for _ in range(accumulate)]
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        for part in range(accumulate):
            labels = (torch.arange(8) + part).cuda() % 5
            with torch.autocast("cuda", torch.bfloat16):
                loss = nn.functional.cross_entropy(model(batches[part]).float(), labels)
            torch.autograd.backward(loss / accumulate)
            losses.append(loss.item())
        optimizer.step()
    return losses


def build() -> nn.Module:
    torch.manual_seed(0)
    return CONFIG.build().cuda().train()


@on_gpu
@pytest.mark.parametrize("accumulate", [1, 2])
def test_losses_follow_those_without(accumulate: int) -> None:
    expected = losses_of(build(), accumulate=accumulate)
    model = build()
    graph_forward(model, copies_gradients=accumulate > 1)
    actual = losses_of(model, accumulate=accumulate)
    assert torch.tensor(actual).allclose(torch.tensor(expected), atol=2e-3)
    assert actual[-1] < 0.95 * actual[0]


@on_gpu
def test_other_shapes_evaluation_and_the_time_after_run_as_before() -> None:
    model = build()
    undo = graph_forward(model, copies_gradients=False)
    model(torch.randn(8, 3, 32, 32, device="cuda")).sum().backward()
    for images in (torch.randn(3, 3, 32, 32), torch.randn(8, 3, 48, 32)):
        expected = CONFIG.build().cuda()
        expected.load_state_dict(model.state_dict())
        actual = model(images.cuda())
        torch.testing.assert_close(actual, expected.train()(images.cuda()), rtol=1e-4, atol=1e-4)
    model.eval()
    with torch.no_grad():
        assert model(torch.randn(1, 3, 32, 32, device="cuda")).shape == (1, 5)
    undo()
    assert "forward" not in vars(model)


@on_gpu
def test_what_cannot_be_recorded_is_said_and_trains() -> None:
    class Asking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x) * x.sum().item()

    model = Asking().cuda().train()
    graph_forward(model, copies_gradients=False)
    with pytest.warns(UserWarning, match="one by one, as the model cannot be recorded"):
        model(torch.ones(3, 4, device="cuda")).sum().backward()
    assert model.linear.weight.grad is not None


def segmenter_after_steps(*, graphed: bool) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses of six steps of UperNet, and the state it ends in."""
    torch.manual_seed(0)
    config = SegmenterConfig(backbone=CONFIG, num_classes=5, dropout=0.0, auxiliary_channels=16)
    model = config.build().cuda().train()
    if graphed:
        graph_forward(model, copies_gradients=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1)).cuda()
    masks = torch.arange(4 * 32 * 32, device="cuda").view(4, 32, 32) // 820
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        logits, auxiliary = model(images)
        loss = nn.functional.cross_entropy(logits, masks)
        loss = loss + 0.4 * nn.functional.cross_entropy(auxiliary, masks)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, model.state_dict()


@on_gpu
def test_segmenter_follows_with_its_batch_norms_counting_once() -> None:
    expected, expected_state = segmenter_after_steps(graphed=False)
    actual, state = segmenter_after_steps(graphed=True)
    assert torch.tensor(actual).allclose(torch.tensor(expected), rtol=1e-2)
    counts = [name for name in state if name.endswith("num_batches_tracked")]
    assert counts
    assert {int(state[name]) for name in counts} == {6}
    for name in (name for name in state if name.endswith("running_mean")):
        torch.testing.assert_close(state[name], expected_state[name], rtol=0.05, atol=1e-2)


@pytest.mark.once
def test_what_the_host_decides_or_other_processes_know_is_not_recorded() -> None:
    assert can_be_recorded(CONFIG.build())
    assert not can_be_recorded(nn.Sequential(nn.SyncBatchNorm(3)))
    flipping = VimConfig(image_size=32, d_model=16, depth=2, bidirectional="sequence")
    assert not can_be_recorded(flipping.build())


@pytest.mark.once
def test_detector_whose_boxes_differ_in_number_is_not_recorded() -> None:
    backbone = VimConfig(image_size=32, d_model=16, depth=1, readout="mean")
    config = DetectorConfig(backbone=backbone, num_classes=2, channels=8, box_width=8)
    assert not can_be_recorded(config.build())
