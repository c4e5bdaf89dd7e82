"""The authors' checkpoints: every way they come in, every size they go out, and no hostile one."""

import argparse
import os
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from timm.data import ImageNetInfo
from timm.models import adapt_input_conv

from tests.models.published import drawn_weights, golden_case, published_logits, published_shapes
from visionmamba import load, load_published, save

TINY = "vim_tiny_patch16_224_bimambav2_final_pool_mean_abs_pos_embed_with_midclstok_div2"
TINY_STRIDE_8 = TINY.replace("patch16_224", "patch16_stride8_224")
TINY_ROPE = "vim_tiny_patch16_224_bimambav2_final_pool_mean_abs_pos_embed_rope_also_residual"
TOLERANCE = 1e-4  # float32 rounding of logits of order 1


def save_checkpoint(path, weights, **args):
    """Write what the authors' training writes."""
    args = {"model": TINY, "input_size": 64, "data_set": "IMNET", "lr": 1e-3, **args}
    entries = {
        "model": weights,
        "optimizer": {"state": {}, "param_groups": [{"lr": 1e-3}]},
        "lr_scheduler": {"base_values": [1e-3]},
        "epoch": 299,
        "model_ema": {key: value + 1 for key, value in weights.items()},
        "scaler": "none",
        "args": argparse.Namespace(**args),
    }
    torch.save(entries, path)
    return path


