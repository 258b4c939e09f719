"""The saved folder: `peft_vision.json` beside safetensors. Nothing is ever pickled or unpickled."""

from __future__ import annotations

import json
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from peft_vision.backbones import view
from peft_vision.card import render_card
from peft_vision.errors import CannotWrite, DamagedArtifact, NewerSchema
from peft_vision.files import sha256_of, write_json_atomic
from peft_vision.history import History

SCHEMA = 1
RECORD = "peft_vision.json"
WEIGHTS = "model.safetensors"
ADAPTER = "adapter_model.safetensors"
PARTS = "parts.safetensors"
CARD = "README.md"
PACKAGES = ("peft-vision", "torch", "timm", "transformers", "peft", "bitsandbytes", "safetensors")


def write_weights(path: Path, state: dict[str, Tensor]) -> None:
    """Write tensors as safetensors.

    Raises:
        CannotWrite: the disk is full or not writable.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    unique: dict[int, str] = {}
    plain = {}
    for name, tensor in state.items():
        shared = unique.setdefault(tensor.data_ptr(), name) != name
        plain[name] = tensor.detach().clone() if shared else tensor.detach().contiguous()
    try:
        save_file(plain, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise CannotWrite(
            f"Could not write {path.name}: {error}. Nothing was replaced; what was there before is "
            "intact. Free some space or choose another place."
        ) from error


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read safetensors.

    Raises:
        DamagedArtifact: the file is in another format; nothing else is ever read.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        # Views into the file lie at odd addresses, where kernels may sum in another order: a copy
        # makes the outputs bit-exact, not only the weights.
        found: dict[str, Tensor] = {name: t.clone() for name, t in load_file(path).items()}
    except SafetensorError as error:
        raise DamagedArtifact(f"{path} is not a safetensors file ({error}).") from error
    return found


def write_record(
    folder: Path,
    kind: str,
    history: History,
    after: dict[str, Any] | None,
    model: nn.Module,
    foreign: str = "",
) -> None:
    """Write the record and the model card for the files that are in `folder` already.

    Args:
        foreign: why plain PEFT refuses the folder, where it does.
    """
    weights = sorted(folder.glob("*.safetensors")) + sorted(folder.glob("adapter_config.json"))
    content = {
        "schema": SCHEMA,
        "kind": kind,
        "source": history.source,
        "fingerprint": history.fingerprint,
        "plan": history.plan.to_json(),
        "merged": history.merged,
        "quantized": kind == "adapter" and history.quantized,
        "foreign": foreign,
        "cost": {"before": history.before, "after": after},
        "metrics": history.metrics,
        "labels": history.labels,
        "preprocessing": history.preprocessing,
        "task": history.task,
        "versions": versions(),
        "files": {
            path.name: {"bytes": path.stat().st_size, "sha256": sha256_of(path)} for path in weights
        },
        "prefix": view(model).prefix,
        "model_class": f"{type(model).__module__}.{type(model).__qualname__}",
    }
    (folder / CARD).write_text(render_card(content), encoding="utf-8")
    write_json_atomic(folder / RECORD, content)


def read_record(folder: Path) -> dict[str, Any]:
    """The record of a folder, its files checked against it.

    Raises:
        DamagedArtifact: the record or a file is missing, truncated or altered.
        NewerSchema: it was written by a newer peft_vision.
    """
    content = _read_json(folder)
    schema = content.get("schema")
    if not isinstance(schema, int):
        raise DamagedArtifact(
            f"{folder / RECORD} has no schema number; it is not a record of ours."
        )
    if schema > SCHEMA:
        raise NewerSchema(
            f"{folder} was written in schema {schema}; this peft_vision reads up to {SCHEMA}. "
            "Upgrade with: pip install -U peft-vision"
        )
    for name, stated in dict(content.get("files") or {}).items():
        _check_file(folder, str(name), dict(stated))
    return content


def _read_json(folder: Path) -> dict[str, Any]:
    path = folder / RECORD
    if not path.is_file():
        raise DamagedArtifact(
            f"{folder} has no {RECORD}. Possible: a folder written by save_pretrained or by a "
            "peft-vision command."
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise DamagedArtifact(
            f"{path} is not valid JSON ({error}); it was cut or edited."
        ) from error
    if not isinstance(content, dict):
        raise DamagedArtifact(f"{path} holds no record.")
    return content


def _check_file(folder: Path, name: str, stated: dict[str, Any]) -> None:
    path = folder / name
    if Path(name).name != name or not path.is_file():
        raise DamagedArtifact(f"{folder} lacks {name}, which its record lists. Copy it again.")
    size = path.stat().st_size
    if size != stated.get("bytes"):
        raise DamagedArtifact(
            f"{path} has {size:,} bytes, its record says {stated.get('bytes'):,}: it was truncated "
            "or replaced. Copy the folder again."
        )
    if sha256_of(path) != stated.get("sha256"):
        raise DamagedArtifact(
            f"{path} does not match the checksum in its record: it was altered. Copy the folder "
            "again."
        )


def versions() -> dict[str, str]:
    """Versions of the packages that matter for reading the folder again."""
    found = {name: _version(name) for name in PACKAGES}
    return {name: number for name, number in found.items() if number is not None}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
