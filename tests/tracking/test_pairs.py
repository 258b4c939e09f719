"""Laws of training pairs: what is in a crop is where its box says."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch

from peft_vision.errors import BadSetting, DataError
from peft_vision.tracking.geometry import Geometry
from peft_vision.tracking.pairs import LEAST, Pairs, chosen_frames
from peft_vision.tracking.sequence_set import LazySequences, SequenceSet
from peft_vision.tracking.sequences import Frames, TrackingSequence
from peft_vision.tracking.settings import PairAugmentation

PLAIN = ([0.0, 0.0, 0.0], [1.0, 1.0, 1.0])
JITTER = PairAugmentation(flip=0.0, color=0.0, three_augment=False)


class Squares(Frames):
    """A white square of 20 pixels on black, 3 pixels further to the right in each frame."""

    def __init__(self, count: int, left: int = 60, size: int = 20) -> None:
        self.count, self.left, self.size = count, left, size

    def __len__(self) -> int:
        return self.count

    def read(self, index: int):
        frame = np.zeros((120, 200, 3), np.uint8)
        left = self.left + 3 * index
        frame[50 : 50 + self.size, max(left, 0) : left + self.size] = 255
        return frame

    def name(self, index: int) -> str:
        return f"square {index}"

    def boxes(self):
        left = self.left + 3.0 * np.arange(self.count)
        return np.stack([left, left * 0 + 50, left * 0 + self.size, left * 0 + self.size], axis=1)


def squares(count: int = 8, name: str = "s", hidden: tuple[int, ...] = (), **place: int):
    frames = Squares(count, **place)
    visible = np.array([index not in hidden for index in range(count)])
    return TrackingSequence(name, frames, frames.boxes(), visible)


def of(*sequences: TrackingSequence) -> SequenceSet:
    return SequenceSet("folder", "train", list(sequences), "otb")


def pairs(*sources, augmentation=JITTER, **changes) -> Pairs:
    settings = {
        "sides": (32, 64),
        "grid": (2, 2),
        "geometry": Geometry(),
        "normalization": PLAIN,
        "count": 40,
        "seed": 3,
        **changes,
    }
    return Pairs(list(sources), augmentation=augmentation, **settings)


def extent(image: torch.Tensor) -> torch.Tensor:
    """Corners of what is brighter than half, in pixels."""
    bright = image.mean(0) > 0.5
    down, across = bright.any(1).nonzero().flatten(), bright.any(0).nonzero().flatten()
    return torch.stack([across[0], down[0], across[-1] + 1, down[-1] + 1]).float()


@pytest.mark.parametrize("augmentation", [None, JITTER, PairAugmentation(color=0.0)])
def test_the_square_lies_in_its_box(augmentation):
    if augmentation is not None and augmentation.three_augment:
        augmentation = PairAugmentation(color=0.0, three_augment=False)
    made = pairs((of(squares()), 1.0), augmentation=augmentation)
    for index in range(len(made)):
        sample = made[index]
        side = sample["search"].shape[-1]
        found = extent(sample["search"]) / side
        assert (found - sample["box"]).abs().max() * side <= 1.0, "half a pixel and the rounding"
        assert sample["box"].min() >= 0
        assert sample["box"].max() <= 1
        assert ((sample["box"][2:] - sample["box"][:2]) * side >= LEAST * side / 224 - 1e-3).all()
        assert sample["template"].shape == (3, 32, 32)


def test_a_pair_computed_by_hand():
    """Square of 20: area 2 gives a template of 40 frame pixels, area 4 a search image of 80."""
    made = pairs((of(squares(1)), 1.0), augmentation=None)
    sample = made[0]
    bright = extent(sample["template"])
    assert bright.tolist() == [8, 8, 24, 24], "20 pixels at 32 / 40, in the middle"
    width, height = ((sample["box"][2:] - sample["box"][:2]) * 64).tolist()
    assert width == pytest.approx(16, abs=1e-4), "20 pixels at 64 / 80; nothing is scaled"
    assert height == pytest.approx(16, abs=1e-4)
    assert sample["foreground"].tolist() == [[1, 1], [1, 1]]
    assert pairs((of(squares(1)), 1.0), grid=(8, 8))[0]["foreground"].tolist() == [
        [int(2 <= row < 6 and 2 <= column < 6) for column in range(8)] for row in range(8)
    ]


def test_normalization_and_types():
    made = pairs((of(squares()), 1.0), normalization=([0.5] * 3, [0.25] * 3))
    plain = pairs((of(squares()), 1.0))
    torch.testing.assert_close(made[5]["search"], (plain[5]["search"] - 0.5) / 0.25)
    types = {name: value.dtype for name, value in made[5].items()}
    assert types.pop("foreground") == torch.int64
    assert set(types.values()) == {torch.float32}


def same(one, other) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


def test_a_sample_is_a_function_of_seed_epoch_and_index():
    source = (of(squares(), squares(6, "t")), 1.0)
    strong = PairAugmentation()
    made, again = (pairs(source, augmentation=strong) for _ in range(2))
    torch.manual_seed(11)
    before = torch.get_rng_state()
    late = again[7]
    assert torch.equal(torch.get_rng_state(), before), "the generator is put back"
    early = [made[index] for index in (3, 7)][1]
    assert same(early, late)
    again.set_epoch(1)
    assert not same(again[7], early)
    again.set_epoch(0)
    assert same(again[7], early)
    assert not same(pairs(source, augmentation=strong, seed=4)[7], early)
    assert same(pickle.loads(pickle.dumps(made))[7], early)
    still = pairs(source, augmentation=None)
    first = still[7]
    still.set_epoch(5)
    assert same(still[7], first), "validation pairs stay the same"


def test_workers_give_what_the_process_gives():
    made = pairs((of(squares(), squares(6, "t")), 1.0), augmentation=PairAugmentation(), count=8)
    alone = torch.stack([made[index]["search"] for index in range(8)])
    loader = torch.utils.data.DataLoader(made, batch_size=4, num_workers=2)
    torch.testing.assert_close(torch.cat([batch["search"] for batch in loader]), alone)


def test_sources_by_weight_and_sequences_without_replacement():
    drawn: list[tuple[str, int]] = []

    def named(kind: str, count: int) -> SequenceSet:
        def opened(index: int) -> TrackingSequence:
            drawn.append((kind, index))
            return squares(2)

        lazily = LazySequences([str(index) for index in range(count)], opened)
        return SequenceSet(kind, "train", lazily, "otb")

    one, two = named("one", 30), named("two", 5)
    made = pairs((one, 3.0), (two, 1.0), (named("never", 4), 0.0), count=400)
    for epoch in (0, 1):
        drawn.clear()
        made.set_epoch(epoch)
        for index in range(400):
            made._order.place(epoch, index)
            source, sequence = made._order.place(epoch, index)
            made.sources[source].sequences[sequence]
        kinds = [kind for kind, _ in drawn]
        assert 0.69 < kinds.count("one") / 400 < 0.81
        assert "never" not in kinds
        for kind, length in (("one", 30), ("two", 5)):
            order = [index for found, index in drawn if found == kind]
            for start in range(0, len(order) - length + 1, length):
                assert sorted(order[start : start + length]) == list(range(length))
            assert order[:length] != list(range(length))
            assert order[:length] != order[length : 2 * length], "each round has its own order"
    drawn.clear()
    made[0]
    assert len(drawn) == 1, "one sequence is opened for a pair"


def test_frames_are_visible_and_near():
    sequence = squares(30, hidden=(3, 4, 20))
    sequence.boxes[7] = np.nan
    sequence.boxes[8, 2] = 0
    found = [chosen_frames(sequence, 5) for _ in range(600)]
    bad = {3, 4, 7, 8, 20}
    assert all(not {one, two} & bad and 0 < abs(one - two) <= 5 for one, two in found)
    assert {one for one, _ in found} == set(range(30)) - bad
    assert any(two > one for one, two in found)
    assert any(two < one for one, two in found)
    assert chosen_frames(squares(1), 5) == (0, 0)
    assert chosen_frames(squares(9), 0) in {(index, index) for index in range(9)}


def test_the_jitter_is_the_one_of_the_paper():
    """Scales exp(0.25 N), x and y apart; shifts uniform up to three sides, where enough is left."""
    made = pairs((of(squares(1, left=90)), 1.0), count=600, sides=(32, 640))
    scales, places = [], []
    for index in range(600):
        with torch.random.fork_rng():
            torch.manual_seed(index)
            crop = made._search_crop(np.array([90.0, 50.0, 110.0, 70.0]))
        if crop is None:
            continue
        middle = np.asarray(crop.scale) * [100.0, 60.0] + crop.shift
        sides = np.asarray(crop.scale) * 20
        scales.append(np.log(np.asarray(crop.scale) / (640 / 80)))
        places.append((middle - 320) / sides.mean())
    scales, places = np.array(scales), np.array(places)
    assert len(scales) >= 590
    assert np.abs(scales.mean(0)).max() < 0.06
    assert np.abs(scales.std(0) - 0.25).max() < 0.03
    assert abs(np.corrcoef(scales.T)[0, 1]) < 0.15
    assert np.abs(places).max() <= 3.0
    assert np.abs(places).max() > 2.3
    middle_third = (np.abs(places[:, 0]) < 1).mean()
    assert 0.33 < middle_third < 0.5, "far places are drawn again where the target has left"


def test_validation_targets_are_not_all_in_the_middle():
    made = pairs((of(squares(1, left=90)), 1.0), augmentation=None, count=60)
    centers = torch.stack([(box[:2] + box[2:]) / 2 for box in (made[i]["box"] for i in range(60))])
    assert (centers - 0.5).abs().max() <= 0.25 + 1e-6, "a side of the target is a quarter of this"
    assert (centers - 0.5).abs().max() > 0.2
    assert (centers - 0.5).std() > 0.1


def test_a_box_beyond_the_border_is_cut_off():
    made = pairs((of(squares(1, left=-12)), 1.0), augmentation=None)
    box = made[0]["box"] * 64
    width, height = (box[2:] - box[:2]).tolist()
    assert width / height == pytest.approx(8 / 20, rel=1e-5)


def test_what_is_broken_is_drawn_again_but_not_forever():
    gone = squares(4, "gone", left=500)
    made = pairs((of(gone, squares()), 1.0))
    assert all(made[index]["box"].shape == (4,) for index in range(10))
    with pytest.raises(DataError, match=r"50 pairs in a row from folder .*outside of the frame"):
        pairs((of(gone), 1.0))[0]
    with pytest.raises(DataError, match="visible in none of 4"):
        pairs((of(squares(4, hidden=(0, 1, 2, 3))), 1.0))[0]
    tiny = squares(2, size=1)
    with pytest.raises(DataError, match="hardly reached"):
        pairs((of(tiny), 1.0))[0]


def test_what_is_asked_wrongly_is_said():
    fine = of(squares())
    for weights in ((-1.0,), (0.0,), (float("nan"),)):
        with pytest.raises(BadSetting, match="weights"):
            pairs(*[(fine, weight) for weight in weights])
    with pytest.raises(BadSetting, match="count"):
        pairs((fine, 1.0), count=0)
    with pytest.raises(BadSetting, match="gap"):
        pairs((fine, 1.0), gap=-1)
    with pytest.raises(DataError, match="no sequence"):
        pairs((of(), 1.0))
    with pytest.raises(IndexError):
        pairs((fine, 1.0))[40]
