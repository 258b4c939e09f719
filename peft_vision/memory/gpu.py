"""Sizes of memory in words, and what a GPU holds besides tensors."""

from __future__ import annotations

import re

from peft_vision.errors import BadSetting

UNITS = {"MB": 10**6, "GB": 10**9, "TB": 10**12, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}

CONTEXT = 3 * 2**28
"""Bytes of the CUDA context, loaded kernels and cuBLAS workspaces: 0.75 GiB, a round figure for
recent cards. Unverified: no GPU was there when it was written."""

FRAGMENTATION = 0.05
"""Share of the tensors' peak that the caching allocator loses to blocks that do not fit.
Unverified, too."""


def bytes_of(text: str) -> int:
    """Bytes that a size such as ``24GB`` or ``22.5 GiB`` names.

    GB is 10^9 bytes and GiB 2^30. Cards sold as 24 GB offer between 22.0 and 23.6 GiB, so 24GB
    (22.4 GiB) is about what one may count on.

    Raises:
        BadSetting: it is no such size.

    >>> bytes_of("24GB"), bytes_of("1.5 GiB")
    (24000000000, 1610612736)
    """
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([a-zA-Z]+)\s*", text)
    unit = UNITS.get(match.group(2).upper()) if match else None
    size = int(float(match.group(1)) * unit) if match and unit else 0
    if not size:
        raise BadSetting(
            f"{text!r} is not a size of memory. Possible: a number above zero and one of MB, GB, "
            "TB, MiB, GiB, TiB, such as 24GB."
        )
    return size


def said(size: float) -> str:
    """Bytes for people.

    >>> said(3 * 2**29), said(-(2**20))
    ('1.50 GiB', '-1.0 MiB')
    """
    return f"{size / 2**30:.2f} GiB" if abs(size) >= 2**28 else f"{size / 2**20:.1f} MiB"


def overhead(allocated: int) -> int:
    """Bytes that a GPU needs besides tensors of so many bytes."""
    return CONTEXT + int(FRAGMENTATION * allocated)
