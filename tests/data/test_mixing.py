"""Mixup and CutMix mix pictures and labels in the same shares."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from visionmamba.data import Batch, Mixing, Preprocessing
from visionmamba.tasks import ClassificationTask

pytestmark = pytest.mark.once

LABELS = torch.tensor([0, 1, 2, 1])
PREPROCESSING = Preprocessing(image_size=16, channels="L", mean=(0,), std=(1,))


def flat_images() -> Tensor:
    """One value a picture: 0, 1, 2, 3."""
    return torch.arange(4.0).view(4, 1, 1, 1).expand(4, 1, 16, 16).contiguous()


def mixed(mixing: Mixing, seed: int = 0) -> tuple[Tensor, Tensor]:
    np.random.seed(seed)
    return mixing.mix(flat_images(), LABELS, num_classes=3)


def test_mixup_adds_pictures_and_labels_in_the_same_shares() -> None:
    images, targets = mixed(Mixing(mixup=0.8))
    share = targets[0, 0]
    assert 0 < share < 1
    torch.testing.assert_close(images[0], torch.full((1, 16, 16), 3 * (1 - share.item())))
    torch.testing.assert_close(targets[0], torch.tensor([share, 1 - share, 0]))
    torch.testing.assert_close(targets[1], torch.tensor([0, share, 1 - share]))


def test_cutmix_pastes_a_rectangle_and_its_share_of_the_labels() -> None:
    images, targets = mixed(Mixing(cutmix=1.0), seed=2)
    pasted = (images[0] == 3).float().mean()
    assert 0 < pasted < 1
    assert ((images[0] == 0) | (images[0] == 3)).all()
    torch.testing.assert_close(targets[0], torch.tensor([1 - pasted, pasted, 0]))


def test_mixing_follows_numpys_seed_and_leaves_its_arguments_alone() -> None:
    mixing = Mixing(mixup=0.8, cutmix=1.0)
    images = flat_images()
    np.random.seed(3)
    first = mixing.mix(images, LABELS, num_classes=3)
    assert torch.equal(images, flat_images())
    again, other = mixed(mixing, seed=3), mixed(mixing, seed=4)
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[1], other[1])


def test_no_mixing_by_default() -> None:
    images, targets = mixed(Mixing())
    assert torch.equal(images, flat_images())
    assert torch.equal(targets, F.one_hot(LABELS, 3).float())


def test_share_of_mixed_batches_is_as_asked() -> None:
    mixing = Mixing(mixup=0.8, probability=0.25)
    is_mixed = [mixed(mixing, seed)[1][0, 0] < 1 for seed in range(400)]
    assert 0.18 < np.mean(is_mixed) < 0.32  # three standard deviations


def test_odd_batch_is_refused() -> None:
    with pytest.raises(ValueError, match="need an even number of images in a batch, got 3; chang"):
        Mixing(mixup=1).mix(flat_images()[:3], LABELS[:3], num_classes=3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mixup": -1}, "mixup must be at least 0, got -1"),
        ({"cutmix": -0.5}, "cutmix must be at least 0, got -0.5"),
        ({"probability": 1.5}, "probability must lie between 0 and 1, got 1.5"),
        ({"switch_probability": -1}, "switch_probability must lie between 0 and 1, got -1"),
    ],
)
def test_wrong_mixing_is_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Mixing(**options)


def test_loss_is_the_published_soft_target_cross_entropy() -> None:
    mixing = Mixing(mixup=0.8, cutmix=1.0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(256, 3))
    task = ClassificationTask(
        model,
        class_names=("a", "b", "c"),
        preprocessing=PREPROCESSING,
        label_smoothing=0.1,
        mixing=mixing,
    )
    np.random.seed(5)
    loss = task.training_loss(Batch(flat_images(), LABELS, torch.arange(4)))
    images, targets = mixed(mixing, seed=5)
    smooth = targets * 0.9 + 0.1 / 3  # timm smooths before it mixes, which is the same
    torch.testing.assert_close(loss, -(smooth * model(images).log_softmax(-1)).sum(-1).mean())
