"""What the settings of a decomposer ask for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from peft_vision.decomposers._scheme import Scheme
from peft_vision.errors import BadSetting
from peft_vision.method import check_range

KINDS = ("linears", "convs", "classifier")


@dataclass(frozen=True)
class Job:
    """What the settings of a decomposer ask for.

    Attributes:
        kinds: which layers, of `KINDS`.
        rank: for every layer; None where strength decides.
        init: "dense" or "fresh".
        minimum: layers with fewer weights are left alone.
    """

    scheme: Scheme
    kinds: tuple[str, ...]
    rank: int | None
    init: str
    minimum: int


def check(ratio: float, rank: int | None, init: str, minimum: int) -> None:
    """Refuse settings outside their range.

    Raises:
        BadSetting: one is.
    """
    check_range("ratio", ratio, 0.0, 1.0)
    if rank is not None and (not isinstance(rank, int) or isinstance(rank, bool) or rank < 1):
        raise BadSetting(f"rank is {rank!r}; a whole number of at least 1, or None, works.")
    if init not in ("dense", "fresh"):
        raise BadSetting(f"init is {init!r}; dense or fresh works.")
    check_range("minimum", minimum, 0, 1e12)


def check_kinds(layers: Sequence[str]) -> None:
    """Refuse words that name no kind of layer.

    Raises:
        BadSetting: some word is not of `KINDS`.
    """
    if not layers or any(word not in KINDS for word in layers):
        raise BadSetting(f"layers is {list(layers)!r}; possible: {', '.join(KINDS)}.")
