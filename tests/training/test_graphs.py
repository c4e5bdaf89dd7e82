"""Training by CUDA graphs equals training launch by launch, and is taken where it works."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from visionmamba import VimConfig
from visionmamba.cli.train import _parse_train
from visionmamba.models import DetectorConfig, SegmenterConfig
from visionmamba.recipes import digits_vim
from visionmamba.training import graphs
from visionmamba.training.graphs import graph_forward, launch_text, why_one_by_one

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
def test_recording_leaves_the_random_numbers_of_drop_path() -> None:
    torch.manual_seed(0)
    model = replace(CONFIG, drop_path=0.5).build().cuda().train()
    images = torch.randn(8, 3, 32, 32, device="cuda")
    torch.cuda.manual_seed(1)
    with torch.no_grad():
        expected = model(images)
    graph_forward(model, copies_gradients=False)
    torch.cuda.manual_seed(1)
    torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-4)


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
    assert torch.rand(2, device="cuda").isfinite().all()


@on_gpu
def test_second_call_before_a_backward_keeps_what_the_first_needs() -> None:
    first, second = torch.randn(2, 8, 3, 32, 32, device="cuda")
    expected = build()
    torch.autograd.backward(expected(first).square().sum() + expected(second).square().sum())
    model = build()
    graph_forward(model, copies_gradients=True)
    torch.autograd.backward(model(first).square().sum() + model(second).square().sum())
    for name, parameter in model.named_parameters():
        wanted = expected.get_parameter(name).grad
        torch.testing.assert_close(parameter.grad, wanted, rtol=1e-3, atol=1e-3)


@on_gpu
def test_model_whose_recording_does_not_fit_trains_in_the_memory_there_is() -> None:
    class Once(nn.Module):
        """Takes more memory than there is in the third call, the recorded one."""

        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 2)
            self.calls = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            x = self.linear(x)
            if self.calls == 3:
                torch.empty(1 << 50, device=x.device, dtype=torch.uint8)
            return x

    model = Once().cuda().train()
    graph_forward(model, copies_gradients=False)
    with pytest.warns(UserWarning, match="cannot be recorded as a CUDA graph: CUDA out of memory"):
        model(torch.ones(3, 4, device="cuda")).sum().backward()
    model(torch.ones(3, 4, device="cuda")).sum().backward()
    assert model.linear.weight.grad.eq(6).all()


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


CUDA = torch.device("cuda")  # named, not used


def choice(asked: bool | None = None, model: nn.Module | None = None, **options: Any) -> str | None:
    return why_one_by_one(asked, model or CONFIG.build(), **{"device": CUDA, **options})


@pytest.mark.once
@pytest.mark.parametrize("asked", [None, True])
def test_one_gpu_replays_graphs(asked: bool | None) -> None:
    assert choice(asked) is None


@pytest.mark.once
@pytest.mark.parametrize("asked", [None, True])
@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"device": torch.device("cpu")}, "the model is on the cpu"),
        ({"is_sharded": True}, "the weights are divided among processes"),
        ({"is_compiled": True}, "blocks go through torch.compile"),
    ],
)
def test_place_that_has_no_graphs_launches_one_by_one(
    asked: bool | None, options: dict[str, Any], reason: str
) -> None:
    assert choice(asked, **options) == reason


@pytest.mark.once
@pytest.mark.parametrize("asked", [None, True])
def test_what_the_host_decides_or_other_processes_know_is_not_recorded(asked: bool | None) -> None:
    flipping = VimConfig(image_size=32, d_model=16, depth=2, bidirectional="sequence")
    assert choice(asked, flipping.build()) == "Vim flips sequences at random"
    waiting = "batch norms wait for other processes"
    assert choice(asked, nn.Sequential(nn.SyncBatchNorm(3))) == waiting
    assert choice(asked, nn.Sequential(nn.BatchNorm2d(3)), num_processes=2) == waiting
    assert choice(asked, nn.Sequential(nn.BatchNorm2d(3))) is None


@pytest.mark.once
@pytest.mark.parametrize("asked", [None, True])
def test_detector_whose_boxes_differ_in_number_is_not_recorded(asked: bool | None) -> None:
    backbone = VimConfig(image_size=32, d_model=16, depth=1, readout="mean")
    config = DetectorConfig(backbone=backbone, num_classes=2, channels=8, box_width=8)
    reason = choice(asked, config.build())
    assert reason is not None
    assert reason.endswith("differ from batch to batch")


@pytest.mark.once
def test_what_has_not_been_measured_must_be_asked_for() -> None:
    reason = choice(None, num_processes=2)
    assert reason is not None
    assert reason.startswith("not measured with several processes")
    assert choice(True, num_processes=2) is None


@pytest.mark.once
def test_random_state_that_checkpointing_restores_is_not_recorded() -> None:
    checkpointed = replace(CONFIG, activation_checkpointing=True)
    assert choice(None, checkpointed.build()) is None
    reason = choice(True, replace(checkpointed, drop_path=0.1).build())
    assert reason == "activation checkpointing restores the random state of drop path"


@pytest.mark.once
def test_graphs_can_be_refused() -> None:
    assert choice(False) == "so it was asked"


@pytest.mark.once
def test_choice_is_said_in_words() -> None:
    assert launch_text(None) == "forward and backward are recorded and replayed as CUDA graphs"
    assert launch_text("why").endswith("one by one, not as CUDA graphs: why")


@pytest.mark.once
@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("not permitted\nmore")]
)
def test_failed_recording_is_said_once_and_trains(
    error: RuntimeError, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*inputs: Any, **options: Any) -> None:
        raise error

    monkeypatch.setattr(graphs, "_record", fail)
    model = nn.Linear(4, 2).train()
    reasons: list[str] = []
    graph_forward(model, copies_gradients=False, on_failure=reasons.append)
    with pytest.warns(UserWarning, match=r"cannot be recorded as a CUDA graph: .*--no-cuda-graphs"):
        model(torch.ones(3, 4)).sum().backward()
    model(torch.ones(3, 4)).sum().backward()
    assert model.weight.grad is not None
    assert model.weight.grad.eq(6).all()
    assert reasons == [str(error).splitlines()[0]]


@pytest.mark.once
def test_generator_that_a_broken_recording_keeps_ends_the_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*inputs: Any, **options: Any) -> None:
        raise RuntimeError("broken off")

    monkeypatch.setattr(graphs, "_record", fail)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch, "rand", fail)
    monkeypatch.setattr(torch, "ones", fail)
    model = nn.Linear(4, 2).train()
    graph_forward(model, copies_gradients=False)
    with pytest.raises(RuntimeError, match=r"start again with cuda_graphs=False"):
        model(torch.zeros(3, 4))


@pytest.mark.once
def test_command_line_asks_refuses_or_leaves_it_open() -> None:
    for given, expected in (([], None), (["--cuda-graphs"], True), (["--no-cuda-graphs"], False)):
        _, options = _parse_train("digits_vim", digits_vim, ["--out", "x", *given])
        assert options.cuda_graphs is expected


@pytest.mark.once
def test_models_called_in_another_way_train_without() -> None:
    class Scaled(nn.Module):
        def forward(self, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
            return x * scale

    inputs = torch.ones(2, requires_grad=True)
    for positional, named, reason in (
        ((inputs,), {}, "other things than tensors without gradients"),
        ((inputs.detach(), 2.0), {}, "other things than tensors without gradients"),
        ((inputs.detach(),), {"scale": 2.0}, "given scale by name"),
    ):
        model = Scaled().train()
        graph_forward(model, copies_gradients=False)
        with pytest.warns(UserWarning, match=reason):
            actual = model(*positional, **named)
        torch.testing.assert_close(actual, Scaled()(*positional, **named))
