"""Sets of images read by Hugging Face's datasets and by timm."""

import io
import sys
from pathlib import Path

import datasets
import pytest
from PIL import Image

from visionmamba.data import (
    EvalBatches,
    HuggingFaceData,
    Preprocessing,
    TimmData,
    TrainBatches,
    UnreadableImageError,
)

pytestmark = pytest.mark.once

NAMES = ["cat", "dog"]


def picture(level: int) -> bytes:
    """A PNG of 9x9 px and one grey level."""
    file = io.BytesIO()
    Image.new("L", (9, 9), level).save(file, format="PNG")
    return file.getvalue()


def rows(
    contents: list[bytes | None], *, paths: list[str] | None = None, label: object = None
) -> datasets.Dataset:
    columns = {
        "image": [
            {"bytes": content, "path": paths[row]} if paths else content
            for row, content in enumerate(contents)
        ],
        "label": [row % 2 for row in range(len(contents))],
    }
    features = {
        "image": datasets.Image(decode=False),
        "label": label or datasets.ClassLabel(names=NAMES),
    }
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def write_parquet(folder: Path, train: datasets.Dataset, val: datasets.Dataset) -> HuggingFaceData:
    folder.mkdir(exist_ok=True)
    train.to_parquet(folder / "train.parquet")
    val.to_parquet(folder / "validation.parquet")
    return HuggingFaceData(path=str(folder))


@pytest.fixture(autouse=True)
def quiet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


GOOD = [picture(10 * row) for row in range(6)]


def test_rows_keep_their_labels_and_class_names(tmp_path: Path) -> None:
    train, val = write_parquet(tmp_path / "data", rows(GOOD), rows(GOOD[:4])).build()
    assert train.class_names == val.class_names == ("cat", "dog")
    assert train.labels == (0, 1, 0, 1, 0, 1)
    assert [train.image(row).getpixel((0, 0)) for row in range(6)] == [0, 10, 20, 30, 40, 50]
    assert len(val) == 4


def test_saved_data_set_is_read(tmp_path: Path) -> None:
    splits = datasets.DatasetDict(train=rows(GOOD), test=rows(GOOD[:2]))
    splits.save_to_disk(tmp_path / "saved")
    source = HuggingFaceData(path=str(tmp_path / "saved"), val_split="test")
    assert len(source.build().val) == 2


def test_rows_are_read_by_workers(tmp_path: Path) -> None:
    source = write_parquet(tmp_path / "data", rows(GOOD), rows(GOOD[:4]))
    loader = TrainBatches(
        source.build().train,
        Preprocessing(image_size=8).build(),
        batch_size=6,
        seed=0,
        num_workers=1,
    )
    (batch,) = list(loader)
    assert sorted(batch.indices.tolist()) == list(range(6))
    assert (batch.labels == batch.indices % 2).all()


def test_numbers_are_class_names_where_there_are_no_others(tmp_path: Path) -> None:
    plain = rows(GOOD, label=datasets.Value("int64"))
    assert write_parquet(tmp_path / "data", plain, plain).build().val.class_names == ("0", "1")


def test_bad_picture_is_named_by_its_row(tmp_path: Path) -> None:
    bad = rows([GOOD[0], b"no image", None, GOOD[1]])
    source = write_parquet(tmp_path / "data", rows(GOOD), bad)
    val = source.build().val
    with pytest.raises(UnreadableImageError, match="data, validation, row 1 is not an image"):
        val.image(1)
    with pytest.raises(UnreadableImageError, match="row 2 holds no picture; remove it"):
        val.image(2)
    skipping = HuggingFaceData(path=source.path, on_unreadable="skip").build().val
    loader = EvalBatches(skipping, Preprocessing(image_size=8).build(), batch_size=4)
    assert next(iter(loader)).labels.tolist() == [0, -1, -1, 1]
    assert len(loader.unreadable) == 2


def test_paths_must_lie_inside_the_data(tmp_path: Path) -> None:
    inside, outside = tmp_path / "data" / "a.png", tmp_path / "private.png"
    inside.parent.mkdir()
    for path in (inside, outside):
        path.write_bytes(GOOD[1])
    hostile = f"{tmp_path}/data/../private.png"
    listed = rows([None, None, None], paths=[str(inside), str(outside), hostile])
    train = write_parquet(tmp_path / "data", listed, listed).build().train
    assert train.image(0).size == (9, 9)
    for row in (1, 2):
        with pytest.raises(UnreadableImageError, match=r"private\.png, outside of .*data; store"):
            train.image(row)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"val_split": "test"}, "has no split test; it has train, validation: set train_split"),
        ({"label_column": "fine"}, "has no column fine; it has image, label: set image_column"),
        ({"path": ""}, "no data set is given; name one of the Hub or a folder"),
    ],
)
def test_wrong_names_are_explained(tmp_path: Path, options: dict[str, str], message: str) -> None:
    source = write_parquet(tmp_path / "data", rows(GOOD), rows(GOOD))
    with pytest.raises(ValueError, match=message):
        HuggingFaceData(**{"path": source.path, **options}).build()


def test_rows_without_a_class_are_refused(tmp_path: Path) -> None:
    plain = rows(GOOD, label=datasets.Value("int64"))
    unlabelled = plain.map(lambda row: {"label": -1}, keep_in_memory=True)
    source = write_parquet(tmp_path / "data", plain, unlabelled)
    with pytest.raises(ValueError, match="has the label -1 in row 0, wanted a class number"):
        source.build()


@pytest.mark.parametrize("name", ["", "torch/image_folder"])
def test_timm_reads_folders(folder: Path, name: str) -> None:
    train, val = TimmData(name=name, root=folder).build()
    assert train.class_names == val.class_names == ("cat", "dog")
    assert train.labels == (0, 0, 0, 1, 1, 1)
    assert train.image(5).size == (40, 30)
    assert len(val) == 4


def test_timm_reads_hugging_face_data(tmp_path: Path) -> None:
    source = write_parquet(tmp_path / "data", rows(GOOD), rows(GOOD[:4]))
    train = TimmData(name=f"hfds/{source.path}", root=tmp_path / "cache").build().train
    assert train.class_names == ("cat", "dog")
    assert train.labels == (0, 1, 0, 1, 0, 1)
    assert train.image(2).getpixel((0, 0)) == 20


def test_timm_names_an_unreadable_picture(folder: Path) -> None:
    (folder / "train" / "cat" / "1.png").write_text("no image")
    train = TimmData(root=folder).build().train
    with pytest.raises(UnreadableImageError, match=r"cat/1\.png is not an image"):
        train.image(1)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("wds/imagenet", "timm reads wds/imagenet in one direction only.*use WebShards"),
        ("hfids/x", "use HuggingFaceData"),
        ("torch/nothing", "timm cannot open torch/nothing, train: Unknown torchvision dataset"),
        ("torch/cifar10", "timm cannot open torch/cifar10, train: Dataset not found"),
    ],
)
def test_what_timm_cannot_do_is_explained(tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TimmData(name=name, root=tmp_path).build()


def test_missing_folder_for_timm_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*nowhere; wanted one for"):
        TimmData(root=tmp_path / "nowhere").build()


def test_missing_library_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"need datasets; install .*'visionmamba\[data\]'"):
        HuggingFaceData(path="ylecun/mnist").build()
