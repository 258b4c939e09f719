"""Before a run: whether it fits where it is to run, and with what settings."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

from peft_vision.errors import BadSetting
from peft_vision.files import write_json_atomic
from peft_vision.memory.advice import advise
from peft_vision.memory.fitting import Changes, fit_to, refusal
from peft_vision.memory.rehearsal import Rehearsal
from peft_vision.recipe import Recipe
from peft_vision.training.processes import on_accelerator
from peft_vision.training.settings import uses_bf16

RECORD = "memory.json"
Say = Callable[[str], None]


def is_asked(recipe: Recipe, processes: int = 1) -> bool:
    """Whether the memory of a run is of interest: it names a size, or is to run on a CUDA GPU.

    Where parameters are cut over processes (FSDP), one process's share is not known beforehand, and
    only a size in the recipe counts.
    """
    if recipe.memory is not None:
        return True
    cut = processes > 1 and os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"
    return _on_cuda(recipe) and not cut


def settle(recipe: Recipe, rehearsal: Rehearsal, *, force: bool, say: Say) -> Changes:
    """The settings of `train` that are chosen for a recipe's `memory`; none without it.

    Args:
        force: begin in any case.
        say: is told what was chosen, in one line.

    Raises:
        BadSetting: the run cannot fit into the recipe's `memory`, or onto the GPU that is there,
            and `force` is off.
    """
    train = recipe.train.model_copy(
        update={"precision": "bf16" if uses_bf16(recipe.train) else "fp32"}
    )
    recipe = recipe.model_copy(update={"train": train})
    if recipe.memory is None:
        _check(recipe, rehearsal, force=force, say=say)
        return {}
    try:
        fit = fit_to(recipe, rehearsal)
    except BadSetting as error:
        if not force or "auto" in {train.batch_size, train.micro_batch}:
            raise
        say(f"Begun in spite of this (--force): {error}")
        return {}
    say(fit.words(recipe.memory))
    return fit.changes


def recorded(run_dir: Path) -> Changes | None:
    """What was chosen when an unfinished run was begun; None where nothing is recorded."""
    file = run_dir / RECORD
    if not file.is_file():
        return None
    found: Changes = json.loads(file.read_text())
    return found


def record(run_dir: Path, changes: Changes) -> None:
    """Keep what was chosen, so that the run goes on with the same."""
    write_json_atomic(run_dir / RECORD, changes)


def _check(recipe: Recipe, rehearsal: Rehearsal, *, force: bool, say: Say) -> None:
    """Refuse what the GPU that is there cannot hold; what cannot be known is no reason."""
    import torch

    size = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    try:
        if force or rehearsal.run(recipe.train).fits(size):
            return
    except BadSetting as error:
        say(str(error))
        return
    advice = advise(recipe, rehearsal, size)
    text = refusal(advice, torch.cuda.get_device_name())
    raise BadSetting(
        f"{text}\nThe recipe's memory: line has finetune choose among them; --force begins as it "
        "is."
    )


def _on_cuda(recipe: Recipe) -> bool:
    import torch

    return torch.cuda.is_available() and on_accelerator(recipe.train.device)
