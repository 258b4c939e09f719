"""A bias on keys as one more feature, and heads of two widths: the same attention."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from peft_vision.layers.fused_kernels import takes_no_mask, with_bias_inside

F64 = torch.float64


@pytest.mark.parametrize("widths", [(8, 8), (7, 8), (5, 16), (64, 64)])
def test_a_bias_inside_is_a_mask(widths: tuple[int, int]) -> None:
    narrow, width = widths
    q, k = torch.randn(2, 3, 4, 9, narrow, dtype=F64)
    v = torch.randn(3, 4, 9, width, dtype=F64)
    bias = torch.randint(1, 9, (3, 9)).to(F64).log()
    expected = (q @ k.mT * narrow**-0.5 + bias[:, None, None]).softmax(-1) @ v
    wide_q, wide_k, wide_v, scale = with_bias_inside(q, k, v, bias)
    assert wide_q.shape[-1] == wide_k.shape[-1] == wide_v.shape[-1]
    assert wide_q.shape[-1] % 8 == 0
    given = F.scaled_dot_product_attention(wide_q, wide_k, wide_v, scale=scale)
    torch.testing.assert_close(given[..., :width], expected, rtol=0, atol=1e-12)
    assert not given[..., width:].any()


def test_a_token_that_stands_for_three_counts_as_three() -> None:
    q, k, v = torch.randn(3, 1, 2, 4, 8, dtype=F64)
    sizes = torch.tensor([[1, 3, 1, 2]])
    times = sizes[0].tolist()
    many = [t.repeat_interleave(torch.tensor(times), 2) for t in (k, v)]
    expected = F.scaled_dot_product_attention(q, *many)
    *wide, scale = with_bias_inside(q, k, v, sizes.to(F64).log())
    given = F.scaled_dot_product_attention(*wide, scale=scale)[..., :8]
    torch.testing.assert_close(given, expected, rtol=0, atol=1e-12)


def test_only_half_precision_on_cuda_goes_without_a_mask() -> None:
    assert not takes_no_mask(torch.zeros(1, 1, 1, 8))
    assert not takes_no_mask(torch.zeros(1, 1, 1, 8, dtype=torch.bfloat16))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_flash_takes_it() -> None:
    q, k, v = torch.randn(3, 2, 6, 197, 64, device="cuda", dtype=torch.bfloat16)
    bias = torch.rand(2, 197, device="cuda")
    assert takes_no_mask(q)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=bias[:, None, None].to(q))
    *wide, scale = with_bias_inside(q, k, v, bias)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
        given = F.scaled_dot_product_attention(*wide, scale=scale)[..., :64]
    torch.testing.assert_close(given, expected, rtol=0.05, atol=0.02)
