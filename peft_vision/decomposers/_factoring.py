"""What methods share that give every layer a chain of factors by ranks."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

from peft_vision.backbones.sites import Backbone
from peft_vision.decomposers._job import Job
from peft_vision.decomposers._layers import decide, put_in_place
from peft_vision.method import Evidence, Method, Stage
from peft_vision.plan import Decisions


class Factoring(Method):
    """A method with a ratio, or a rank instead; a subclass declares and explains its settings."""

    ratio: float
    rank: int | None

    stage: ClassVar[Stage] = Stage.FACTOR
    reduces: ClassVar[frozenset[str]] = frozenset({"flops", "params", "latency_ms"})

    @property
    def strength(self) -> float:
        """The ratio; 1 where ranks are given."""
        return self.ratio if self.rank is None else 1.0

    @abstractmethod
    def job(self) -> Job:
        """What the settings ask for."""

    def decide(self, backbone: Backbone, strength: float, evidence: Evidence) -> Decisions:
        """Per layer, its ranks."""
        return decide(self.job(), backbone, strength, evidence)

    def apply(self, backbone: Backbone, decisions: Decisions) -> None:
        """Put the factors in place."""
        put_in_place(self.job(), backbone, decisions)
