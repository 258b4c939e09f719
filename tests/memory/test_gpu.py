"""Sizes in words."""

from __future__ import annotations

import pytest

from peft_vision.errors import BadSetting
from peft_vision.memory.gpu import CONTEXT, bytes_of, overhead, said


@pytest.mark.parametrize(
    ("text", "size"),
    [("24GB", 24 * 10**9), ("24 gib", 24 * 2**30), ("0.5GB", 5 * 10**8), (".5 MiB", 2**19)],
)
def test_sizes(text, size):
    assert bytes_of(text) == size


@pytest.mark.parametrize("text", ["24", "GB", "24 apples", "-1GB", "0GB", "", "1.2.3GB"])
def test_what_is_no_size(text):
    with pytest.raises(BadSetting, match="such as 24GB"):
        bytes_of(text)


def test_what_is_said_and_what_a_gpu_needs_besides():
    assert said(bytes_of("24GB")) == "22.35 GiB"
    assert overhead(0) == CONTEXT
    assert overhead(10**9) == CONTEXT + 5 * 10**7
