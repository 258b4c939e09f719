"""Products by hand-picked kernels equal torch's own, and may be changed in place."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from peft_vision.layers import products

SHAPES = {"rows": (7, 6), "sequence": (2, 5, 6), "image": (2, 3, 4, 6), "one": (6,), "none": (0, 6)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_equal_to_torch(shape: tuple[int, ...], bias: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(shape).to(dtype), torch.randn(4, 6).to(dtype)
    added = torch.randn(4).to(dtype) if bias else None
    found = products.linear(x, weight, added)
    expected = functional.linear(x, weight, added)
    assert found.shape == expected.shape
    assert found.dtype == dtype
    assert torch.allclose(
        found, expected, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5
    )
    assert not found._is_view()


@pytest.mark.parametrize("way", ["transposed weight", "strided input"])
def test_any_strides(way: str) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(8, 6), torch.randn(4, 6)
    if way == "strided input":
        x = torch.randn(6, 16).t()[::2]
    else:
        weight = torch.randn(6, 4).t()
    assert torch.allclose(products.linear(x, weight), functional.linear(x, weight), atol=1e-5)


def test_both_kernels_are_tried_here(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(8, 6), torch.randn(4, 6)
    usual = products.linear(x, weight)
    monkeypatch.setattr(products, "ONEDNN", None)
    assert torch.allclose(products.linear(x, weight), usual, atol=1e-5)
