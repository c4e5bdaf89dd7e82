"""Parameter groups and learning rate."""

import math
from typing import Any

import pytest
import torch

from visionmamba.models import DeiTConfig, VimConfig
from visionmamba.training import OptimizerConfig
from visionmamba.training.backbone import blocks_of

pytestmark = pytest.mark.once


def vim() -> torch.nn.Module:
    return VimConfig(image_size=8, patch_size=2, in_channels=1, d_model=16, depth=1).build()


def test_every_parameter_is_in_one_group() -> None:
    model = vim()
    decayed, exempt = OptimizerConfig().groups(model)
    assert decayed.keys() | exempt.keys() == dict(model.named_parameters()).keys()
    assert not decayed.keys() & exempt.keys()


def test_biases_norms_and_embeddings_are_not_decayed() -> None:
    decayed, exempt = OptimizerConfig().groups(vim())
    assert {"class_token", "position_embedding.weight", "head.bias", "norm.weight"} <= exempt.keys()
    assert {"head.weight", "patch_embedding.weight"} <= decayed.keys()
    assert all(parameter.ndim > 1 for parameter in decayed.values())


def test_a_log_is_exempt_unless_the_published_behaviour_is_asked_for() -> None:
    default, _ = OptimizerConfig().groups(vim())
    published, _ = OptimizerConfig(decay_a_log=True).groups(vim())
    extra = published.keys() - default.keys()
    assert len(extra) == 2
    assert all(name.endswith("A_log") for name in extra)


def test_deits_own_exemptions_hold() -> None:
    model = DeiTConfig(image_size=8, patch_size=2, d_model=16, depth=1, num_heads=1).build()
    _, exempt = OptimizerConfig().groups(model)
    assert {"pos_embed", "cls_token"} <= exempt.keys()


def test_frozen_parameters_are_left_out() -> None:
    model = vim()
    model.get_parameter("head.weight").requires_grad_(False)
    decayed, exempt = OptimizerConfig().groups(model)
    assert "head.weight" not in decayed.keys() | exempt.keys()


def test_learning_rate_warms_up_and_follows_a_cosine() -> None:
    config = OptimizerConfig(lr=2.0, min_lr_share=0.1, warmup_epochs=1)
    optimizer, schedule = config.build(vim(), steps_per_epoch=4, epochs=3)
    rates = []
    for _ in range(12):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[:4] == [0.5, 1.0, 1.5, 2.0]
    half_way = 2 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 0.5)))
    assert rates[8] == pytest.approx(half_way)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.2)
    assert optimizer.param_groups[1]["weight_decay"] == 0


def rates_of(config: OptimizerConfig, *, steps_per_epoch: int, epochs: int) -> list[float]:
    """The learning rate of each step."""
    optimizer, schedule = config.build(vim(), steps_per_epoch=steps_per_epoch, epochs=epochs)
    rates = []
    for _ in range(steps_per_epoch * epochs):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return rates


def test_published_schedule_gives_each_epoch_the_rate_of_the_one_before() -> None:
    config = OptimizerConfig(
        lr=1e-3, schedule="published", warmup_epochs=5, warmup_lr=1e-6, min_lr=1e-5
    )
    rates = rates_of(config, steps_per_epoch=2, epochs=300)
    assert rates[0] == rates[1] == rates[2] == rates[3] == pytest.approx(1e-6)
    assert rates[4] == rates[5] == pytest.approx(1e-6 + (1e-3 - 1e-6) / 5)
    assert rates[2 * 5] == pytest.approx(1e-6 + 4 * (1e-3 - 1e-6) / 5)
    cosine = 1e-5 + 0.5 * (1e-3 - 1e-5) * (1 + math.cos(math.pi * 150 / 300))
    assert rates[2 * 151] == pytest.approx(cosine)
    assert rates[-1] == pytest.approx(
        1e-5 + 0.5 * (1e-3 - 1e-5) * (1 + math.cos(math.pi * 298 / 300))
    )


def test_published_finetuning_keeps_one_rate() -> None:
    config = OptimizerConfig(lr=1e-5, schedule="published", warmup_lr=1e-5, min_lr=1e-5)
    assert rates_of(config, steps_per_epoch=1, epochs=30) == pytest.approx([1e-5] * 30)


