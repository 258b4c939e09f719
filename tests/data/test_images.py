"""Laws of labeled images: folders, splits, broken files, names."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from peft_vision.data import hub, image_folder
from peft_vision.data.images import decode, stratified, without_bad
from peft_vision.data.settings import DataSettings
from peft_vision.data.source import open_for_evaluation, open_split
from peft_vision.errors import DataError, UnknownName


def write_images(folder: Path, count: int, value: int = 100, suffix: str = ".jpg") -> None:
    folder.mkdir(parents=True)
    noise = np.random.default_rng(value).integers(0, 50, (count, 40, 48, 3), dtype=np.uint8)
    for number, pixels in enumerate(noise):
        Image.fromarray(pixels + np.uint8(value)).save(folder / f"{number:02d}{suffix}")


@pytest.fixture
def flat(tmp_path: Path) -> Path:
    for value, name in enumerate(("cat", "dog", "owl")):
        write_images(tmp_path / "flat" / name, 6, 60 * value)
    return tmp_path / "flat"


@pytest.fixture
def split(tmp_path: Path) -> Path:
    for part, count in (("train", 4), ("val", 2)):
        for value, name in enumerate(("cat", "dog")):
            write_images(tmp_path / "split" / part / name, count, 60 * value)
    return tmp_path / "split"


def settings(train: object, **more: object) -> DataSettings:
    return DataSettings.model_validate({"train": str(train), **more})


def truncate(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])


def test_flat_folder_is_split_class_by_class_and_reproducibly(flat):
    first, again, other = (open_split(settings(flat), seed) for seed in (0, 0, 1))
    assert first.names == ["cat", "dog", "owl"]
    assert len(first.train) == 15
    assert sorted(first.validation.targets) == [0, 1, 2]
    assert first.validation.order == again.validation.order != other.validation.order
    assert not set(first.train.order) & set(first.validation.order)
    assert "3 of 18 images were set aside" in first.notes[0]


def test_split_folder_uses_its_own_validation(split):
    found = open_split(settings(split), 0)
    assert (len(found.train), len(found.validation)) == (8, 4)
    assert found.notes == ()
    assert len(open_for_evaluation(settings(split))) == 4


def test_a_class_called_train_is_a_class(tmp_path):
    write_images(tmp_path / "train", 3, 0)
    write_images(tmp_path / "plane", 3, 90)
    assert open_split(settings(tmp_path), 0).names == ["plane", "train"]


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda root: None, "There is no data folder"),
        (lambda root: root.mkdir(), "is empty"),
        (lambda root: write_images(root / "cat", 2), "one class only (cat)"),
        (lambda root: write_images(root, 2), "no class folders (2 images lie in it)"),
        (lambda root: (root / "cat").mkdir(parents=True), "no images in them"),
        (
            lambda root: (write_images(root / "cat", 2), (root / "dog").mkdir()),
            "class folders without images: dog",
        ),
        (
            lambda root: (write_images(root / "cat", 1), write_images(root / "dog", 3)),
            "1 class (cat) with a single image",
        ),
    ],
)
def test_wrong_folders_are_refused_in_one_message(tmp_path, make, said):
    make(tmp_path / "data")
    with pytest.raises(DataError) as caught:
        open_split(settings(tmp_path / "data"), 0)
    assert said in str(caught.value)
    assert caught.value.exit_code == 2


def test_a_truncated_image_is_named_or_skipped(flat):
    truncate(flat / "dog" / "03.jpg")
    with pytest.raises(DataError, match=r"1 unreadable image \(dog/03.jpg\)"):
        open_split(settings(flat, on_bad_image="refuse"), 0)
    found = open_split(settings(flat), 0)
    assert len(found.train) + len(found.validation) == 17
    assert any("left out 1 unreadable image (dog/03.jpg)" in note for note in found.notes)


def test_only_broken_images_are_refused_even_when_skipping(flat):
    for file in flat.rglob("*.jpg"):
        truncate(file)
    with pytest.raises(DataError, match="none can be read"):
        open_split(settings(flat, on_bad_image="skip"), 0)


def test_skipping_may_not_leave_one_class(split):
    for file in (split / "train" / "dog").iterdir():
        truncate(file)
    with pytest.raises(DataError, match=r"one class only \(cat\)"):
        open_split(settings(split, on_bad_image="skip"), 0)


def test_without_a_check_a_broken_image_is_named_when_it_is_used(flat):
    truncate(flat / "cat" / "00.jpg")
    data = without_bad(image_folder.read_folder(flat), "refuse", "none")
    with pytest.raises(DataError, match=r"cat/00.jpg of .* cannot be read"):
        data.image(0)


def test_validation_classes_are_matched_by_name(split):
    write_images(split / "val" / "axolotl", 2)
    with pytest.raises(DataError, match=r"classes that .* lacks: axolotl"):
        open_split(settings(split), 0)


def test_validation_may_lack_a_class(tmp_path, flat):
    write_images(tmp_path / "other" / "owl", 2)
    write_images(tmp_path / "other" / "dog", 1)
    found = open_split(settings(flat, validation=str(tmp_path / "other")), 0)
    assert [found.names[target] for target in found.validation.targets] == ["dog", "owl", "owl"]


def test_stratified_keeps_every_class_on_both_sides(flat):
    data = image_folder.read_folder(flat)
    for fraction in (0.01, 0.5, 0.99):
        for part in stratified(data, fraction, 0):
            assert set(part.targets) == {0, 1, 2}


def test_limits_are_respected(flat):
    found = open_split(settings(flat, max_train=5, max_validation=2), 0)
    assert (len(found.train), len(found.validation)) == (5, 2)


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "1", "CMYK"])
def test_every_mode_becomes_rgb(mode):
    stream = io.BytesIO()
    Image.new("RGB", (8, 8), (200, 200, 200)).convert(mode).save(
        stream, "TIFF" if mode == "CMYK" else "PNG"
    )
    assert decode(stream.getvalue()).mode == "RGB"


def test_sixteen_bit_gray_is_scaled_and_not_clipped():
    stream = io.BytesIO()
    Image.fromarray(np.full((4, 4), 128 * 257, dtype=np.uint16)).save(stream, "PNG")
    assert decode(stream.getvalue()).getpixel((0, 0)) == (128, 128, 128)


def table(count: int, labels: list[object] | None = None) -> object:
    import datasets

    pixels = [Image.new("RGB", (32, 32), (i, i, i)) for i in range(count)]
    found = datasets.Dataset.from_dict(
        {"image": pixels, "label": labels or [i % 2 for i in range(count)]},
    )
    return found.cast_column("image", datasets.Image())


def test_tables_saved_on_disk_and_parquet_read_alike(tmp_path):
    import datasets

    data = table(10, ["a", "b"] * 5)
    datasets.DatasetDict({"train": data, "test": data.select(range(4))}).save_to_disk(
        tmp_path / "saved"
    )
    (tmp_path / "parquet").mkdir()
    data.to_parquet(tmp_path / "parquet" / "train.parquet")
    saved = open_split(settings(tmp_path / "saved"), 0)
    assert (len(saved.train), len(saved.validation), saved.names) == (10, 4, ["a", "b"])
    assert saved.train.image(3).getpixel((0, 0)) == (3, 3, 3)
    for source in (tmp_path / "parquet", tmp_path / "parquet" / "train.parquet"):
        found = open_split(settings(source), 0)
        assert (len(found.train), len(found.validation)) == (8, 2)


def test_tables_with_unknown_labels_or_columns_are_refused():
    with pytest.raises(DataError, match="rows without a label"):
        hub.read_table(table(4, [-1, 0, 1, 1]), "t")
    with pytest.raises(DataError, match=r"no column 'kind'. It has image, label"):
        hub.read_table(table(4), "t", label_column="kind")
    with pytest.raises(DataError, match=r"data\.label_column"):
        hub.read_table(table(4).rename_column("label", "species"), "t")


def test_a_wrong_split_or_source_is_refused(split):
    with pytest.raises(DataError, match=r"no split 'dev'. It has train, validation"):
        open_split(settings(split, validation_split="dev"), 0)
    with pytest.raises(UnknownName, match="demo/elpv"):
        open_split(settings("demo/elvp"), 0)
    with pytest.raises(DataError, match="There is no data folder"):
        open_split(settings("not_here"), 0)
