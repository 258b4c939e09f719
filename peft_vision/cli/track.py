"""`peft-vision track`: one object through a video."""

from __future__ import annotations

import contextlib
import json
import re
import sys
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from peft_vision.tracking.crops import Frame
    from peft_vision.tracking.following import Place
    from peft_vision.tracking.sequences import Frames

TRUTH = "groundtruth.txt"


def track(
    source: Annotated[
        str, typer.Argument(help="A video file, a folder of frames, or the index of a camera.")
    ],
    *,
    model: Annotated[str, typer.Option("--model", "-m", help="A saved tracker.")],
    box: Annotated[
        str | None,
        typer.Option(
            help="x,y,width,height of the object in the first frame, in pixels. Default: the first "
            f"line of {TRUTH} in the folder of frames."
        ),
    ] = None,
    output: Annotated[
        list[Path] | None,
        typer.Option(
            "--output",
            "-o",
            help="An .mp4 file with the boxes drawn, or a .txt file of lines x,y,w,h; give it "
            "twice for both. Without it, every frame is a line on standard output: index x y w h "
            "score.",
        ),
    ] = None,
    frames: Annotated[int | None, typer.Option(min=1, help="Stop after so many frames.")] = None,
    rate: Annotated[
        float | None,
        typer.Option(help="Frames per second of the .mp4; default: as the source, else 30."),
    ] = None,
    device: Annotated[str | None, typer.Option(help="Such as cpu or cuda:1.")] = None,
    precision: Annotated[str, typer.Option(help="fp32 or bf16.")] = "fp32",
    unmerged: Annotated[
        bool, typer.Option("--unmerged", help="Leave adapters beside the weights.")
    ] = False,
    compiled: Annotated[
        bool, typer.Option("--compile", help="Compile the model; the first frames take long.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Follow one object through a video, a folder of frames or a camera's picture."""
    outputs = output or []
    _check_outputs(outputs, rate, overwrite=overwrite)
    given = _box(source, box)

    from peft_vision.tracking.tracker import Tracker

    images, total, own_rate = _frames(source, frames, given)
    tracker = Tracker(
        model,
        merged=not unmerged,
        device=device,
        precision=precision,  # type: ignore[arg-type]
        compile=compiled,
    )
    lines = not outputs and not as_json
    with _bar(images, total, shown=not (lines and sys.stdout.isatty())) as watched:
        endless, rate = total is None, rate or own_rate
        found = _run(tracker, watched, given, outputs, rate, lines=lines, endless=endless)
    _tell(found, outputs, as_json=as_json, lines=lines)


def _run(
    tracker: Any,
    images: Iterator[Frame],
    box: list[float],
    outputs: list[Path],
    rate: float,
    *,
    lines: bool,
    endless: bool,
) -> list[tuple[list[float], float, float]]:
    """Box, score and seconds of every frame; written and printed as they come."""
    import numpy as np

    from peft_vision.tracking.following import places
    from peft_vision.tracking.video import drawn, write_results, writing_video

    found: list[tuple[list[float], float, float]] = []
    with contextlib.ExitStack() as stack:
        films = [
            stack.enter_context(writing_video(path, rate))
            for path in outputs
            if path.suffix == ".mp4"
        ]
        # Ctrl-C is how one switches a camera off; what was found until then counts.
        with contextlib.suppress(*([KeyboardInterrupt] if endless else [])):
            for place in places(tracker, images, np.array(box)):
                found.append((place.box.tolist(), place.score, place.seconds))
                for add in films:
                    add(drawn(place.frame, place.box, place.score))
                if lines:
                    print(_line(place), flush=True)
    boxes = np.array([row[0] for row in found])
    for path in outputs:
        if path.suffix == ".txt":
            write_results(path, boxes)
    return found


def _line(place: Place) -> str:
    numbers = " ".join(f"{value:.3f}" for value in place.box)
    return f"{place.index} {numbers} {place.score:.4f}"


def _check_outputs(outputs: list[Path], rate: float | None, *, overwrite: bool) -> None:
    from peft_vision.errors import BadSetting, CannotWrite
    from peft_vision.files import refuse_existing

    if rate is not None and not 0 < rate <= 1000:
        raise BadSetting(f"--rate is {rate:g}; it lies above 0, up to 1000 frames per second.")
    for path in outputs:
        if path.suffix not in {".mp4", ".txt"}:
            raise BadSetting(f"--output {path}: a file that ends in .mp4 or .txt works.")
        if path.is_dir():
            raise BadSetting(f"--output {path} is a folder. Name a file.")
        if not path.resolve().parent.is_dir():
            raise CannotWrite(f"Could not write {path}: there is no folder {path.parent}.")
        refuse_existing(path, overwrite=overwrite)


def _box(source: str, text: str | None) -> list[float]:
    """The first box, as numbers; whether they make a box is the tracker's to say."""
    from peft_vision.errors import BadSetting

    said = f"--box {text}"
    if text is None:
        file = Path(source).expanduser() / TRUTH
        if not file.is_file():
            raise BadSetting(
                "Where is the object? Pass --box x,y,width,height, in pixels of the first frame. "
                f"Only a folder of frames with a {TRUTH} needs none."
            )
        text = file.read_text(encoding="utf-8", errors="replace").partition("\n")[0]
        said = f"The first line of {file}, {text.strip()!r}"
    try:
        return [float(part) for part in re.split(r"[,;\s]+", text.strip())]
    except ValueError as error:
        raise BadSetting(f"{said}: four numbers x,y,width,height work.") from error


def _frames(
    source: str, limit: int | None, box: list[float]
) -> tuple[Iterator[Frame], int | None, float]:
    """Frames, how many there will be, and how many there are in a second.

    The first one is read, and the box looked up in it, before a model is loaded.
    """
    from peft_vision.tracking.frames import VideoFile, open_frames, stream
    from peft_vision.tracking.inputs import checked_start
    from peft_vision.tracking.video import RATE

    if source.isdecimal() and not Path(source).exists():
        camera = stream(int(source))
        first = next(camera)
        checked_start(first, box)
        return islice(chain([first], camera), limit), limit, RATE
    opened = open_frames(source)
    checked_start(opened.read(0), box)
    total = min(len(opened), limit or len(opened))
    rate = opened.rate if isinstance(opened, VideoFile) else 0
    return _read(opened, total), total, rate or RATE


def _read(frames: Frames, total: int) -> Iterator[Frame]:
    return (frames.read(index) for index in range(total))


@contextlib.contextmanager
def _bar(images: Iterator[Frame], total: int | None, *, shown: bool) -> Iterator[Iterator[Frame]]:
    """The frames, with a progress bar on standard error where that is a terminal."""
    if not shown or not sys.stderr.isatty():
        yield images
        return
    from peft_vision.tracking.following import progress_bar

    with progress_bar() as bar:
        yield iter(bar.track(images, total=total))


def _tell(
    found: list[tuple[list[float], float, float]],
    outputs: list[Path],
    *,
    as_json: bool,
    lines: bool,
) -> None:
    """The summary; on standard error where the boxes are on standard output."""
    seconds = sum(row[2] for row in found[1:])
    fps = (len(found) - 1) / seconds if seconds else None
    confidence = sum(row[1] for row in found[1:]) / (len(found) - 1) if found[1:] else None
    if as_json:
        said: dict[str, Any] = {"frames": len(found), "fps": fps, "confidence": confidence}
        said["output"] = [str(path) for path in outputs]
        if not outputs:
            said |= {"boxes": [row[0] for row in found], "scores": [row[1] for row in found]}
        print(json.dumps(said))
        return
    parts = [f"{len(found)} frames"]
    if fps is not None and confidence is not None:
        parts += [f"{fps:.1f} frames/s without decoding", f"mean confidence {confidence:.3f}"]
    parts += [f"saved to {' and '.join(map(str, outputs))}"] if outputs else []
    typer.echo(", ".join(parts) + ".", err=lines)
