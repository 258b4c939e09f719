"""What a tracker looks at and how it decides: settings that are stored with its weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from peft_vision.errors import BadSetting, DamagedArtifact

NAME = "tracking"


@dataclass(frozen=True)
class Geometry:
    """Sizes of crops and the window over the scores (LoRAT; Lin et al., ECCV 2024).

    Attributes:
        template_area: area of the template crop in units of the target's box, at least 1; with
            sides w and h of the box, a crop has w + (area - 1) (w + h) / 2 by the same with h.
        search_area: the same of the search crop.
        window: weight of the Hann window when the best place is chosen, in [0, 1).
        least: in pixels; smaller sides of a box count as this when a crop is made.
    """

    template_area: float = 2.0
    search_area: float = 4.0
    window: float = 0.45
    least: float = 10.0

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name in ("template_area", "search_area"):
            if not 1 <= getattr(self, name) <= 100:
                raise BadSetting(f"{name} is {getattr(self, name)}; it lies in [1, 100].")
        if not 0 <= self.window < 1:
            raise BadSetting(f"window is {self.window}; it lies in [0, 1).")
        if self.least <= 0:
            raise BadSetting(f"least is {self.least}; it is a number of pixels above 0.")

    def to_json(self) -> dict[str, Any]:
        """Plain JSON, with the task's name."""
        return {"name": NAME, **asdict(self)}

    @classmethod
    def from_json(cls, content: Mapping[str, Any] | None) -> Geometry:
        """From a model's record; the defaults where there is none.

        Raises:
            DamagedArtifact: the record is of another task, or holds something else.
        """
        given = dict(content or {"name": NAME})
        known = {field.name for field in fields(cls)}
        if given.pop("name", None) != NAME or set(given) - known:
            raise DamagedArtifact(f"This is not the record of a tracker: {content}.")
        return cls(**given)
