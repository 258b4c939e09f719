"""What a run tells while it goes on: a JSONL file, TensorBoard, and a progress bar."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from peft_vision.files import writing

if TYPE_CHECKING:
    from rich.progress import Progress
    from torch.utils.tensorboard import SummaryWriter

LOG_FILE = "log.jsonl"
_LINES = 20


def truncate_log(file: Path, step: int) -> None:
    """Drop the lines after `step`, which a resumed run will write again, and a torn last line."""
    if not file.exists():
        return
    kept: list[str] = []
    for line in file.read_text().splitlines():
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue
        if entry["step"] <= step:
            kept.append(line + "\n")
    beside = file.with_name(f".{file.name}.new")
    with writing(file):
        beside.write_text("".join(kept))
        beside.replace(file)


class JsonLog(TrainerCallback):
    """One line of JSON per optimizer step and per evaluation."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Append the figures; the line is flushed at once."""
        if not state.is_world_process_zero:
            return
        with writing(self.file):
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with self.file.open("a") as stream:
                stream.write(json.dumps({"step": state.global_step, **logs}) + "\n")


class TensorBoardLog(TrainerCallback):
    """TensorBoard events; a resumed run purges what comes after its checkpoint."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.writer: SummaryWriter | None = None

    @staticmethod
    def available() -> bool:
        """Whether TensorBoard is installed."""
        return importlib.util.find_spec("tensorboard") is not None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Open the event file."""
        from torch.utils.tensorboard import SummaryWriter

        if state.is_world_process_zero:
            self.writer = SummaryWriter(str(self.folder), purge_step=state.global_step + 1)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Write each figure under train/ or validation/."""
        if self.writer is None:
            return
        for name, value in logs.items():
            evaluated = name.startswith("eval_")
            tag = f"validation/{name.removeprefix('eval_')}" if evaluated else f"train/{name}"
            self.writer.add_scalar(tag, value, state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Close the event file."""
        if self.writer is not None:
            self.writer.close()
            self.writer = None


class ProgressBar(TrainerCallback):
    """A bar on a terminal, and some twenty lines elsewhere, both on standard error."""

    def __init__(self, headline: str) -> None:
        self.headline = headline
        self.bar: Progress | None = None
        self.job: Any = None
        self.said: dict[str, str] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Show the bar where a terminal is."""
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
        from rich.progress import TimeRemainingColumn as Remaining

        console = Console(stderr=True)
        if not state.is_world_process_zero or not console.is_terminal:
            return
        columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), Remaining())
        self.bar = Progress(*columns, TextColumn("{task.fields[said]}"), console=console)
        self.bar.start()
        self.job = self.bar.add_task("training", total=state.max_steps, said="")

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Show loss and validation figure."""
        if not state.is_world_process_zero:
            return
        for key, name in (("loss", "loss"), (f"eval_{self.headline}", self.headline)):
            if key in logs:
                self.said[name] = f"{name} {logs[key]:.4f}"
        text = "  ".join(self.said.values())
        if self.bar is not None:
            self.bar.update(self.job, completed=state.global_step, said=text)
        elif state.global_step % max(1, state.max_steps // _LINES) == 0:
            sys.stderr.write(f"step {state.global_step}/{state.max_steps}  {text}\n")

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Leave the finished bar on the screen."""
        if self.bar is not None:
            self.bar.stop()
