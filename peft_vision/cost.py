"""What a model costs: counted on a twin without data, timed on the device asked for."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from peft_vision.backbones import view
from peft_vision.backbones.sites import Backbone, device_of
from peft_vision.errors import BadSetting
from peft_vision.layers.ownership import plain_of
from peft_vision.layers.quantized import Quantized

T = TypeVar("T")


@dataclass(frozen=True)
class Cost:
    """What one image costs.

    Attributes:
        flops: floating-point operations of one image, two per multiply-accumulate; linears,
            convolutions and attention products, as torch counts them.
        params: parameters, packed weights at their full count. `trainable`: those that would be
            trained.
        bytes: memory of parameters and saved buffers, as they are stored.
        image_size: height and width the count is for.
    """

    flops: int
    params: int
    trainable: int
    bytes: int
    image_size: tuple[int, int] | None = None

    @property
    def gmacs(self) -> float:
        """Billions of multiply-accumulates: what most papers print as GFLOPs."""
        return self.flops / 2e9

    @property
    def gflops(self) -> float:
        """Billions of floating-point operations."""
        return self.flops / 1e9

    def to_json(self) -> dict[str, Any]:
        """Plain JSON."""
        return {
            "flops": self.flops,
            "gmacs": round(self.gmacs, 6),
            "params": self.params,
            "trainable": self.trainable,
            "bytes": self.bytes,
            "image_size": list(self.image_size) if self.image_size else None,
        }

    def __str__(self) -> str:
        return (
            f"{self.gmacs:.3f} GMACs ({self.gflops:.3f} GFLOPs), {self.params / 1e6:.3f} M "
            f"parameters ({self.trainable / 1e6:.3f} M trainable), {self.bytes / 2**20:.1f} MiB"
        )


def twin(model: nn.Module) -> nn.Module:
    """A copy of `model` on the `meta` device: the structure without the numbers.

    Layers with packed weights are plain ones in it, which can be counted.
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        if isinstance(module, Quantized):
            memo[id(module)] = module.dense_twin()
            continue
        for _, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if id(parameter) not in memo:
                empty = torch.empty_like(parameter, device="meta")
                memo[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
        for _, buffer in module.named_buffers(recurse=False, remove_duplicate=False):
            if id(buffer) not in memo:
                memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    return copy.deepcopy(model, memo)


def on_twin(model: nn.Module, run: Callable[[nn.Module], T]) -> T:
    """What `run` gives for a twin of `model`, or for a copy where layers ask for numbers.

    Some adapters look at values on their way (a sparse product, a choice of the largest), which
    `meta` has none of. A copy with numbers stands in for those; the model itself is untouched.
    """
    try:
        return run(twin(model))
    except RuntimeError:
        if any(parameter.is_meta for parameter in model.parameters()):
            raise
        with torch.random.fork_rng(), sdpa_kernel(SDPBackend.MATH):
            return run(copy.deepcopy(model))


def example_input(
    model: nn.Module, image_size: tuple[int, int] | int | None = None, batch: int = 1
) -> Tensor:
    """Random images that `model` takes, on its device and in its dtype: B C H W.

    Raises:
        BadSetting: the model does not say its input size and none was given.
    """
    model = unwrap(model)
    channels, height, width = input_size(model, image_size)
    size = (batch, channels, height, width)
    return torch.randn(size, device=device_of(model), dtype=_dtype_of(model))


def input_size(
    model: nn.Module, image_size: tuple[int, int] | int | None = None
) -> tuple[int, int, int]:
    """Channels, height and width of the images that `model` takes.

    Raises:
        BadSetting: the model does not say and `image_size` is None.
    """
    seen = view(unwrap(model))
    said = seen.input_size
    if image_size is None:
        if said is None:
            raise BadSetting(
                f"{type(model).__name__} does not say its input size; pass image_size=224 or "
                "(H, W)."
            )
        return said
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    return (said[0] if said else _channels(seen), height, width)


def _channels(seen: Backbone) -> int:
    """What the first convolution takes; 3 where there is none."""
    weight = getattr(plain_of(seen.convs[0].layer), "weight", None) if seen.convs else None
    return 3 if weight is None else int(weight.shape[1])


def measure(model: nn.Module, image_size: tuple[int, int] | int | None = None) -> Cost:
    """Count what `model` costs as it stands (adapters unmerged, masks as dense).

    Args:
        image_size: height and width; by default what the model says.

    Raises:
        BadSetting: the model does not say its input size and none was given.
    """
    plain = unwrap(model)
    size = input_size(plain, image_size)
    meta = twin(plain)
    return Cost(
        flops=on_twin(plain, lambda model: count_flops(model, size)),
        params=sum(p.numel() for p in meta.parameters()),
        trainable=sum(p.numel() for p in meta.parameters() if p.requires_grad),
        bytes=sum(t.numel() * t.element_size() for t in plain.state_dict().values()),
        image_size=(size[1], size[2]),
    )


def count_flops(meta: nn.Module, size: tuple[int, int, int]) -> int:
    """FLOPs of one image through a model on `meta`, products with packed weights included.

    On meta, fused and unfused attention count the same; on CPU the fused kernel counts as nothing.
    """
    images = example_input_of(meta, size)
    if any(isinstance(module, Quantized) for module in meta.modules()):
        meta = twin(meta)  # torch does not see the kernels of packed weights
    with FlopCounterMode(display=False) as counter, torch.enable_grad():
        run_images(meta.eval(), images)
    return int(counter.get_total_flops())


def run_images(model: nn.Module, images: Tensor) -> Any:
    """What `model` makes of images, B C H W; of one that takes more than images, its tower's part.

    Args:
        model: plain, or with adapters in its layers.
    """
    run = view(model).run
    return model(images) if run is None else run(model, images)


def example_input_of(meta: nn.Module, size: tuple[int, int, int]) -> Tensor:
    """One image of zeros on the model's device, in its dtype; on `meta`, of no numbers."""
    return torch.zeros(1, *size, device=device_of(meta), dtype=_dtype_of(meta))


def _dtype_of(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def unwrap(model: nn.Module) -> nn.Module:
    """The plain module inside a wrapped or compressed model; a plain model as it is."""
    inner = getattr(model, "plain_model", None)
    return inner if isinstance(inner, nn.Module) else model


@dataclass(frozen=True)
class Timing:
    """Times of one model's batches, in milliseconds.

    Attributes:
        milliseconds: one entry per round.
        batch: images per batch.
    """

    milliseconds: tuple[float, ...]
    batch: int

    @property
    def median(self) -> float:
        """Median over the rounds."""
        return statistics.median(self.milliseconds)

    @property
    def spread(self) -> tuple[float, float]:
        """First and third quartile."""
        if len(self.milliseconds) < 2:
            return (self.median, self.median)
        low, _, high = statistics.quantiles(self.milliseconds, n=4)
        return (low, high)

    @property
    def images_per_second(self) -> float:
        """From the median."""
        return 1e3 * self.batch / self.median


@torch.no_grad()
def time_on(
    models: Mapping[str, nn.Module],
    images: Tensor,
    *,
    rounds: int = 9,
    calls: int = 1,
    warm_up: int = 2,
) -> dict[str, Timing]:
    """Time models against each other, taking turns in every round.

    Args:
        models: on the same device as `images`; put in evaluation mode for the while.
        images: the batch, B C H W.
        rounds: how many times each model is timed. `calls`: forward passes per timing.

    Returns:
        Milliseconds per batch. Compare ratios within one call; a machine's absolute times drift.
    """
    training = {name: model.training for name, model in models.items()}
    times: dict[str, list[float]] = {name: [] for name in models}
    try:
        for model in models.values():
            model.eval()
            for _ in range(warm_up):
                model(images)
        for _ in range(rounds):
            for name, model in models.items():
                times[name].append(_once(model, images, calls))
    finally:
        for name, model in models.items():
            model.train(training[name])
    return {name: Timing(tuple(t), images.shape[0]) for name, t in times.items()}


def _once(model: nn.Module, images: Tensor, calls: int) -> float:
    _settle(images.device)
    start = time.perf_counter()
    for _ in range(calls):
        model(images)
    _settle(images.device)
    return 1e3 * (time.perf_counter() - start) / calls


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
