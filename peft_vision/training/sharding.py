"""Parameters cut over processes (FSDP2), and put together again.

transformers and accelerate do the cutting, block by block; see `recipes/accelerate`. Here is what
they leave open: which blocks, what cannot be cut, checkpoints of the same format as everywhere, and
a plain model at the end. All but `prepare` has to be called by every process.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from peft_vision.backbones import view
from peft_vision.cost import unwrap
from peft_vision.errors import BadSetting, UnsupportedBackbone
from peft_vision.layers.absent import Absent
from peft_vision.layers.quantized import quantized_layers
from peft_vision.layers.traits import Penalised
from peft_vision.layers.trunk import Trunk

if TYPE_CHECKING:
    from accelerate import Accelerator

OPTIMIZERS = ("AdamW", "SGD")
_PLAIN = "The ddp-*.yaml files of recipes/accelerate work: each GPU then has the whole model."


def allow_without_gpu() -> None:
    """Have accelerate shard on CPUs (gloo) when it was told to; it would do DDP and say nothing."""
    import os

    from accelerate import PartialState
    from accelerate.utils import DistributedType

    told = os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"
    if told and PartialState().distributed_type == DistributedType.MULTI_CPU:
        state = PartialState._shared_state  # noqa: SLF001 - there is no other way to say it
        state["distributed_type"] = DistributedType.MULTI_GPU


def prepare(accelerator: Accelerator, model: nn.Module) -> None:
    """Tell accelerate what to cut: a block is gathered when it runs, all else for a whole pass.

    Nothing is cast: frozen weights travel in the type that they are stored in, and autocast decides
    on the rest as it does on one GPU.

    Raises:
        BadSetting: the configuration is of FSDP's first version.
        UnsupportedBackbone: something in the model cannot be cut.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy

    plugin = accelerator.state.fsdp_plugin
    if plugin.fsdp_version != 2:
        raise BadSetting(
            f"fsdp_version is {plugin.fsdp_version}; set fsdp_version: 2 in accelerate's "
            "configuration, as in recipes/accelerate/fsdp2-2gpu.yaml."
        )
    _require_cuttable(model)
    plugin.mixed_precision_policy = MixedPrecisionPolicy()
    plugin.transformer_cls_names_to_wrap = sorted(_units(model))


def require_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """Refuse an optimizer that needs a parameter, or two that belong together, in one piece.

    Raises:
        BadSetting: it is not one of those that work element by element.
    """
    name = type(optimizer).__name__
    if name not in OPTIMIZERS:
        raise BadSetting(
            f"{name} does not work on parameters that are cut over processes (FSDP2). "
            f"train.optimizer=adamw, sgd and loraplus do. {_PLAIN}"
        )


