"""The sequences of a data set, as a reader hands them out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import overload

from peft_vision.errors import DataError
from peft_vision.tracking.sequences import TrackingSequence


@dataclass
class SequenceSet:
    """What was read, and what had to be left out.

    Attributes:
        kind: layout that it was read from, a stem of `datasets/`, or "demo".
        split: "train", "val", "test"; "all" where the layout has no splits.
        sequences: the sequences. Frames are opened when they are read; in training splits of large
            sets the groundtruth is, too, so that asking for one may raise DataError.
        dialect: name of the metrics that are usual for it: "otb", "got10k" or "trackingnet".
        broken: name -> message of the sequences that were left out.
    """

    kind: str
    split: str
    sequences: Sequence[TrackingSequence]
    dialect: str
    broken: dict[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        """How many sequences there are."""
        return len(self.sequences)

    def only(self, places: Sequence[int]) -> SequenceSet:
        """The same set with the sequences at some places; lazy ones are not opened for it."""
        if isinstance(self.sequences, LazySequences):
            return replace(self, sequences=self.sequences.only(places))
        return replace(self, sequences=[self.sequences[place] for place in places])


class LazySequences(Sequence[TrackingSequence]):
    """Sequences that are opened each time they are asked for; nothing is kept.

    Args:
        names: one per sequence.
        opened: makes the sequence of that number; raises DataError where it is broken. Workers of
            a data loader get it pickled, so it is a function of a module, or `partial` of one.
        places: which ones, in order; None: all.
    """

    def __init__(
        self,
        names: Sequence[str],
        opened: Callable[[int], TrackingSequence],
        places: Sequence[int] | None = None,
    ) -> None:
        self._names, self._opened = names, opened
        self._places = range(len(names)) if places is None else places

    def only(self, places: Sequence[int]) -> LazySequences:
        """Those at some places."""
        return LazySequences(self._names, self._opened, [self._places[i] for i in places])

    @property
    def names(self) -> list[str]:
        """The names, without a sequence being opened."""
        return [self._names[place] for place in self._places]

    def __len__(self) -> int:
        """How many there are."""
        return len(self._places)

    @overload
    def __getitem__(self, index: int) -> TrackingSequence: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[TrackingSequence]: ...

    def __getitem__(self, index: int | slice) -> TrackingSequence | Sequence[TrackingSequence]:
        """Sequence number `index`, opened now; a slice is lazy, too."""
        if isinstance(index, slice):
            return LazySequences(self._names, self._opened, self._places[index])
        return self._opened(self._places[index])


def opened_now(
    names: Iterable[str], opened: Callable[[str], TrackingSequence], origin: str
) -> tuple[list[TrackingSequence], dict[str, str]]:
    """Open sequences by name; a broken one is listed with its message instead.

    Raises:
        DataError: none could be opened.
    """
    found: list[TrackingSequence] = []
    broken: dict[str, str] = {}
    for name in names:
        try:
            found.append(opened(name))
        except DataError as error:  # noqa: PERF203 -- one at a time, as the others are fine
            broken[name] = str(error)
    if not found:
        reason = next(iter(broken.values()), "it lists none")
        raise DataError(
            f"{origin} has {len(broken)} sequences and none can be used. The first: {reason}"
        )
    return found, broken
