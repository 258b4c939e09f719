"""How much memory training takes: one step of the actual run, on tensors without numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from peft_vision.memory.gpu import overhead, said

if TYPE_CHECKING:
    from rich.table import Table

OVERHEAD = "overhead (CUDA context, fragmentation)"
NOT_ON_A_GPU = "counted on tensors without numbers, not measured on a GPU"


@dataclass(frozen=True)
class MemoryEstimate:
    """What one process holds when it holds the most.

    Attributes:
        parts: what it is -> bytes at that moment; their sum is `allocated`.
        micro_batch: images in one pass. `passes`: passes per optimizer step.
        precision: "bf16" (autocast) or "fp32".
        image_size: pixels.
        unverified: what the figure does not rest on a measurement for, in words.
    """

    parts: Mapping[str, int]
    micro_batch: int
    passes: int
    precision: str
    image_size: tuple[int, int]
    unverified: tuple[str, ...] = (NOT_ON_A_GPU,)

    @property
    def allocated(self) -> int:
        """Bytes of tensors; to compare with `torch.cuda.max_memory_allocated`."""
        return sum(self.parts.values())

    @property
    def overhead(self) -> int:
        """Bytes that a GPU needs besides: its context, and what the allocator loses."""
        return overhead(self.allocated)

    @property
    def peak(self) -> int:
        """Bytes in all."""
        return self.allocated + self.overhead

    def fits(self, size: int) -> bool:
        """Whether a GPU that offers so many bytes is enough."""
        return self.peak <= size

    def __str__(self) -> str:
        return (
            f"{said(self.peak)} at the peak: {said(self.allocated)} of tensors and "
            f"{said(self.overhead)} of overhead ({self.work}; {'; '.join(self.unverified)})"
        )

    @property
    def work(self) -> str:
        """What one pass computes, in words."""
        height, width = self.image_size
        passes = f", {self.passes} passes a step" if self.passes > 1 else ""
        return f"{self.micro_batch} images of {height} x {width} in {self.precision}{passes}"

    def rows(self) -> list[tuple[str, int]]:
        """(what, bytes), the largest first, the overhead last."""
        ordered = sorted(self.parts.items(), key=lambda part: -part[1])
        return [*ordered, (OVERHEAD, self.overhead)]

    def table(self) -> Table:
        """What holds the memory at the peak, as a table of rich."""
        from rich.table import Table

        table = Table("what", "memory", "share", title=self.work)
        for column in table.columns[1:]:
            column.justify = "right"
        for name, size in self.rows():
            table.add_row(name, said(size), f"{size / self.peak:.0%}")
        table.add_section()
        table.add_row("peak", said(self.peak), "")
        return table

    def to_json(self) -> dict[str, Any]:
        """Plain JSON, sizes in bytes."""
        return {
            "peak": self.peak,
            "allocated": self.allocated,
            "overhead": self.overhead,
            "parts": dict(self.parts),
            "micro_batch": self.micro_batch,
            "passes": self.passes,
            "precision": self.precision,
            "image_size": list(self.image_size),
            "unverified": list(self.unverified),
        }
