"""What the drawn sequences are like."""

from __future__ import annotations

from dataclasses import dataclass

from peft_vision.errors import BadSetting


@dataclass(frozen=True)
class SyntheticSettings:
    """What is drawn.

    Attributes:
        height: of a frame in pixels, at least 64; `width` the same.
        train: number of training sequences. `test`: of test sequences.
        train_length: frames of a training sequence, at least 2. `test_length`: of a test sequence.
        smallest: mean radius of the smallest target in pixels, before it changes its size;
            `largest` of the largest. Sizes between are equally likely on a log scale.
        growth: a target's size changes by up to this factor, up and down.
        squeeze: its shape changes by up to this factor.
        turn: it turns by up to this, in radians, one way and the other.
        periods: shortest and longest period of its motion in frames; longer for small targets.
        distractors: most things that look like the target. `strangers`: that do not.
        occluders: most things that pass in front of it.
        light: brightness changes by up to this factor, up and down.
        least_seen: a target counts as visible where more than this share of it is seen.
    """

    height: int = 240
    width: int = 320
    train: int = 2000
    test: int = 60
    train_length: int = 60
    test_length: int = 120
    smallest: float = 11.0
    largest: float = 40.0
    growth: float = 1.6
    squeeze: float = 1.25
    turn: float = 1.2
    periods: tuple[float, float] = (35.0, 140.0)
    distractors: int = 2
    strangers: int = 2
    occluders: int = 2
    light: float = 1.35
    least_seen: float = 0.3

    def __post_init__(self) -> None:
        """Check the ranges."""
        if min(self.height, self.width) < 64:
            raise BadSetting(f"Frames are {self.height} x {self.width}; at least 64 x 64 works.")
        if min(self.train_length, self.test_length) < 2 or min(self.train, self.test) < 1:
            raise BadSetting("There has to be at least one sequence, of at least two frames.")
        if not 4 <= self.smallest <= self.largest <= min(self.height, self.width) / 4:
            raise BadSetting(
                f"Radii go from {self.smallest} to {self.largest}; they lie between 4 and a "
                f"quarter of the frame's shorter side, {min(self.height, self.width) / 4}."
            )
        if min(self.growth, self.squeeze, self.light) < 1 or not 0 <= self.least_seen < 1:
            raise BadSetting(
                f"growth {self.growth}, squeeze {self.squeeze} and light {self.light} are factors "
                f"from 1 on, and least_seen {self.least_seen} lies in [0, 1)."
            )
        if min(self.distractors, self.strangers, self.occluders) < 0 or self.periods[0] < 4:
            raise BadSetting("Numbers of things are from 0 on, and periods from 4 frames on.")
