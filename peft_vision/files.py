"""Writing so that nothing is lost: beside the target first, then renamed."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from peft_vision.errors import CannotWrite, OutputExists

CHUNK = 1 << 22


def sha256_of(path: Path) -> str:
    """Hexadecimal SHA-256 of a file, read in pieces of 4 MiB."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while piece := stream.read(CHUNK):
            digest.update(piece)
    return digest.hexdigest()


def write_json_atomic(path: Path, content: Any) -> None:
    """Write JSON beside `path` and rename it into place.

    Raises:
        CannotWrite: the disk is full or the folder is not writable; an older file is intact.
    """
    with writing(path):
        beside = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            beside.write_text(json.dumps(content, indent=1, sort_keys=False) + "\n")
            beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)


@contextlib.contextmanager
def staged_folder(target: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A folder to write into that becomes `target` only when the block ends without an error.

    Args:
        target: the folder that shall exist afterwards.
        overwrite: replace a folder that is there already, in one rename.

    Raises:
        OutputExists: `target` holds something and `overwrite` is off.
        CannotWrite: the disk is full or the place is not writable; an older folder is intact.
    """
    target = Path(target)
    refuse_existing(target, overwrite=overwrite)
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        stage = Path(tempfile.mkdtemp(prefix=f".{target.name}.new-", dir=target.parent))
        try:
            yield stage
            stage.chmod(0o755)
            _exchange(stage, target)
        finally:
            shutil.rmtree(stage, ignore_errors=True)


def refuse_existing(target: Path, *, overwrite: bool) -> None:
    """Say early that an output is in the way, before hours are spent on it.

    Raises:
        OutputExists: `target` is a file, or a folder that holds something.
    """
    if overwrite or not target.exists():
        return
    if target.is_dir() and not any(target.iterdir()):
        return
    raise OutputExists(
        f"{target} exists already. Choose another output folder, or pass --overwrite "
        "(overwrite=True in Python) to replace it."
    )


def _exchange(stage: Path, target: Path) -> None:
    if not target.exists():
        stage.rename(target)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old-", dir=target.parent))
    target.rename(old / target.name)
    try:
        stage.rename(target)
    except OSError:
        (old / target.name).rename(target)
        raise
    finally:
        shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def writing(target: Path) -> Iterator[None]:
    """Turn an operating-system failure while writing into one message.

    Raises:
        CannotWrite: in place of any OSError (safetensors reports a full disk as its own error).
    """
    try:
        yield
    except OSError as error:
        raise CannotWrite(
            f"Could not write {target}: {error.strerror or error}. Nothing was replaced; what was "
            "there before is intact. Free some space or choose another place."
        ) from error
