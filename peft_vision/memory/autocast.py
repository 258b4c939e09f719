"""What autocast does on CUDA, done on (fake) CPU tensors.

Fake tensors on "cuda" need a GPU for their backward pass (torch 2.14), so that the step is run on
fake CPU tensors. There, autocast multiplies in low precision just so, but leaves norms, softmax
and losses in the precision that they are given, where CUDA's computes them in fp32, and what is
cast is kept for the backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

LOW = (torch.bfloat16, torch.float16)
FULL = frozenset(
    {
        *("acos", "asin", "cosh", "erfinv", "exp", "expm1", "log", "log10", "log2", "log1p"),
        *("reciprocal", "rsqrt", "sinh", "tan", "pow", "__pow__", "__rpow__", "softplus"),
        *("layer_norm", "native_layer_norm", "rms_norm", "group_norm", "cosine_similarity"),
        *("nll_loss", "kl_div", "l1_loss", "smooth_l1_loss", "huber_loss", "mse_loss"),
        *("binary_cross_entropy_with_logits", "dist", "cdist", "renorm", "logsumexp"),
        *("prod", "softmax", "log_softmax", "cumprod", "cumsum", "sum", "cross_entropy"),
    }
)
"""Functions that CUDA's autocast runs in fp32 (ATen/autocast_mode.h), the rare ones left out."""


class _CudaRules(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in FULL and torch.is_autocast_enabled("cpu"):
            args = tuple(_full(value) for value in args)
            kwargs = {key: _full(value) for key, value in kwargs.items()}
        elif name == "scaled_dot_product_attention":
            args, kwargs = _without_dropout(args, kwargs)
        return func(*args, **kwargs)


@contextmanager
def as_on_cuda(low: bool) -> Iterator[None]:
    """Compute as a GPU would, on CPU tensors.

    Args:
        low: with autocast in bfloat16.
    """
    # Casts of weights live until the outermost autocast is left: none around that needs none.
    with _CudaRules(), torch.autocast("cpu", torch.bfloat16) if low else nullcontext():
        yield


def go_back(total: Tensor) -> None:
    """The backward pass of a scalar, with the rules in place for what is recomputed in it.

    `torch.autograd.backward` would hand itself to the mode, which is out of place inside of it.
    """
    engine: Any = torch.autograd.Variable._execution_engine  # noqa: SLF001
    engine.run_backward(
        (total,),
        (torch.ones_like(total),),
        False,  # the graph is not kept
        False,  # and has no graph of its own
        (),
        allow_unreachable=True,
        accumulate_grad=True,
    )


def _full(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype in LOW else value


def _without_dropout(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Fused attention on CUDA drops without keeping the scores; on the CPU it cannot."""
    if len(args) > 4:
        args = (*args[:4], 0.0, *args[5:])
    return args, {**kwargs, **({"dropout_p": 0.0} if "dropout_p" in kwargs else {})}
