"""The tracker against a sum by hand, torch's own profiler, and what autograd says that it keeps."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from peft_vision.memory.fake import fake_copy, fake_tensors
from peft_vision.memory.places import ATTENTION, MLP
from peft_vision.memory.tracker import COPIES, GRADIENTS, PeakTracker
from peft_vision.wrapping import wrap

FLOAT = 4


def stack() -> nn.Sequential:
    return nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))


def test_views_are_counted_once_and_what_is_dropped_no_more():
    with PeakTracker() as tracker:
        x = torch.zeros(100)
        views = [x[:50], x.view(10, 10), x.t()]
        assert tracker.live == tracker.peak == 100 * FLOAT
        del x
        assert tracker.live == 100 * FLOAT
        del views
        assert (tracker.live, tracker.peak) == (0, 100 * FLOAT)


def test_sizes_are_rounded_up_to_blocks():
    with PeakTracker(block=512) as tracker:
        kept = [torch.zeros(1), torch.zeros(128), torch.zeros(129)]
        assert tracker.live == 512 + 512 + 1024
    assert len(kept) == 3


def test_weights_activations_and_gradients_by_hand():
    """x is kept by the first linear, and its output by GELU, and GELU's by the second linear."""
    model, x = stack(), torch.randn(10, 32)
    weights = sum(p.numel() for p in model.parameters()) * FLOAT
    with PeakTracker(model) as tracker:
        tracker.hold("inputs", [x])
        y = model(x)
        assert tracker.live == weights + (x.numel() + 2 * 10 * 64 + y.numel()) * FLOAT
        y.sum().backward()
        del y
        gc.collect()
        assert tracker.now[GRADIENTS] == weights
        assert tracker.live == 2 * weights + x.numel() * FLOAT


def test_what_autograd_says_it_keeps_is_what_is_alive(tiny_timm):
    model = tiny_timm().train()
    x, kept = torch.randn(4, 3, 32, 32), dict[int, int]()
    known = {t.untyped_storage().data_ptr() for t in (x, *model.parameters(), *model.buffers())}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with PeakTracker(model) as tracker:
        tracker.hold("inputs", [x])
        before = tracker.live
        with saved_tensors_hooks(keep, lambda tensor: tensor):
            y = model(x)
        gc.collect()
        left = tracker.live - before - y.untyped_storage().nbytes()
    assert left == pytest.approx(sum(kept.values()), rel=0.01)


@pytest.mark.parametrize("low", [False, True])
def test_the_peak_is_that_of_torchs_profiler(tiny_timm, low):
    """What a kernel takes for itself is seen by the profiler only."""
    model, x = tiny_timm().train(), torch.randn(16, 3, 32, 32)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            loss = model(x).float().square().sum()
        loss.backward()
        model.zero_grad()

    step()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    with PeakTracker(model) as tracker:
        tracker.hold("inputs", [x])
        before = tracker.live
        step()
    assert before + peak == pytest.approx(tracker.peak, rel=0.03)


@pytest.mark.parametrize("low", [False, True])
@pytest.mark.parametrize("recomputed", [False, True])
def test_fake_tensors_count_as_real_ones(tiny_timm, low, recomputed):
    model = wrap(tiny_timm(), "lora", r=4).train()
    model.plain_model.set_grad_checkpointing(recomputed)

    def peak(model: nn.Module) -> tuple[int, dict[str, int]]:
        x = torch.zeros(8, 3, 32, 32)
        with PeakTracker(model) as tracker:
            tracker.hold("inputs", [x])
            with torch.autocast("cpu", torch.bfloat16, enabled=low):
                loss = model(x).float().sum()
            loss.backward()
        return tracker.peak, tracker.at_peak

    real = peak(model)
    with fake_tensors():
        assert peak(fake_copy(model)) == real
    assert real[1][ATTENTION] > 0
    assert real[1][MLP] > 0


def test_casts_of_weights_held_for_backward_are_copies():
    model = stack().requires_grad_(False)
    x = torch.randn(10, 32, requires_grad=True)
    with PeakTracker(model) as tracker:
        with torch.autocast("cpu", torch.bfloat16):
            y = model(x)
        matrices = sum(p.numel() for p in model.parameters() if p.ndim == 2)
        assert tracker.now[COPIES] >= 2 * matrices
    assert y.requires_grad


def test_recomputed_activations_are_not_held(tiny_timm):
    model, x = stack(), torch.randn(1000, 32, requires_grad=True)

    def held(run) -> int:
        with PeakTracker(model) as tracker:
            y = run()
            live = tracker.live
            y.sum().backward()
        return live

    plain = held(lambda: model(x))
    again = held(lambda: checkpoint(model, x, use_reentrant=False))
    assert plain - again == 2 * 1000 * 64 * FLOAT
