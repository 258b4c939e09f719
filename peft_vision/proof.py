"""Proof that what is to be trained gets a gradient: never trust silence."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from peft_vision.backbones import view
from peft_vision.backbones.sites import device_of
from peft_vision.cost import example_input_of, input_size, on_twin, run_images, unwrap
from peft_vision.errors import GradientMissing, GradientUnproven

USUAL_SIZE = 224


def prove_gradient(
    model: nn.Module, image_size: tuple[int, int] | int | None = None, inputs: Any = None
) -> int:
    """Prove that every trained tensor receives gradient, by a forward and backward pass on `meta`.

    No memory is used and no number is read: what is shown is that each trainable tensor is part of
    the computation. Some families read a linear's weight instead of calling it, and adapters on
    them would be silent; trained parts beside them (a head) would still learn. An adapter that
    cannot do without numbers is proven on a copy.

    Args:
        image_size: for models that do not say theirs; 224 is tried then.
        inputs: for models that take more than images: a tuple of arguments, or a mapping.

    Returns:
        How many trainable tensors were proven.

    Raises:
        GradientMissing: some are not reached, by name. GradientUnproven: the proof cannot be made.
    """
    plain = unwrap(model)
    size = input_size(plain, image_size or (None if view(plain).input_size else USUAL_SIZE))
    run = partial(_shown, size) if inputs is None else partial(_called, inputs)
    try:
        wanted = on_twin(plain, lambda copy: _trained_once(copy, run))
    except (RuntimeError, ValueError, TypeError, AttributeError) as error:
        tried = f"one image of {size} fails" if inputs is None else "the inputs given fail"
        raise GradientUnproven(
            f"Whether the adapters train could not be shown: {tried} in {type(plain).__name__} "
            f"({error}). Pass image_size=(H, W), or inputs=, a tuple of the arguments of a model "
            "that takes more than images."
        ) from error
    silent = [name for name, p in wanted if p.grad is None]
    if silent or not wanted:
        raise GradientMissing(
            f"{len(silent)} of {len(wanted)} trainable tensors would receive no gradient, first "
            f"{', '.join(silent[:3]) or 'none'}. {type(plain).__name__} does not call "
            "these layers in its forward pass; choose other targets."
        )
    return len(wanted)


def _trained_once(
    model: nn.Module, run: Callable[[nn.Module], Any]
) -> list[tuple[str, nn.Parameter]]:
    """The trainable parameters of `model`, after one backward pass."""
    with torch.enable_grad():
        torch.autograd.backward(total(run(model.train())))
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def _shown(size: tuple[int, int, int], model: nn.Module) -> Any:
    """The model on two images: batch norms refuse a single value per channel in training."""
    return run_images(model, example_input_of(model, size).expand(2, -1, -1, -1))


def _called(inputs: Any, model: nn.Module) -> Any:
    """The model on what it was said to take, moved to where it is."""
    given = tree_map_only(Tensor, lambda tensor: tensor.to(device_of(model)), inputs)
    return model(**given) if isinstance(given, Mapping) else model(*given)


def total(output: Any) -> Tensor:
    """A scalar that depends on all of a model's output, to go back from."""
    if isinstance(output, Tensor):
        return output.sum()
    tensors = list(output.values() if isinstance(output, Mapping) else output)
    parts = [t.sum() for t in tensors if isinstance(t, Tensor) and t.requires_grad]
    if not parts:  # a backbone's feature maps are a tuple within
        leaves = (t for t in tree_leaves(tensors) if isinstance(t, Tensor))
        parts = [t.sum() for t in leaves if t.requires_grad]
    return torch.stack(parts).sum()
