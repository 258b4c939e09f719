"""A real video with pseudo ground truth: the cup of OpenCV's documentation, found by its darkness.

OpenCV ships `cup.mp4` with its documentation (Debian's package `opencv-doc`, there packed with
gzip): 640 x 480, 217 frames, a dark cup that a hand moves, turns and brings nearer before a bright
wall. No boxes come with it. Here a pixel is the cup's where it is dark and not of the warm colors
of the hand; what is thinner than the disc (the shadows between the fingers) is dropped. The
thresholds were chosen by eye for this video alone. The hand hides a part of the cup, and the box
is that of what is seen. Good for a demonstration; no benchmark.

    python -m benchmarks.cup_video cup.mp4 FOLDER --sheet sheet.png

Writes FOLDER/cup/00000001.jpg and so on with groundtruth.txt, which `peft-vision evaluate` and
`peft-vision track` read.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from peft_vision.files import staged_folder
from peft_vision.tracking.boxes import Array
from peft_vision.tracking.crops import Frame
from peft_vision.tracking.frames import open_frames
from peft_vision.tracking.video import drawn, write_results

DARK = 105
"""The brightest channel of the cup is below this."""
WARM = 14
"""Red exceeds blue by less than this on the cup, and by more on the hand, in shadow too."""
DISC = 7
"""Radius in pixels of the disc that fits into every part of the cup."""
PART = 0.03
"""Smaller parts than this share of the largest are not the cup's."""
COLUMNS = 6


def cup_box(frame: Frame) -> Array:
    """The box x y w h around what is seen of the cup."""
    values = frame.astype(np.int16)
    dark = (values.max(axis=2) < DARK) & (values[..., 0] - values[..., 2] < WARM)
    across = np.arange(-DISC, DISC + 1)
    disc = (across[:, None] ** 2 + across**2 <= DISC**2).astype(np.uint8)
    opened = cv2.morphologyEx(dark.astype(np.uint8), cv2.MORPH_OPEN, disc)
    _, _, parts, _ = cv2.connectedComponentsWithStats(opened)
    parts = parts[1:]  # the first is all that is left over
    if not len(parts):
        raise SystemExit("Nothing in this frame is as dark as the cup: is this cup.mp4?")
    area = parts[:, cv2.CC_STAT_AREA]
    kept = parts[area >= PART * area.max()]
    low = kept[:, :2].min(axis=0)
    high = (kept[:, :2] + kept[:, 2:4]).max(axis=0)
    return np.concatenate([low, high - low]).astype(np.float64)


def sheet(frames: Sequence[Frame], boxes: Array) -> Image.Image:
    """Frames with their boxes, side by side, to look at."""
    small = [
        Image.fromarray(drawn(frame, box)).resize((320, 240))
        for frame, box in zip(frames, boxes, strict=True)
    ]
    rows = -(-len(small) // COLUMNS)
    page = Image.new("RGB", (320 * COLUMNS, 240 * rows))
    for place, image in enumerate(small):
        page.paste(image, (320 * (place % COLUMNS), 240 * (place // COLUMNS)))
    return page


def main() -> None:
    """Write the frames and their boxes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("video", type=Path, help="cup.mp4, unpacked")
    parser.add_argument("folder", type=Path, help="where to write <folder>/cup")
    parser.add_argument("--overwrite", action="store_true")
    parser.add_argument("--sheet", type=Path, help="a picture of every 8th frame with its box")
    given = parser.parse_args()
    video = open_frames(given.video)
    frames = [video.read(index) for index in range(len(video))]
    boxes = np.stack([cup_box(frame) for frame in frames])
    with staged_folder(given.folder / "cup", overwrite=given.overwrite) as stage:
        for number, frame in enumerate(frames, start=1):
            Image.fromarray(frame).save(stage / f"{number:08d}.jpg", quality=95)
        write_results(stage / "groundtruth.txt", boxes)
    if given.sheet:
        sheet(frames[::8], boxes[::8]).save(given.sheet)
    moved = np.abs(np.diff(boxes, axis=0)).max()
    print(f"{len(frames)} frames; no side moves by more than {moved:.0f} px between two of them.")


if __name__ == "__main__":
    main()