def test_dropping_schedule_is_that_of_the_published_detection() -> None:
    steps, drops = 184_375, (163_889, 177_546)
    config = OptimizerConfig(
        lr=1e-4,
        schedule="drops",
        drops_at=tuple(step / steps for step in drops),
        warmup_steps=250,
        warmup_lr=1e-7,
    )

    def published(step: int) -> float:
        """detectron2's WarmupParamScheduler of factor 1e-3 around a MultiStepParamScheduler."""
        rate = 1e-4 * 0.1 ** sum(step >= drop for drop in drops)
        return rate * (1e-3 * (1 - step / 250) + step / 250) if step < 250 else rate

    for step in (0, 1, 249, 250, 163_888, 163_889, 177_545, 177_546, 184_374):
        share = config.dropping_lr_share(step, num_warmup=250, num_steps=steps)
        assert 1e-4 * share == pytest.approx(published(step)), step


def test_optimizer_follows_the_drops() -> None:
    config = OptimizerConfig(
        lr=1.0, schedule="drops", drops_at=(0.5, 0.75), drop_factor=0.5, warmup_steps=1
    )
    assert rates_of(config, steps_per_epoch=4, epochs=1) == [0.0, 1.0, 0.5, 0.25]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": "drops"}, '"drops" goes with drops_at, got schedule="drops" and'),
        ({"drops_at": (0.5,)}, '"drops" goes with drops_at, got schedule="step" and'),
        ({"schedule": "drops", "drops_at": (0.9, 0.8)}, "must be growing shares of the run"),
        ({"schedule": "drops", "drops_at": (1.0,)}, r"between 0 and 1, got \(1\.0,\)"),
        ({"drop_factor": 1.0}, "drop_factor must lie between 0 and 1, got 1.0"),
    ],
)
def test_drops_that_are_none_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OptimizerConfig(**options)


def test_linear_schedule_is_that_of_the_published_segmentation() -> None:
    config = OptimizerConfig(
        lr=2e-4, schedule="linear", warmup_steps=1500, warmup_lr=2e-10, min_lr=0.0
    )

    def published(step: int) -> float:
        """mmcv's poly of power 1 with linear warm-up of ratio 1e-6."""
        line = 2e-4 * (1 - step / 60_000)
        return line * (1 - (1 - step / 1500) * (1 - 1e-6)) if step < 1500 else line

    _, schedule = config.build(vim(), steps_per_epoch=1000, epochs=60)
    for step in (0, 1, 749, 1499, 1500, 1501, 30_000, 59_999, 60_000):
        assert 2e-4 * schedule.lr_lambdas[0](step) == pytest.approx(published(step), abs=1e-15)


def test_warmup_in_steps_overrides_that_in_epochs() -> None:
    config = OptimizerConfig(lr=1.0, warmup_steps=2, warmup_epochs=3, min_lr_share=1.0)
    assert rates_of(config, steps_per_epoch=2, epochs=2) == pytest.approx([0.5, 1, 1, 1])


def test_warmup_begins_at_its_own_rate() -> None:
    config = OptimizerConfig(lr=1.0, warmup_lr=0.2, warmup_epochs=1, min_lr=0.5)
    rates = rates_of(config, steps_per_epoch=4, epochs=2)
    assert rates[:4] == pytest.approx([0.4, 0.6, 0.8, 1.0])
    assert rates[4] == pytest.approx(1.0)
    assert min(rates[4:]) > 0.5


@pytest.mark.parametrize(
    ("model", "embedding"),
    [
        (VimConfig(image_size=8, patch_size=2, d_model=16, depth=3).build(), "position_embedding"),
        (
            DeiTConfig(image_size=8, patch_size=2, d_model=16, depth=3, num_heads=1).build(),
            "pos_embed",
        ),
    ],
    ids=["vim", "deit"],
)
def test_layer_decay_reaches_every_block(model: torch.nn.Module, embedding: str) -> None:
    scales = OptimizerConfig(layer_decay=0.5).layer_scales(model)
    assert scales.keys() == dict(model.named_parameters()).keys()
    of_block = [
        {scale for name, scale in scales.items() if name.startswith(f"blocks.{block}.")}
        for block in range(3)
    ]
    assert of_block == [{0.125}, {0.25}, {0.5}]
    assert {scales["head.weight"], scales["norm.weight"]} == {1.0}
    assert {scale for name, scale in scales.items() if name.startswith(embedding)} == {0.0625}