def gathered(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each tensor in one piece."""
    return {name: whole(tensor.detach()) for name, tensor in tensors.items()}


def whole(tensor: Tensor) -> Tensor:
    """A tensor in one piece; one that was cut is gathered onto the CPU."""
    if not _together():
        return tensor
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor().cpu() if isinstance(tensor, DTensor) else tensor


def put(target: Tensor, value: Tensor) -> None:
    """Copy a tensor in one piece into another, cut as that is."""
    target.detach().copy_(_cut_like(value, target))


def is_cut(model: nn.Module) -> bool:
    """Whether parameters of the model are cut."""
    return next(_shards(model), None) is not None


def close(model: nn.Module) -> None:
    """Have each parameter in this process's share only, also those gathered for the last pass."""
    for module in _shards(model):
        module.reshard()


@contextmanager
def whole_states(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Have the optimizer give and take its states in one piece, as a single process has them."""

    def gather(_: Any, content: dict[str, Any]) -> dict[str, Any]:
        states = {number: _gathered_state(s) for number, s in content["state"].items()}
        return {**content, "state": states}

    def cut(_: Any, content: dict[str, Any]) -> dict[str, Any]:
        groups = [group["params"] for group in optimizer.param_groups]
        parameters = [p for group in groups for p in group]
        states = {
            number: {key: _like(value, parameters[number]) for key, value in state.items()}
            for number, state in content["state"].items()
        }
        return {**content, "state": states}

    handles = (
        optimizer.register_state_dict_post_hook(gather),
        optimizer.register_load_state_dict_pre_hook(cut),
    )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _gathered_state(state: Mapping[str, Any]) -> dict[str, Any]:
    """What an optimizer keeps for one parameter, in one piece."""
    return {key: whole(v) if isinstance(v, Tensor) else v for key, v in state.items()}


def put_together(model: nn.Module) -> None:
    """Turn a model that was cut into a plain one with all parameters, on the CPU."""
    close(model)
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if id(parameter) not in made:
                full = whole(parameter.detach())
                made[id(parameter)] = nn.Parameter(full, requires_grad=parameter.requires_grad)
            setattr(module, name, made[id(parameter)])
    for module in list(_shards(model)):
        _forget(module)
    model.to("cpu")


def _forget(module: Any) -> None:
    """Undo `fully_shard`, for which torch has no function: its hooks, its class and its state."""
    from torch.distributed._composable.contract import REGISTRY_KEY, STATE_KEY

    state = module._get_fsdp_state()  # noqa: SLF001
    handles = [state._pre_forward_hook_handle, state._post_forward_hook_handle]  # noqa: SLF001
    for group in state._fsdp_param_groups:  # noqa: SLF001
        handles += group._module_to_pre_save_state_dict_hook_handle.values()  # noqa: SLF001
        handles += group._module_to_pre_load_state_dict_hook_handle.values()  # noqa: SLF001
        handles += [parameter._post_load_hook_handle for parameter in group.fsdp_params]  # noqa: SLF001
    for handle in handles:
        handle.remove()
    for key in (STATE_KEY, REGISTRY_KEY):
        vars(module).pop(key, None)
    module.__class__ = type(module).__mro__[module._orig_cls_mro_index]  # noqa: SLF001


def _shards(model: nn.Module) -> Iterator[Any]:
    if not _together():
        return iter(())
    from torch.distributed.fsdp import FSDPModule

    return (module for module in model.modules() if isinstance(module, FSDPModule))


def _together() -> bool:
    """Whether there are other processes at all; where torch cannot have any, nothing is loaded."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _cut_like(value: Tensor, target: Tensor) -> Tensor:
    if not _together():
        return value
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(target, DTensor):
        return value
    value = value.to(target.device)
    # Every process has read the same file: nothing is sent.
    return distribute_tensor(value, target.device_mesh, target.placements, src_data_rank=None)


def _like(value: Any, parameter: nn.Parameter) -> Any:
    same = isinstance(value, Tensor) and value.shape == parameter.shape
    return _cut_like(value, parameter) if same else value


def _units(model: nn.Module) -> set[str]:
    """Class names of the blocks, where the model calls them as they are; else it is cut as one."""
    plain = unwrap(model)
    for module in plain.modules():
        if isinstance(module, Absent) or (isinstance(module, Trunk) and not module.plain):
            return set()
    return {type(site.block).__name__ for site in view(plain).blocks}


def _require_cuttable(model: nn.Module) -> None:
    from peft_vision.training.allocation import allocation_of

    packed = [name for name, _ in quantized_layers(model)]
    penalised = [name for name, m in model.named_modules() if isinstance(m, Penalised)]
    reason = ""
    if packed:
        reason = f"{len(packed)} layers with packed weights (such as {packed[0]})"
    elif penalised:
        reason = f"{len(penalised)} layers that read their weights for a penalty ({penalised[0]})"
    elif allocation_of(model) is not None:
        reason = "an adapter that moves its ranks between layers while it trains"
    if reason:
        raise UnsupportedBackbone(
            f"The model has {reason}, which cannot be cut over processes (FSDP2). {_PLAIN}"
        )
