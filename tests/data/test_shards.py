"""WebDataset shards: read in place, and what goes wrong in them."""

import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image

from visionmamba.data import (
    ChangedImages,
    EvalBatches,
    ImageSplits,
    Preprocessing,
    TrainBatches,
    UnreadableImageError,
    WebShards,
)

pytestmark = pytest.mark.once

Member = tuple[str, bytes] | tarfile.TarInfo


def picture(level: int) -> bytes:
    """A PNG of 9x9 px and one grey level."""
    file = io.BytesIO()
    Image.new("L", (9, 9), level).save(file, format="PNG")
    return file.getvalue()


def sample(key: str, *, level: int, label: int) -> list[Member]:
    return [(f"{key}.png", picture(level)), (f"{key}.cls", str(label).encode())]


def write_shard(path: Path, members: Sequence[Member], *, mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                archive.addfile(member)
                continue
            info = tarfile.TarInfo(member[0])
            info.size = len(member[1])
            archive.addfile(info, io.BytesIO(member[1]))
    return path


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Four training shards of five pictures, one shard of validation; grey level = number."""
    for number in range(4):
        members = [
            member
            for level in range(5 * number, 5 * number + 5)
            for member in sample(f"folder/{level:04}", level=level, label=level % 2)
        ]
        write_shard(tmp_path / f"train-{number:03}.tar", members)
    val = [*sample("a", level=200, label=0), *sample("b", level=201, label=1)]
    write_shard(tmp_path / "val.tar", val)
    return tmp_path


def splits(folder: Path, train: str = "train-{000..003}.tar", **options: object) -> ImageSplits:
    source = WebShards(
        train=(str(folder / train),),
        val=(str(folder / "val.tar"),),
        **options,  # type: ignore[arg-type]
    )
    return source.build()


def train_batches(folder: Path, *, num_workers: int = 0) -> TrainBatches:
    return TrainBatches(
        splits(folder).train,
        Preprocessing(image_size=8, channels="L", mean=(0,), std=(1,)).build(),
        batch_size=4,
        seed=0,
        num_workers=num_workers,
    )


@pytest.mark.parametrize("pattern", ["train-{000..003}.tar", "train-*.tar"])
def test_pictures_keep_their_labels(shards: Path, pattern: str) -> None:
    train, val = splits(shards, pattern)
    assert len(train) == 20
    assert train.class_names == val.class_names == ("0", "1")
    levels = [train.image(index).getpixel((0, 0)) for index in range(20)]
    assert levels == list(range(20))
    assert train.labels == tuple(level % 2 for level in range(20))
    assert val.image(1).getpixel((3, 3)) == 201


def test_json_holds_the_label_too(shards: Path) -> None:
    content = json.dumps({"label": 1, "filename": "x"}).encode()
    members = [("x.jpg", picture(7)), ("x.json", content), *sample("y", level=8, label=0)]
    write_shard(shards / "train.tar", members)
    assert splits(shards, "train.tar").train.labels == (1, 0)


def test_class_names_come_from_a_file(shards: Path) -> None:
    names = shards / "names.txt"
    names.write_text("cat\ndog\n")
    assert splits(shards, class_names=names).train.class_names == ("cat", "dog")
    names.write_text("cat\n")
    with pytest.raises(ValueError, match=r"names 1 classes, but the shards hold a sample of clas"):
        splits(shards, class_names=names)


def test_resumed_batches_equal_unbroken_ones_with_any_workers(shards: Path) -> None:
    def pixels(batches: list[ChangedImages]) -> list[float]:
        return [value for batch in batches for value in batch.pixels.flatten().tolist()]

    expected = list(train_batches(shards))
    resumed = train_batches(shards, num_workers=2)
    resumed.load_state_dict({"epoch": 0, "num_samples": 8})
    assert pixels(list(resumed)) == pixels(expected[2:])


def test_shards_can_be_read_one_after_another(shards: Path) -> None:
    train = splits(shards, shuffle_shards=1).train
    order = train.order(torch.Generator().manual_seed(1))
    assert sorted(order.tolist()) == list(range(20))
    assert (order.view(4, 5) // 5).unique(dim=1).shape == (4, 1)
    assert order.tolist() != sorted(order.tolist())


def test_missing_shard_is_named(shards: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no shard .*train-004\.tar; check"):
        splits(shards, "train-{000..004}.tar")
    with pytest.raises(FileNotFoundError, match=r"there is no shard .*none-\*\.tar; check"):
        splits(shards, "none-*.tar")


def test_split_without_shards_is_explained() -> None:
    with pytest.raises(ValueError, match=r"no shards are given to train; name them, as --data"):
        WebShards().build()


def link(name: str, target: str) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = tarfile.SYMTYPE, target
    return info


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("../../evil.png", b"")], r"holds \.\./\.\./evil\.png, whose name leaves the archive"),
        ([("/etc/passwd.jpg", b"")], r"holds /etc/passwd\.jpg, whose name leaves the archive"),
        ([("a/../../b.cls", b"")], "whose name leaves the archive"),
        ([("..\\evil.png", b"")], "whose name leaves the archive"),
        ([link("x.png", "/etc/passwd")], "x.png, which is a link; store the file itself"),
        ([("x.cls", b"0" * (1 << 21))], "x.cls, of 2097152 bytes, more than the limit of 1048576"),
        ([("x.png", picture(1))], r"sample x without a label \(\.cls or \.json\)"),
        ([("x.cls", b"1")], "sample x without a picture"),
        (sample("x", level=1, label=-1), "whose label is not a class number from 0 to 999999"),
        ([("x.png", picture(1)), ("x.cls", b"cat")], r"not a class number .*; correct x\.cls"),
        ([("x.png", picture(1)), ("x.json", b"[" * 100_000)], r"not a class.*correct x\.json"),
        ([("x.png", picture(1)), ("x.json", b'{"label": true}')], "not a class number"),
        ([("a\nb.png", picture(1))], r"the sample 'a\\nb' without a label"),
    ],
)
def test_bad_members_are_named_or_left_out(
    shards: Path, members: list[Member], message: str
) -> None:
    good = [*sample("good0", level=1, label=0), *sample("good1", level=2, label=1)]
    write_shard(shards / "bad.tar", [*good, *members])
    with pytest.raises(ValueError, match=message) as caught:
        splits(shards, "bad.tar")
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith('or leave it out with on_unreadable="skip"')
    train = splits(shards, "bad.tar", on_unreadable="skip").train
    assert train.labels == (0, 1)
    assert len(train.unreadable) == 1


def test_nothing_is_written_beside_the_shards(shards: Path) -> None:
    members = [("../evil.png", picture(1)), *sample("x", level=1, label=0)]
    write_shard(shards / "bad.tar", members)
    before = sorted(shards.parent.rglob("*"))
    train = splits(shards, "bad.tar", on_unreadable="skip").train
    train.image(0)
    assert sorted(shards.parent.rglob("*")) == before


@pytest.mark.parametrize("content", [b"no tar file", b"", b"\x1f\x8b"])
def test_other_files_are_refused(shards: Path, content: bytes) -> None:
    (shards / "bad.tar").write_bytes(content)
    with pytest.raises(ValueError, match=r"bad\.tar (is damaged|holds no samples)"):
        splits(shards, "bad.tar")


def test_compressed_shard_is_refused(shards: Path) -> None:
    write_shard(shards / "bad.tar", sample("x", level=1, label=0), mode="w:gz")
    with pytest.raises(ValueError, match=r"bad\.tar is damaged, cut short, or no uncompressed tar"):
        splits(shards, "bad.tar")


def test_cut_shard_keeps_what_it_has(shards: Path) -> None:
    path = shards / "train-000.tar"
    path.write_bytes(path.read_bytes()[:4000])  # within the second picture
    with pytest.raises(ValueError, match="cut short"):
        splits(shards)
    train = splits(shards, on_unreadable="skip").train
    assert len(train) == 16
    assert "train-000.tar" in train.unreadable[0]


def test_unreadable_picture_is_named_with_its_shard(shards: Path) -> None:
    members = [
        ("good.png", picture(5)),
        ("good.cls", b"1"),
        ("ein/bad.jpg", b"no image"),
        ("ein/bad.cls", b"0"),
    ]
    write_shard(shards / "val.tar", members)
    val = splits(shards).val
    with pytest.raises(UnreadableImageError, match=r"val\.tar, ein/bad\.jpg: the picture is not"):
        val.image(1)
    loader = EvalBatches(
        splits(shards, on_unreadable="skip").val,
        Preprocessing(image_size=8).build(),
        batch_size=2,
    )
    assert next(iter(loader)).labels.tolist() == [1, -1]
    assert "ein/bad.jpg" in loader.unreadable[0]


def test_long_names_are_read(shards: Path) -> None:
    key = "folder/" * 30 + "x"
    members = [*sample(key, level=3, label=0), *sample(key + "2", level=4, label=1)]
    write_shard(shards / "long.tar", members)
    train = splits(shards, "long.tar").train
    assert train.image(1).getpixel((0, 0)) == 4