def test_layer_decay_and_weight_decay_hold_together() -> None:
    model = vim()
    optimizer, _ = OptimizerConfig(lr=1.0, warmup_epochs=0, layer_decay=0.5).build(
        model, steps_per_epoch=1, epochs=1
    )
    found = {
        id(parameter): (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    assert len(found) == len(list(model.parameters()))
    assert found[id(model.get_parameter("head.weight"))] == (1.0, 0.05)
    assert found[id(model.get_parameter("blocks.0.norm.weight"))] == (0.5, 0.0)
    assert found[id(model.get_parameter("blocks.0.mixer.out_proj.weight"))] == (0.5, 0.05)


class Nested(torch.nn.Module):
    """A backbone deep inside, and a head that has blocks of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = torch.nn.ModuleDict({"body": vim()})
        self.head = torch.nn.ModuleDict({"blocks": torch.nn.ModuleList([torch.nn.Linear(2, 2)])})


def test_layer_decay_reaches_the_blocks_of_a_backbone_alone() -> None:
    scales = OptimizerConfig(layer_decay=0.5).layer_scales(Nested())
    assert scales["backbone.body.blocks.0.norm.weight"] == 0.5
    assert scales["backbone.body.patch_embedding.weight"] == 0.25
    assert scales["backbone.body.norm.weight"] == scales["head.blocks.0.weight"] == 1.0


def test_published_layer_decay_misses_the_blocks() -> None:
    config = OptimizerConfig(layer_decay=0.5, layer_decay_reach="embeddings")
    scales = config.layer_scales(Nested())
    assert scales["backbone.body.blocks.0.norm.weight"] == 1.0
    assert scales["backbone.body.position_embedding.weight"] == 0.25


def test_exemptions_of_a_backbone_hold_unless_the_published_behaviour_is_asked_for() -> None:
    _, exempt = OptimizerConfig().groups(Nested())
    embeddings = {f"backbone.body.{name}" for name in ("class_token", "position_embedding.weight")}
    assert embeddings <= exempt.keys()
    decayed, _ = OptimizerConfig(decay_embeddings=True).groups(Nested())
    assert embeddings <= decayed.keys()


def test_blocks_are_found_in_a_backbone() -> None:
    model = Nested()
    assert blocks_of(model) == list(model.backbone["body"].blocks)
    with pytest.raises(ValueError, match=r"Linear has no blocks\.0, blocks\.1"):
        blocks_of(torch.nn.Linear(2, 2))


def test_layer_decay_without_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match=r"needs parameters named blocks\.0.*; Linear has none"):
        OptimizerConfig(layer_decay=0.5).layer_scales(torch.nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 0.0}, "lr must be positive, got 0"),
        ({"min_lr_share": 2.0}, "min_lr_share must lie between 0 and 1"),
        ({"warmup_epochs": -1.0}, "warmup_epochs must be at least 0"),
        ({"warmup_steps": -1}, "warmup_steps must be at least 0, got -1"),
        ({"schedule": "published", "warmup_steps": 9}, "one rate an epoch, got warmup_steps=9"),
        ({"weight_decay": -0.1}, "weight_decay must be at least 0"),
        ({"clip_norm": 0.0}, "clip_norm must be positive or None"),
        ({"layer_decay": 1.5}, "layer_decay must be above 0, at most 1, or None"),
        ({"warmup_lr": 1.0}, "warmup_lr must lie between 0 and lr=0.001, got 1.0"),
        ({"min_lr": 1.0}, "min_lr must lie between 0 and lr=0.001, got 1.0"),
        ({"eps": 0.0}, "eps must be positive"),
    ],
)
def test_wrong_value_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OptimizerConfig(**options)
