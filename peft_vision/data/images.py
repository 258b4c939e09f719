"""Labeled images before any transform: what every source of data turns into."""

from __future__ import annotations

import io
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from peft_vision.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image

_SHOWN = 5


class Pictures(ABC):
    """A sequence of encoded images, opened one at a time."""

    @abstractmethod
    def __len__(self) -> int:
        """How many there are."""

    @abstractmethod
    def encoded(self, index: int) -> bytes:
        """The bytes of the image file at `index`."""

    @abstractmethod
    def name(self, index: int) -> str:
        """What to call the image at `index` in a message."""


@dataclass(frozen=True)
class LabeledImages:
    """Pictures with one label each.

    Attributes:
        pictures: all pictures of the source.
        order: the ones that are used, as indices into `pictures`.
        targets: a label for each of `order`, as an index into `names`.
        names: class names.
        origin: what the user called the source.
        skipped: names of the unreadable pictures that were left out.
    """

    pictures: Pictures
    order: tuple[int, ...]
    targets: tuple[int, ...]
    names: tuple[str, ...]
    origin: str
    skipped: tuple[str, ...] = ()

    def __len__(self) -> int:
        """How many images are used."""
        return len(self.order)

    def image(self, index: int) -> Image:
        """The image at position `index` in RGB.

        Raises:
            DataError: the file cannot be decoded.
        """
        place = self.order[index]
        try:
            return decode(self.pictures.encoded(place))
        except (OSError, ValueError, SyntaxError) as error:
            raise DataError(
                f"{self.pictures.name(place)} of {self.origin} cannot be read: {error}. Replace or "
                "remove the file, or leave such files out with data.on_bad_image=skip."
            ) from error

    def subset(self, positions: Sequence[int]) -> LabeledImages:
        """Only the images at `positions`."""
        return replace(
            self,
            order=tuple(self.order[position] for position in positions),
            targets=tuple(self.targets[position] for position in positions),
        )

    def relabeled(self, names: Sequence[str]) -> LabeledImages:
        """The same images with classes numbered as in `names`, matched by name.

        Raises:
            DataError: the images have a class that `names` lacks.
        """
        used = sorted({self.names[target] for target in self.targets})
        missing = [name for name in used if name not in names]
        if missing:
            raise DataError(
                f"{self.origin} has {_listed('class', 'classes', missing)} that the model was not "
                f"trained on. Known: {', '.join(list(names)[:20])}. Class names must match."
            )
        place = {name: number for number, name in enumerate(names)}
        targets = tuple(place[self.names[target]] for target in self.targets)
        return replace(self, targets=targets, names=tuple(names))


def decode(encoded: bytes) -> Image:
    """An RGB image from the bytes of a file; 16-bit gray is scaled to 8 bits.

    Raises:
        OSError, ValueError, SyntaxError: the bytes are not a whole image (Pillow's own errors).
    """
    import PIL.Image

    image: Image = PIL.Image.open(io.BytesIO(encoded))
    image.load()
    if image.mode.startswith("I"):
        return image.point(lambda value: value / 257).convert("L").convert("RGB")
    if image.mode in ("P", "PA", "LA"):
        image = image.convert("RGBA")
    return image.convert("RGB")


def without_bad(data: LabeledImages, on_bad_image: str, check: str) -> LabeledImages:
    """Look at every image once and leave out, or refuse, what cannot be read.

    Args:
        data: what to look at.
        on_bad_image: `refuse` or `skip`.
        check: `full` decodes each image, `none` leaves it to training.

    Raises:
        DataError: an image is bad and `on_bad_image` is `refuse`, or none is good.
    """
    if check == "none":
        return data
    with ThreadPoolExecutor() as pool:
        good = list(pool.map(lambda index: _readable(data.pictures, index), data.order))
    bad = [data.pictures.name(index) for index, ok in zip(data.order, good, strict=True) if not ok]
    if not bad:
        return data
    if len(bad) == len(data):
        raise DataError(
            f"{data.origin} has {len(data)} images and none can be read. "
            f"The first are {', '.join(bad[:_SHOWN])}. JPEG, PNG, WebP, BMP and TIFF files work."
        )
    if on_bad_image == "refuse":
        raise DataError(
            f"{data.origin} has {_listed('unreadable image', 'unreadable images', bad)}. Replace "
            "or remove them, or leave them out with data.on_bad_image=skip."
        )
    kept = [position for position, ok in enumerate(good) if ok]
    return replace(data.subset(kept), skipped=data.skipped + tuple(bad))


def skipped_message(data: LabeledImages) -> str | None:
    """One line on what was left out, or None when nothing was."""
    if not data.skipped:
        return None
    listed = _listed("unreadable image", "unreadable images", data.skipped)
    return f"{data.origin}: left out {listed}."


def stratified(
    data: LabeledImages, fraction: float, seed: int
) -> tuple[LabeledImages, LabeledImages]:
    """Cut off `fraction` of each class, at least one image of each, chosen by `seed` alone.

    Raises:
        DataError: a class has a single image, so that one side would lack it.
    """
    import random

    chooser = random.Random(seed)
    members: dict[int, list[int]] = {}
    for position, target in enumerate(data.targets):
        members.setdefault(target, []).append(position)
    lonely = [data.names[target] for target, found in members.items() if len(found) < 2]
    if lonely:
        raise DataError(
            f"{data.origin} has {_listed('class', 'classes', sorted(lonely))} with a single image, "
            "so it cannot be split into training and validation. Two images per class, or a "
            "separate data.validation, work."
        )
    cut: set[int] = set()
    for target in sorted(members):
        chosen = list(members[target])
        chooser.shuffle(chosen)
        wanted = min(max(1, round(fraction * len(chosen))), len(chosen) - 1)
        cut.update(chosen[:wanted])
    rest = [position for position in range(len(data)) if position not in cut]
    return data.subset(rest), data.subset(sorted(cut))


def limited(data: LabeledImages, count: int | None, seed: int) -> LabeledImages:
    """At most `count` images, drawn by `seed`; all of them with None."""
    import random

    if count is None or count >= len(data):
        return data
    return data.subset(sorted(random.Random(seed).sample(range(len(data)), count)))


def _readable(pictures: Pictures, index: int) -> bool:
    try:
        decode(pictures.encoded(index))
    except (OSError, ValueError, SyntaxError):
        return False
    return True


def _listed(one: str, many: str, names: Sequence[str]) -> str:
    shown = ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
    return f"{len(names)} {one if len(names) == 1 else many} ({shown})"
