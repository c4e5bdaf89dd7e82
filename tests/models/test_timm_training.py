"""timm's training and validation on real digits, in the steps of its train.py and validate.py."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from timm.data import Mixup, create_dataset, create_loader, resolve_data_config
from timm.loss import SoftTargetCrossEntropy
from timm.models import load_checkpoint
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import AverageMeter, CheckpointSaver, ModelEmaV3, accuracy
from torch import nn

import visionmamba  # noqa: F401  # makes Vim known to timm
from visionmamba.data import Digits

MODEL = "vim_tiny_patch16_224"
OPTIONS = {
    "img_size": 32,
    "patch_size": 8,
    "in_chans": 1,
    "num_classes": 10,
    "embed_dim": 64,
    "depth": 2,
}
ARGUMENTS = {"input_size": (1, 32, 32), "mean": (0.5,), "std": (0.5,), "crop_pct": 1.0}
EPOCHS = 6
LEARNED, GUESSED = 0.7, 0.3  # share of right answers; chance is 0.1

pytestmark = [
    pytest.mark.once,
    pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning"),  # timm's readers close none
]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Let small products not wait for a second thread, which may have no core of its own."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """400 digits to learn from and 150 to be asked, as folders of pictures."""
    root = tmp_path_factory.mktemp("digits")
    splits = Digits().build()
    for split, pictures, count in (("train", splits.train, 400), ("val", splits.val, 150)):
        for index in range(count):
            folder = root / split / str(pictures.labels[index])
            folder.mkdir(parents=True, exist_ok=True)
            pictures.image(index).convert("L").resize((32, 32)).save(folder / f"{index}.png")
    return root


def loader(root: Path, split: str, data_config, *, shuffled: bool = False):
    is_training = split == "train"
    dataset = create_dataset(
        "", root=root, split=split, is_training=is_training, input_img_mode="L"
    )
    if shuffled:
        samples = dataset.reader.samples
        labels = np.random.default_rng(0).permutation([label for _, label in samples])
        files = [file for file, _ in samples]
        dataset.reader.samples = list(zip(files, labels.tolist(), strict=True))
    return create_loader(
        dataset,
        input_size=data_config["input_size"],
        batch_size=50,
        is_training=is_training,
        interpolation=data_config["interpolation"],
        mean=data_config["mean"],
        std=data_config["std"],
        crop_pct=data_config["crop_pct"],
        scale=(0.7, 1.0),
        hflip=0.0,
        color_jitter=0.0,
        num_workers=0,
        persistent_workers=False,
        use_prefetcher=False,
        device=torch.device("cpu"),
    )


def validate(model: nn.Module, batches) -> float:
    top1 = AverageMeter()
    model.eval()
    with torch.inference_mode():
        for images, labels in batches:
            (right,) = accuracy(model(images), labels)
            top1.update(right.item() / 100, len(images))
    return top1.avg


def train(root: Path, output: Path, *, shuffled: bool) -> None:
    model = timm.create_model(MODEL, **OPTIONS, drop_path_rate=0.05)
    model.set_grad_checkpointing()
    data_config = resolve_data_config(ARGUMENTS, model=model)
    batches = loader(root, "train", data_config, shuffled=shuffled)
    held_out = loader(root, "val", data_config)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=5e-3, weight_decay=0.05, layer_decay=0.9)
    scheduler, epochs = create_scheduler_v2(
        optimizer,
        sched="cosine",
        num_epochs=EPOCHS,
        warmup_epochs=1,
        warmup_lr=1e-4,
        step_on_epochs=False,
        updates_per_epoch=len(batches),
    )
    mixup = Mixup(mixup_alpha=0.1, prob=0.5, label_smoothing=0.1, num_classes=10)
    loss_of, averaged = SoftTargetCrossEntropy(), ModelEmaV3(model, decay=0.9)
    saver = CheckpointSaver(
        model, optimizer, model_ema=averaged, checkpoint_dir=str(output), max_history=1
    )
    updates = 0
    for epoch in range(epochs):
        model.train()
        for images, labels in batches:
            images, targets = mixup(images, labels)
            loss = loss_of(model(images), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            updates += 1
            averaged.update(model, step=updates)
            scheduler.step_update(updates)
        right = validate(averaged.module, held_out)
        scheduler.step(epoch + 1, right)
        saver.save_checkpoint(epoch, metric=right)


@pytest.mark.parametrize("shuffled", [False, True])
def test_digits_are_learned_and_validated(digits: Path, tmp_path: Path, shuffled: bool) -> None:
    train(digits, tmp_path, shuffled=shuffled)
    model = timm.create_model(MODEL, **OPTIONS)
    load_checkpoint(model, str(tmp_path / "model_best.pth.tar"), use_ema=True)
    data_config = resolve_data_config(ARGUMENTS, model=model, use_test_size=True)
    right = validate(model, loader(digits, "val", data_config))
    assert right < GUESSED if shuffled else right > LEARNED
