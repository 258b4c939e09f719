"""Reading by name of the layout, or by what lies in the folder."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
from PIL import Image

from peft_vision.errors import DataError, UnknownName
from peft_vision.tracking.reading import kinds, read_sequences
from peft_vision.tracking.sequence_set import LazySequences

JSON = '{"images": [{"id": 1, "file_name": "1.jpg"}], "annotations": [{"id": 1, "image_id": 1, '

LAYOUTS = {
    "got10k": {
        "val/list.txt": "one\n",
        "val/one/groundtruth.txt": "1,1,5,5\n",
        "val/one/00000001.jpg": None,
    },
    "lasot": {
        "cat/cat-1/groundtruth.txt": "1,1,5,5\n",
        "cat/cat-1/full_occlusion.txt": "0",
        "cat/cat-1/out_of_view.txt": "0",
        "cat/cat-1/img/00000001.jpg": None,
    },
    "lasot_ext": {
        "atv/atv-1/groundtruth.txt": "1,1,5,5\n",
        "atv/atv-1/full_occlusion.txt": "0",
        "atv/atv-1/out_of_view.txt": "0",
        "atv/atv-1/img/00000001.jpg": None,
    },
    "trackingnet": {"TEST/anno/a.txt": "1,1,5,5\n", "TEST/frames/a/0.jpg": None},
    "tnl2k": {
        "a/groundtruth.txt": "1,1,5,5\n",
        "a/language.txt": "it",
        "a/imgs/1.jpg": None,
    },
    "otb": {"A/groundtruth_rect.txt": "1,1,5,5\n", "A/img/0001.jpg": None},
    "coco": {
        "annotations/instances_val2017.json": JSON + '"bbox": [1, 1, 5, 5]}]}',
        "val2017/1.jpg": None,
    },
    "folder": {"mine/groundtruth.txt": "1,1,5,5\n", "mine/img/1.jpg": None},
}


def laid_out(root: Path, kind: str) -> Path:
    for name, text in LAYOUTS[kind].items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        if text is None:
            Image.new("RGB", (20, 16)).save(file)
        else:
            file.write_text(text)
    return root


def test_every_reader_has_a_layout_here():
    assert set(kinds()) == set(LAYOUTS)


@pytest.mark.parametrize("kind", sorted(LAYOUTS))
def test_a_layout_is_recognized_and_read(tmp_path, kind):
    root = laid_out(tmp_path, kind)
    found = read_sequences(root)
    assert found.kind == kind
    assert len(found) == 1
    assert found.sequences[0].frames.read(0).shape == (16, 20, 3)
    assert found.sequences[0].start[2] == 5
    assert found.dialect in {"otb", "got10k", "trackingnet"}
    assert read_sequences(str(root), kind=kind).kind == kind


def test_what_is_asked_wrongly_is_said(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        read_sequences(tmp_path / "nothing")
    (tmp_path / "notes.md").write_text("")
    with pytest.raises(DataError, match=r"is a file"):
        read_sequences(tmp_path / "notes.md")
    with pytest.raises(DataError, match=r"found in it: notes\.md.*Known kinds: coco, folder"):
        read_sequences(tmp_path)
    with pytest.raises(UnknownName, match="lasot"):
        read_sequences(tmp_path, kind="lasso")
    laid_out(tmp_path, "otb")
    with pytest.raises(DataError, match="otb has no split 'train'; it has test"):
        read_sequences(tmp_path, split="train")
    with pytest.raises(DataError, match="no kind"):
        read_sequences("demo/tracking", kind="otb")


def test_a_folder_of_two_layouts_is_not_guessed(tmp_path):
    laid_out(tmp_path, "otb")
    laid_out(tmp_path, "got10k")
    with pytest.raises(DataError, match="got10k and otb"):
        read_sequences(tmp_path)
    assert read_sequences(tmp_path, kind="otb").kind == "otb"


@pytest.mark.parametrize("kind", sorted(set(LAYOUTS) - {"folder"}))
def test_asked_for_by_a_wrong_kind_it_is_an_error_of_ours(tmp_path, kind):
    root = laid_out(tmp_path, "folder")
    with pytest.raises(DataError):
        read_sequences(root, kind=kind)


def test_lazy_sequences_slice_and_travel_to_workers():
    lazy = LazySequences(["a", "b", "c"], str)
    assert lazy[-1] == "2"
    assert list(lazy[1:]) == ["1", "2"]
    assert lazy[1:].names == ["b", "c"]
    again = pickle.loads(pickle.dumps(lazy[::-1]))
    assert list(again) == ["2", "1", "0"]
    with pytest.raises(IndexError):
        lazy[3]
