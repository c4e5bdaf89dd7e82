"""VimConfig: sizes, refusals with the valid options named, translation of the authors' options."""

from dataclasses import fields

import pytest

from visionmamba import VimConfig
from visionmamba.models import DeiTConfig
from visionmamba.models.config import VimOptions
from visionmamba.models.deit import DeiTOptions


@pytest.mark.parametrize(
    ("config", "options"), [(VimConfig, VimOptions), (DeiTConfig, DeiTOptions)]
)
def test_sizes_take_every_field(config, options):
    assert set(options.__annotations__) == {field.name for field in fields(config)}


@pytest.mark.parametrize(
    ("make", "count"),
    [(VimConfig.tiny, 7_148_008), (VimConfig.small, 25_796_584), (VimConfig.base, 97_598_440)],
)
def test_published_parameter_counts(make, count):
    assert sum(p.numel() for p in make().build().parameters()) == count


@pytest.mark.parametrize(
    ("make", "count"), [(VimConfig.tiny, 7_250_344), (VimConfig.small, 26_001_256)]
)
def test_published_parameter_counts_of_long_sequences(make, count):
    assert sum(p.numel() for p in make(stride=8).build().parameters()) == count


@pytest.mark.parametrize(
    ("make", "count"),
    [(DeiTConfig.tiny, 5_717_416), (DeiTConfig.small, 22_050_664), (DeiTConfig.base, 86_567_656)],
)
def test_deit_parameter_counts(make, count):
    assert sum(p.numel() for p in make().build().parameters()) == count


@pytest.mark.parametrize("make", [VimConfig, VimConfig.tiny, VimConfig.base, DeiTConfig.tiny])
def test_misspelt_option_is_refused_with_the_valid_ones_named(make):
    with pytest.raises(TypeError, match=r"'num_clases'.*valid: .*num_classes"):
        make(num_clases=10)


def test_positional_options_are_refused():
    with pytest.raises(TypeError, match="by name only"):
        VimConfig(224)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"readout": "midle"}, r"readout must be one of 'middle', 'head'.*got 'midle'"),
        ({"bidirectional": "v2"}, r"'none', 'sequence', 'layer', 'ssm', 'ssm\+conv'; got 'v2'"),
        ({"norm": "batchnorm"}, "norm must be one of"),
        ({"d_model": 0}, "d_model must be an int of at least 1"),
        ({"depth": 2.0}, "depth must be an int of at least 1"),
        ({"num_classes": -1}, "num_classes must be an int of at least 0"),
        ({"dt_rank": "full"}, 'dt_rank must be "auto" or an int'),
        ({"image_size": (224, 224, 3)}, "image_size must be an int or a tuple"),
        ({"image_size": 8}, "smaller than patch_size 16"),
        ({"drop_path": 1.5}, "drop_path must be between 0 and 1"),
        ({"bidirectional": "layer", "depth": 3}, "depth must be even"),
        ({"rope": "tokens", "d_model": 30}, "multiple of 4"),
        ({"inner_mixer": "ssm"}, "inner_mixer is for"),
        ({"norm_eps": 0.0}, "norm_eps must be positive"),
    ],
)
def test_wrong_values_are_refused_with_what_is_wanted(options, message):
    with pytest.raises(ValueError, match=message):
        VimConfig(**options)


def test_published_options_become_ours():
    config = VimConfig.from_published(
        {
            "img_size": 64,
            "patch_size": 16,
            "stride": 8,
            "embed_dim": 96,
            "depth": 4,
            "ssm_cfg": {"d_conv": 3, "dt_rank": 5},
            "if_rope": True,
            "if_rope_residual": True,
            "if_devide_out": False,
            "drop_path_rate": 0.2,
        }
    )
    assert config == VimConfig(
        image_size=64,
        stride=8,
        d_model=96,
        depth=4,
        d_conv=3,
        dt_rank=5,
        rope="tokens+residual",
        rope_layout="published",
        halve_directions=False,
        drop_path=0.2,
    )
