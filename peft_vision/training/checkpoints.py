"""Checkpoints on disk: complete ones are sealed last, and nothing else is ever resumed from."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from peft_vision.errors import CannotWrite, DamagedArtifact
from peft_vision.files import write_json_atomic, writing
from peft_vision.training import sharding

PREFIX = "checkpoint-"
WEIGHTS = "model.safetensors"
SEAL = "complete.json"


def seal(folder: Path) -> None:
    """Declare a checkpoint complete: the last file written, with the size of all others."""
    sizes = {
        path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.name != SEAL
    }
    write_json_atomic(folder / SEAL, sizes)


def is_complete(folder: Path) -> bool:
    """Whether a checkpoint has its seal and all files at the sizes sealed."""
    mark = folder / SEAL
    if not mark.is_file():
        return False
    sizes: dict[str, int] = json.loads(mark.read_text())
    files = [(folder / name, size) for name, size in sizes.items()]
    return all(path.is_file() and path.stat().st_size == size for path, size in files)


def step_of(folder: Path) -> int:
    """The optimizer steps that were done when the checkpoint was written."""
    return int(folder.name.removeprefix(PREFIX))


def all_of(run_dir: Path) -> list[Path]:
    """All checkpoint folders of a run, complete or not, oldest first."""
    found = [
        path
        for path in run_dir.glob(f"{PREFIX}*")
        if path.is_dir() and path.name.removeprefix(PREFIX).isdigit()
    ]
    return sorted(found, key=step_of)


def latest(run_dir: Path) -> Path | None:
    """The newest complete checkpoint of a run, or None."""
    complete = [path for path in all_of(run_dir) if is_complete(path)]
    return complete[-1] if complete else None


def remove_incomplete(run_dir: Path) -> None:
    """Remove what a killed process left half written."""
    for path in all_of(run_dir):
        if not is_complete(path):
            shutil.rmtree(path)


def rotate(run_dir: Path, keep: int) -> None:
    """Keep the newest `keep` complete checkpoints."""
    complete = [path for path in all_of(run_dir) if is_complete(path)]
    for path in complete[: max(0, len(complete) - keep)]:
        (path / SEAL).unlink()
        shutil.rmtree(path)


def changing_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What training changes: trainable parameters, and buffers that are saved, on their devices."""
    kept = model.state_dict().keys()
    buffers = {name: tensor for name, tensor in model.named_buffers() if name in kept}
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return {**buffers, **trained}


def save_tensors(model: nn.Module, folder: Path, *, write: bool = True) -> None:
    """Write what training changes to a safetensors file.

    Every process has to call it where parameters are cut over processes.

    Args:
        write: False only takes part in the gathering.

    Raises:
        CannotWrite: the disk is full or the folder is not writable.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    sharding.close(model)
    gathered = sharding.gathered(changing_tensors(model))
    if not write:
        return
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: tensor.cpu().contiguous().clone() for name, tensor in gathered.items()}
        try:
            save_file(tensors, folder / WEIGHTS)
        except SafetensorError as error:
            raise CannotWrite(f"Could not write the checkpoint {folder}: {error}.") from error


def load_tensors(model: nn.Module, folder: Path) -> None:
    """Copy the tensors of a checkpoint into the model.

    Raises:
        DamagedArtifact: the checkpoint is of a model with other trainable tensors.
    """
    from safetensors.torch import load_file

    sharding.close(model)
    stored, wanted = load_file(folder / WEIGHTS), changing_tensors(model)
    different = sorted(set(stored) ^ set(wanted)) + sorted(_reshaped(stored, wanted))
    if different:
        raise DamagedArtifact(
            f"The checkpoint {folder} is of another model: {len(different)} tensors differ, "
            f"such as {', '.join(different[:3])}. Train into another output folder, or start "
            "anew with --restart."
        )
    for name, tensor in wanted.items():
        sharding.put(tensor, stored[name])


def _reshaped(stored: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> set[str]:
    return {
        name for name in stored.keys() & wanted.keys() if stored[name].shape != wanted[name].shape
    }
