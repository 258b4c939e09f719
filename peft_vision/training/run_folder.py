"""The output folder of a run: fresh, resumable, finished or in the way.

While a run goes on its checkpoints and description are in `<output>/.run`, its logs in
`<output>/logs`. The saved model is moved in at the end, `peft_vision.json` last, so a folder with
that file and without `.run` is a finished result, whenever the process was killed.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft_vision.errors import OutputExists
from peft_vision.files import refuse_existing, write_json_atomic, writing
from peft_vision.training import checkpoints

RUN = ".run"
DESCRIPTION = "run.json"
ARTIFACT = "peft_vision.json"
LOG_FILE = "log.jsonl"
_SHOWN = 8


@dataclass(frozen=True)
class RunFolder:
    """Where a run keeps its things.

    Attributes:
        output: the folder that the user named.
        resumed: optimizer steps that were done by an earlier, unfinished run; None for a fresh one.
    """

    output: Path
    resumed: int | None

    @property
    def run_dir(self) -> Path:
        """Checkpoints and the description."""
        return self.output / RUN

    @property
    def log_dir(self) -> Path:
        """Logs, which stay."""
        return self.output / "logs"

    def begin(self, description: Mapping[str, Any]) -> None:
        """Prepare the folder; on the main process only.

        Raises:
            CannotWrite: the place is not writable.
        """
        with writing(self.output):
            if self.resumed is None:
                shutil.rmtree(self.run_dir, ignore_errors=True)
                (self.log_dir / LOG_FILE).unlink(missing_ok=True)
                for events in self.log_dir.glob("events.out.tfevents.*"):
                    events.unlink()
            self.run_dir.mkdir(parents=True, exist_ok=True)
            checkpoints.remove_incomplete(self.run_dir)
            write_json_atomic(self.run_dir / DESCRIPTION, dict(description))

    def finish(self, artifact: Path) -> None:
        """Move a saved model in from a folder inside `.run`, and remove `.run`.

        Raises:
            CannotWrite: the disk is full or the place is not writable.
        """
        with writing(self.output):
            old = _listed(self.output / ARTIFACT)
            names = sorted(path.name for path in artifact.iterdir())
            names.sort(key=lambda name: name == ARTIFACT)
            for name in names:
                target = self.output / name
                if target.is_dir():
                    shutil.rmtree(target)
                (artifact / name).replace(target)
            for name in old - set(names):
                (self.output / name).unlink(missing_ok=True)
            (self.run_dir / DESCRIPTION).unlink()
            shutil.rmtree(self.run_dir)


def open_run(
    output: Path, description: Mapping[str, Any], *, overwrite: bool, resume: bool
) -> RunFolder:
    """Find out what is in the output folder; nothing is written yet.

    Args:
        output: the folder.
        description: what makes two runs the same, as nested JSON; a section that it lacks is not
            compared.
        overwrite: replace a finished result, or an unfinished run of another recipe.
        resume: go on with an unfinished run of the same recipe; False starts it anew.

    Raises:
        OutputExists: something else is in the way.
    """
    file = output / RUN / DESCRIPTION
    if not file.is_file():
        others = output.is_dir() and {path.name for path in output.iterdir()} - {RUN}
        if others or output.is_file():
            refuse_existing(output, overwrite=overwrite)
        return RunFolder(output, None)
    old = {key: value for key, value in json.loads(file.read_text()).items() if key in description}
    different = differences(old, description)
    if different and not overwrite:
        listed = "\n".join(f"  {line}" for line in different[:_SHOWN])
        more = f"\n  and {len(different) - _SHOWN} more" if len(different) > _SHOWN else ""
        raise OutputExists(
            f"{output} holds an unfinished run of another recipe. What differs:\n{listed}{more}\n"
            "Restore these values to resume it, choose another output, or pass --overwrite to "
            "start anew."
        )
    last = checkpoints.latest(output / RUN)
    if different or not resume:
        return RunFolder(output, None)
    return RunFolder(output, checkpoints.step_of(last) if last is not None else 0)


def differences(old: Mapping[str, Any], new: Mapping[str, Any], before: str = "") -> list[str]:
    """`key: old value, now new value` for all that differs, by dotted key."""
    found: list[str] = []
    for key in sorted({*old, *new}):
        was, now = old.get(key), new.get(key)
        if isinstance(was, Mapping) and isinstance(now, Mapping):
            found += differences(was, now, f"{before}{key}.")
        elif was != now:
            found.append(f"{before}{key}: {json.dumps(was)}, now {json.dumps(now)}")
    return found


def _listed(artifact: Path) -> set[str]:
    """The files of an artifact that is being replaced."""
    if not artifact.is_file():
        return set()
    try:
        files = json.loads(artifact.read_text()).get("files", {})
    except (json.JSONDecodeError, AttributeError):
        return set()
    return {name for name in files if "/" not in name}
