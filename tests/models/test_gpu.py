"""The whole model on a GPU: golden outputs, low precision, training, devices that disagree."""

import pytest
import torch
from torch import nn

from tests.models.published import golden_case, golden_names
from visionmamba import VimConfig, load, load_published, save
from visionmamba.ops import cuda

FLOAT32_TOLERANCE = 1e-4  # other summation orders than the CPU's
BFLOAT16_TOLERANCE = 2e-2  # weights and activations rounded to 8 bits

pytestmark = pytest.mark.gpu


def relative_error(actual, expected):
    return ((actual.cpu().double() - expected.double()).norm() / expected.double().norm()).item()


def golden_model(name):
    meta, weights, images, expected, _ = golden_case(name)
    config = VimConfig.from_published(meta["config"])
    size, stride = config.image_size, config.resolved_stride
    model = load_published(weights, image_size=size, stride=stride)
    return model.cuda(), images.cuda(), expected


@pytest.mark.parametrize("name", golden_names())
def test_golden_logits_in_float32(name):
    model, images, expected = golden_model(name)
    with torch.no_grad():
        assert relative_error(model(images), expected) < FLOAT32_TOLERANCE


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_golden_logits_in_low_precision(dtype):
    model, images, expected = golden_model("ti_224")
    with torch.no_grad():
        logits = model.to(dtype)(images.to(dtype))
    assert relative_error(logits, expected) < BFLOAT16_TOLERANCE


def test_golden_logits_in_bfloat16_are_no_worse_than_plain_pytorch(monkeypatch):
    model, images, expected = golden_model("ti_224")
    model, images = model.bfloat16(), images.bfloat16()
    errors = []
    for backend in ("cuda", "torch"):
        monkeypatch.setenv(cuda.ENVIRONMENT_VARIABLE, backend)
        cuda.forget_choice()
        with torch.no_grad():
            errors.append(relative_error(model(images), expected))
    cuda.forget_choice()
    assert errors[0] < 1.1 * errors[1]


def test_a_hundred_steps_in_bfloat16_follow_float32():
    config = VimConfig.tiny(image_size=32, patch_size=8, num_classes=5)
    curves = []
    for is_half in (False, True):
        torch.manual_seed(0)
        model = config.build().cuda()
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
        patterns = 0.15 * torch.randn(5, 3, 32, 32)
        losses = []
        for _ in range(100):
            labels = torch.randint(5, (32,))
            images = patterns[labels] + torch.randn(32, 3, 32, 32)
            with torch.autocast("cuda", torch.bfloat16, enabled=is_half):
                logits = model(images.cuda())
            loss = nn.functional.cross_entropy(logits.float(), labels.cuda())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        curves.append(torch.tensor(losses))
    assert (curves[1] - curves[0]).abs().max() < 0.2
    assert (curves[1] - curves[0]).abs().mean() < 0.03
    assert curves[1][-10:].mean() < 0.3


def test_pictures_on_the_wrong_device_are_refused():
    model = VimConfig(image_size=32, patch_size=8, d_model=32, depth=1).build().cuda()
    with pytest.raises(
        ValueError, match=r'on cpu but the model is on cuda:0.*images.to\("cuda:0"\)'
    ):
        model(torch.zeros(1, 3, 32, 32))


def test_weights_go_to_the_gpu_by_themselves(tmp_path):
    save(VimConfig(image_size=32, patch_size=8, d_model=32, depth=1).build(), tmp_path / "w")
    assert next(load(tmp_path / "w").parameters()).is_cuda


def gradients_in_bfloat16(model, forward, images):
    model.zero_grad()
    with torch.autocast("cuda", torch.bfloat16):
        logits = forward(images)
    logits.float().square().mean().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def test_the_same_gradients_under_ddp():
    model = VimConfig(image_size=32, patch_size=8, d_model=192, depth=2).build().cuda()
    images = torch.randn(2, 3, 32, 32, device="cuda")
    expected = gradients_in_bfloat16(model, model, images)
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("nccl", store=store, rank=0, world_size=1)
    try:
        actual = gradients_in_bfloat16(
            model, nn.parallel.DistributedDataParallel(model, device_ids=[0]), images
        )
    finally:
        torch.distributed.destroy_process_group()
    for name, gradient in expected.items():
        assert relative_error(actual[name], gradient.cpu()) < FLOAT32_TOLERANCE, name


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the compiler itself
def test_the_same_gradients_when_compiled():
    model = VimConfig(image_size=32, patch_size=8, d_model=192, depth=2).build().cuda()
    images = torch.randn(2, 3, 32, 32, device="cuda")
    expected = gradients_in_bfloat16(model, model, images)
    actual = gradients_in_bfloat16(model, torch.compile(model, fullgraph=True), images)
    for name, gradient in expected.items():
        assert relative_error(actual[name], gradient.cpu()) < 2 * BFLOAT16_TOLERANCE, name
