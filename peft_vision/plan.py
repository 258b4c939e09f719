"""A Plan: what was decided, as data. Applying it is deterministic; loading is applying again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

from peft_vision.errors import DamagedArtifact

if TYPE_CHECKING:
    Json: TypeAlias = bool | int | float | str | list["Json"] | dict[str, "Json"] | None
else:
    Json = Any
Decisions = dict[str, Json]


def pack_indices(indices: Iterable[int], of: int) -> dict[str, Json]:
    """Kept indices as a bit set: ``{"of": 8, "bits": "0f"}`` keeps 0, 1, 2 and 3 of 8.

    >>> pack_indices([0, 1, 2, 3], of=8)
    {'of': 8, 'bits': '0f'}
    """
    bits = 0
    for index in indices:
        if not 0 <= index < of:
            raise ValueError(f"index {index} is outside 0..{of - 1}")
        bits |= 1 << index
    return {"of": of, "bits": f"{bits:0{(of + 3) // 4}x}"}


def unpack_indices(packed: Json) -> list[int]:
    """The indices, ascending.

    Raises:
        DamagedArtifact: the value is not a packed index set.

    >>> unpack_indices({"of": 8, "bits": "0f"})
    [0, 1, 2, 3]
    """
    try:
        of, bits = int(packed["of"]), int(packed["bits"], 16)  # type: ignore[index, call-overload, arg-type]
    except (TypeError, KeyError, ValueError) as error:
        raise DamagedArtifact(f"Not a set of kept indices: {packed!r}.") from error
    if bits >> of:
        raise DamagedArtifact(f"A set of kept indices names more than its {of} members.")
    return [index for index in range(of) if bits >> index & 1]


@dataclass(frozen=True)
class Step:
    """One method at work: its name, its settings, how strongly, and what it decided per site."""

    method: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    strength: float | None = None
    decisions: Decisions = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON."""
        return {
            "method": self.method,
            "settings": dict(self.settings),
            "strength": self.strength,
            "decisions": self.decisions,
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Step:
        """Read back what `to_json` wrote.

        Raises:
            DamagedArtifact: a part is missing.
        """
        try:
            return cls(
                str(content["method"]),
                dict(content["settings"]),
                content["strength"],
                dict(content["decisions"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise DamagedArtifact(f"A step of the plan cannot be read: {error!r}.") from error


@dataclass(frozen=True)
class Plan:
    """Steps in the order in which they are applied."""

    steps: tuple[Step, ...] = ()

    def then(self, *steps: Step) -> Plan:
        """This plan with `steps` after it."""
        return Plan(self.steps + steps)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON."""
        return {"steps": [step.to_json() for step in self.steps]}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Plan:
        """Read back what `to_json` wrote.

        Raises:
            DamagedArtifact: it is not a plan.
        """
        steps = content.get("steps") if isinstance(content, Mapping) else None
        if not isinstance(steps, Sequence) or isinstance(steps, str):
            raise DamagedArtifact("The plan has no list of steps.")
        return cls(tuple(Step.from_json(step) for step in steps))