@pytest.fixture
def small(tmp_path):
    """A checkpoint of 64 px, 4 blocks and 10 classes; its weights, images and logits."""
    _, weights, images, logits, _ = golden_case("v2_mid_div2")
    return save_checkpoint(tmp_path / "vim.pth", weights), weights, images, logits


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Vim-Ti at 224 px and 1000 classes."""
    _, weights, images, logits, _ = golden_case("ti_224")
    path = tmp_path_factory.mktemp("tiny") / "vim_t_midclstok_76p1acc.pth"
    return save_checkpoint(path, weights, input_size=224), weights, images, logits


def near(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=TOLERANCE, atol=TOLERANCE)


@torch.no_grad()
def test_vim_tiny_gives_the_published_logits(tiny):
    path, _, images, logits = tiny
    near(load_published(path)(images), logits)


@torch.no_grad()
def test_vim_tiny_at_another_size_is_the_model_called_at_that_size(tiny):
    path = tiny[0]
    images = torch.randn(1, 3, 384, 256)
    model = load_published(path, image_size=(384, 256))
    assert model.position_embedding.grid == (24, 16)
    assert torch.equal(model(images), load_published(path)(images))
    change = "position embedding resized from (14, 14) to (24, 16) patches"
    assert model.load_report.changes == (change,)


@torch.no_grad()
def test_vim_tiny_with_ten_classes_keeps_all_but_the_head(tiny):
    path, _, images, _ = tiny
    model = load_published(path, num_classes=10)
    assert model(images).shape == (2, 10)
    features = load_published(path).forward_features(images)
    assert torch.equal(model.forward_features(images), features)
    change = "head of 1000 classes replaced by a new one of 10, to be trained"
    assert model.load_report.changes == (change,)


@torch.no_grad()
def test_converted_checkpoint_comes_back_bit_for_bit(tiny, tmp_path):
    path, _, images, _ = tiny
    model = load_published(path)
    save(model, tmp_path / "vim.safetensors")
    loaded = load(tmp_path / "vim.safetensors", device="cpu")
    assert loaded.config == model.config and loaded.header == model.header
    state = loaded.state_dict()
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert torch.equal(loaded(images), model(images))


def test_classes_and_preparation_of_imagenet_are_known(tiny):
    header = load_published(tiny[0]).header
    assert header.class_names == tuple(ImageNetInfo().label_names())
    assert header.preprocessing["image_size"] == [224, 224]
    assert header.preprocessing["interpolation"] == "bicubic"


def test_classes_of_other_data_are_not_named(small):
    assert load_published(small[0]).header.class_names == ()


@torch.no_grad()
def test_average_of_the_weights_can_be_had(small):
    path, weights, _, _ = small
    model = load_published(path, which="model_ema")
    assert torch.equal(model.norm.weight, weights["norm_f.weight"] + 1)


@torch.no_grad()
@pytest.mark.parametrize("form", ["state_dict", "checkpoint in memory", "bare file", "safetensors"])
def test_weights_come_in_every_form(small, tmp_path, form):
    _, weights, images, logits = small
    bare, tensors = tmp_path / "bare.pth", tmp_path / "weights.safetensors"
    torch.save(weights, bare)
    save_file(weights, tensors)
    forms = {
        "state_dict": weights,
        "checkpoint in memory": {"model": weights, "epoch": 3},
        "bare file": bare,
        "safetensors": tensors,
    }
    near(load_published(forms[form])(images), logits)


@torch.no_grad()
def test_file_written_before_zip_archives_loads(small, tmp_path):
    _, weights, images, logits = small
    torch.save({"model": weights}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    near(load_published(tmp_path / "old.pth")(images), logits)


def test_numpy_numbers_among_the_args_are_allowed(small, tmp_path):
    numbers = {"lr": np.float64(1e-3), "seed": np.int64(7), "amp": np.bool_(True)}
    path = save_checkpoint(tmp_path / "numbers.pth", small[1], **numbers)
    assert load_published(path).config.stride == 16


@torch.no_grad()
def test_args_tell_stride_and_size(tmp_path):
    _, weights, images, logits, _ = golden_case("v2_stride8")
    model = load_published(save_checkpoint(tmp_path / "v.pth", weights, model=TINY_STRIDE_8))
    assert (model.config.image_size, model.config.stride) == (64, 8)
    assert model.load_report.options["stride"] == (8, "args")
    assert model.load_report.guessed == {"norm_eps": 1e-5}
    near(model(images), logits)


def test_report_lists_what_was_guessed(small):
    report = load_published(small[1]).load_report
    assert report.guessed == {
        "image_size": 64,
        "stride": 16,
        "readout": "middle",
        "halve_directions": True,
        "norm_eps": 1e-5,
    }
    assert "guessed, as in the released models: readout='middle'" in str(report)


def test_report_lists_origins_and_what_was_left(small):
    report = load_published(small[0], num_classes=0).load_report
    assert report.options["num_classes"] == (0, "given")
    assert report.options["depth"] == (4, "shapes")
    assert report.options["halve_directions"] == (True, "args")
    assert report.changes == ("head of 10 classes dropped",)
    assert report.unused == ("optimizer", "lr_scheduler", "epoch", "model_ema", "scaler")
    for line in (
        "  given: num_classes=0",
        "  changed: head of 10 classes dropped",
        "  not used: optimizer, lr_scheduler, epoch, model_ema, scaler",
    ):
        assert line in str(report).splitlines()


@pytest.mark.parametrize(
    ("args", "note"),
    [
        ({"model": "my_vim"}, "args.model 'my_vim' is none of the authors' names"),
        ({"input_size": 224}, "does not fit the shapes"),
        ({"model": TINY_ROPE}, "does not fit the shapes"),
    ],
)
def test_args_that_do_not_fit_are_noted_and_left(small, tmp_path, args, note):
    model = load_published(save_checkpoint(tmp_path / "v.pth", small[1], **args))
    assert note in model.load_report.notes[0]
    assert (model.config.image_size, model.config.readout) == (64, "middle")


@torch.no_grad()
@pytest.mark.parametrize("has_token", [False, True])
def test_rotating_models_of_january_2024_load(tmp_path, has_token):
    options = {
        "embed_dim": 32,
        "depth": 2,
        "num_classes": 10,
        "img_size": 64,
        "patch_size": 16,
        "final_pool_type": "mean",
        "if_rope": True,
        "if_rope_residual": True,
        "if_divide_out": False,
        "if_cls_token": has_token,
        "use_middle_cls_token": False,
    }
    weights = drawn_weights(published_shapes(options), seed=3)
    t = torch.arange(4) / 4 * 14
    angles = torch.outer(t, 10000.0 ** (-torch.arange(0, 16, 2) / 16)).repeat_interleave(2, dim=1)
    rows, columns = angles[:, None].expand(4, 4, 16), angles[None].expand(4, 4, 16)
    angle = torch.cat((rows, columns), dim=-1).reshape(16, 32)
    buffers = {"rope.freqs_cos": angle.cos(), "rope.freqs_sin": angle.sin()}
    images = torch.randn(2, 3, 64, 64)
    expected = published_logits(options, weights, images.double()).float()
    name = TINY_ROPE + "_with_cls_token" * has_token
    path = save_checkpoint(tmp_path / "v.pth", {**weights, **buffers}, model=name)
    near(load_published(path)(images), expected)
    near(load_published({**weights, **buffers})(images), expected)
    report = load_published({**weights, "rope.freqs_cos": angle.cos() + 0.1}).load_report
    assert "rope.freqs_cos is of another rope_reference_grid" in report.notes[0]


def resized(rows, old, new):
    grid = rows.transpose(1, 2).reshape(1, -1, *old)
    return F.interpolate(grid, size=new, mode="bicubic").flatten(2).transpose(1, 2)


def test_positions_are_resized_with_the_middle_row_apart(small):
    path, weights, _, _ = small
    rows = weights["pos_embed"]  # 4x4 patches, the class token's row is number 8
    patches = resized(torch.cat((rows[:, :8], rows[:, 9:]), dim=1), (4, 4), (6, 5))
    expected = torch.cat((patches[:, :15], rows[:, 8:9], patches[:, 15:]), dim=1)
    model = load_published(path, image_size=(96, 80))
    torch.testing.assert_close(model.position_embedding.weight.data, expected)


def test_positions_are_resized_in_the_authors_way_when_asked(small):
    path, weights, _, _ = small
    rows = weights["pos_embed"]
    expected = torch.cat((rows[:, :1], resized(rows[:, 1:], (4, 4), (7, 7))), dim=1)
    model = load_published(path, stride=8, resize="published")
    torch.testing.assert_close(model.position_embedding.weight.data, expected)
    assert "in the authors' way from (4, 4) to (7, 7)" in model.load_report.changes[0]


@torch.no_grad()
def test_gray_pictures_are_seen_as_their_three_equal_channels(small):
    path = small[0]
    gray = torch.randn(2, 1, 64, 64)
    expected = load_published(path)(gray.expand(-1, 3, -1, -1))
    near(load_published(path, in_channels=1)(gray), expected)


@pytest.mark.parametrize("in_channels", [1, 2, 4, 8])
def test_channels_change_as_in_timm(small, in_channels):
    path, weights, _, _ = small
    expected = adapt_input_conv(in_channels, weights["patch_embed.proj.weight"])
    model = load_published(path, in_channels=in_channels)
    torch.testing.assert_close(model.patch_embedding.weight.data, expected)
    assert model.header.preprocessing == {}


@pytest.mark.parametrize("readout", ["mean", "last"])
def test_class_token_can_be_dropped(small, readout):
    path, weights, _, _ = small
    model = load_published(path, readout=readout)
    rows = weights["pos_embed"]
    assert model.class_token is None
    expected = torch.cat((rows[:, :8], rows[:, 9:]), dim=1)
    assert torch.equal(model.position_embedding.weight.data, expected)


def test_picture_that_is_not_square_is_told_by_its_size():
    options = {"embed_dim": 32, "depth": 1, "num_classes": 3, "img_size": (48, 80)}
    weights = drawn_weights(published_shapes({**options, "patch_size": 16}), seed=1)
    with pytest.raises(ValueError, match=r"rows for 15 patches.*give image_size=\(height, width\)"):
        load_published(weights)
    model = load_published(weights, image_size=(48, 80))
    assert model.position_embedding.grid == (3, 5) and not model.load_report.changes


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"depth": 3}, "the weights have depth 4, which loading cannot change; got 3"),
        ({"bidirectional": "none"}, "the weights have bidirectional 'ssm.conv', which"),
        ({"patch_size": 8}, "the weights have patch_size 16, which"),
        ({"layer_scale": 0.1}, "the weights have no layer scale, which"),
        ({"readout": "double"}, r"readout 'double' needs 2 class token\(s\)"),
        ({"which": "ema"}, "which must be 'model' or 'model_ema'; got 'ema'"),
        ({"resize": "bilinear"}, "resize must be 'grid' or 'published'; got 'bilinear'"),
    ],
)
def test_what_loading_cannot_change_is_refused(small, overrides, message):
    with pytest.raises(ValueError, match=message):
        load_published(small[0], **overrides)


def test_unknown_option_is_refused(small):
    with pytest.raises(TypeError, match="no option 'num_clases'"):
        load_published(small[0], num_clases=3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm_f.weight": None}, "is not a published Vim: it has no norm_f.weight"),
        ({"pos_embed": torch.zeros(3)}, r"pos_embed must have 3 dimensions; got \(3,\)"),
        ({"layers.3.norm.weight": None}, "does not fit its model: it lacks blocks.3.norm.weight"),
        ({"surprise": torch.zeros(1)}, "does not fit its model: it has unknown surprise"),
        ({"head.bias": torch.zeros(9)}, r"head.bias must be \(10,\); got \(9,\)"),
        ({"head.bias": torch.zeros(10, dtype=torch.int8)}, "head.bias is torch.int8"),
        ({"head.bias": torch.zeros(10, device="meta")}, "plain floating-point tensors; head.bias"),
    ],
)
def test_weights_that_do_not_fit_are_refused(small, change, message):
    weights = {key: value for key, value in {**small[1], **change}.items() if value is not None}
    with pytest.raises(ValueError, match=message):
        load_published(weights)


def test_state_dict_of_another_model_is_refused():
    with pytest.raises(ValueError, match="is not a published Vim"):
        load_published({"weight": torch.zeros(1)})


@pytest.mark.parametrize("contents", [[1, 2], {"model": 3}, {"model": {"x": "y"}}])
def test_file_without_weights_is_refused(tmp_path, contents):
    torch.save(contents, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=r"x\.pth holds no state_dict of tensors"):
        load_published(tmp_path / "x.pth")


def test_absent_entry_of_a_checkpoint_is_named(small, tmp_path):
    torch.save({"model": small[1]}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match="no entry 'model_ema'; use which='model'"):
        load_published(tmp_path / "x.pth", which="model_ema")
    with pytest.raises(ValueError, match="no checkpoint with an entry 'model_ema'; leave `which`"):
        load_published(small[1], which="model_ema")


def test_own_file_is_sent_to_load(small, tmp_path):
    save(load_published(small[0]), tmp_path / "own.safetensors")
    with pytest.raises(ValueError, match=r"is a file of visionmamba; load it with visionmamba\.lo"):
        load_published(tmp_path / "own.safetensors")


def test_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.pth is missing"):
        load_published(tmp_path / "none.pth")


class Hostile:
    """A pickle of it makes a folder when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("place", ["model", "args", "optimizer"])
def test_hostile_checkpoint_is_refused_and_runs_nothing(small, tmp_path, place):
    path = tmp_path / "hostile.pth"
    torch.save({"model": small[1], place: Hostile(tmp_path / "ran")}, path)
    reason = f"{path} cannot be read safely: it asks to run posix.mkdir, which was refused"
    with pytest.raises(ValueError, match=re.escape(reason)):
        load_published(path)
    assert not (tmp_path / "ran").exists()


def test_hostile_plain_pickle_is_refused_and_runs_nothing(tmp_path):
    (tmp_path / "x.pth").write_bytes(pickle.dumps(Hostile(tmp_path / "ran")))
    with pytest.raises(ValueError, match="cannot be read safely"):
        load_published(tmp_path / "x.pth")
    assert not (tmp_path / "ran").exists()


class MadeUpType:
    """Pickled as a numpy type whose state crashes numpy."""

    def __reduce__(self):
        return np.dtype, ("f8", False, True), (4, "<", (1, 2), ("a",), {"a": 1}, 8, 1, 16)


class TypeOfObjects:
    """Pickled as the numpy type of arbitrary objects."""

    def __reduce__(self):
        return np.dtype, ("O8", False, True)


@pytest.mark.parametrize("kind", [MadeUpType, TypeOfObjects])
def test_made_up_numpy_types_do_no_harm(small, tmp_path, kind):
    path = tmp_path / "x.pth"
    torch.save({"model": {"weight": torch.zeros(1)}, "args": kind()}, path)
    with pytest.raises(ValueError, match=r"cannot be read safely|is not a published Vim"):
        load_published(path)


@pytest.mark.parametrize("kept", [0, 5, 300, -1])
def test_truncated_checkpoint_is_refused(small, kept):
    path = Path(small[0])
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match="cannot be read safely: it is damaged"):
        load_published(path)
