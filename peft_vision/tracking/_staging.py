"""Draws what a scene consists of and how all of it moves."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from peft_vision.tracking._drawn_settings import SyntheticSettings
from peft_vision.tracking._scene import Scene, Thing, poses
from peft_vision.tracking._silhouettes import (
    Random,
    Table,
    colors,
    silhouette,
    surface,
    wave,
)
from peft_vision.tracking.boxes import Array
from peft_vision.tracking.crops import Frame

_MARGIN = 0.14  # of the frame: no target's middle comes nearer to the border
_SLOW = (80.0, 300.0)  # periods of the background and of the light, in frames
_FAST = 24.0  # radius in pixels below which things are slower
_FIRST_MEETING = 10  # nothing covers the target before this frame


def staged(
    photographs: Sequence[Frame], length: int, settings: SyntheticSettings, random: Random
) -> Scene:
    """Draw a scene.

    Args:
        photographs: one becomes the background, others the surfaces.
        length: number of frames.
        settings: what is drawn.
        random: decides.
    """
    behind_all = int(random.integers(len(photographs)))
    others = [photo for number, photo in enumerate(photographs) if number != behind_all]
    radius = _radius(settings, random)
    source = _any(others, random)
    target = Thing(
        surface(source, random),
        silhouette(random),
        _wandering(length, radius, settings, random),
    )
    return Scene(
        size=(settings.height, settings.width),
        photograph=photographs[behind_all],
        views=_views(photographs[behind_all], length, settings, random),
        colors=colors(random, strength=0.6),
        target=target,
        behind=_behind(target, source, others, settings, random),
        before=_before(target, radius, others, settings, random),
        tables=_light(length, settings, random),
        soft=bool(random.random() < 0.5),
    )


def _behind(
    target: Thing,
    source: Frame,
    others: Sequence[Frame],
    settings: SyntheticSettings,
    random: Random,
) -> list[Thing]:
    """Things like the target, in one of surface and outline, and things unlike it."""
    length = len(target.poses)
    found = []
    for _ in range(int(random.integers(settings.distractors + 1))):
        same_surface = random.random() < 0.5
        texture = target.texture if same_surface else surface(source, random)
        outline = silhouette(random) if same_surface else target.outline
        path = _wandering(length, _radius(settings, random), settings, random)
        found.append(Thing(texture, outline, path))
    for _ in range(int(random.integers(settings.strangers + 1))):
        texture = surface(_any(others, random), random)
        path = _wandering(length, _radius(settings, random), settings, random)
        found.append(Thing(texture, silhouette(random), path))
    return found


def _before(
    target: Thing,
    radius: float,
    others: Sequence[Frame],
    settings: SyntheticSettings,
    random: Random,
) -> list[Thing]:
    """Things that pass in front of the target, each once, straight on."""
    length = len(target.poses)
    found = []
    for _ in range(int(random.integers(settings.occluders + 1))):
        if length <= _FIRST_MEETING:
            break
        moment = int(random.integers(_FIRST_MEETING, length))
        size = radius * random.uniform(0.6, 1.2)
        # Slower, and it would stay before the target; and it has left at the first frame.
        speed = max(random.uniform(3.0, 8.0), 2.5 * (radius + size) / moment)
        way = random.uniform(0, 2 * np.pi)
        steps = (np.arange(length) - moment)[:, None] * speed
        aside = random.uniform(-0.8, 0.8) * radius
        center = target.poses[moment, :, 2] + aside * np.array([-np.sin(way), np.cos(way)])
        centers = center + steps * np.array([np.cos(way), np.sin(way)])
        start, turn = random.uniform(0, 2 * np.pi), random.normal(0, 0.02)
        turned = start + turn * np.arange(length, dtype=np.float64)
        texture = surface(_any(others, random), random)
        path = poses(centers, np.full((length, 2), size), turned)
        found.append(Thing(texture, silhouette(random), path))
    return found


def _any(photographs: Sequence[Frame], random: Random) -> Frame:
    return photographs[int(random.integers(len(photographs)))]


def _wandering(length: int, radius: float, settings: SyntheticSettings, random: Random) -> Array:
    """Poses of a thing that moves to and fro all over the frame: N 2 3."""
    frame = np.array([settings.width, settings.height], dtype=np.float64)
    # Small things are slower, so that all of them move by about as much of their own size.
    slowed = max(1.0, _FAST / radius)
    periods = (slowed * settings.periods[0], slowed * settings.periods[1])
    ways = np.stack([wave(random, length, periods) for _ in range(2)], axis=1)
    offset = random.uniform(-0.25, 0.25, 2)
    shares = 0.5 + 0.75 * ways + offset
    centers = frame * (_MARGIN + (1 - 2 * _MARGIN) * _folded(shares))
    grown = np.log(settings.growth) * wave(random, length, settings.periods)
    squeezed = np.log(settings.squeeze) * wave(random, length, settings.periods)
    sizes = radius * np.exp(np.stack([grown + squeezed, grown - squeezed], axis=1))
    turned = settings.turn * wave(random, length, settings.periods)
    return poses(centers, sizes, random.uniform(0, 2 * np.pi) + turned)


def _folded(shares: Array) -> Array:
    """Numbers bent back into [0, 1] smoothly, as a pendulum is."""
    return np.asarray(0.5 - 0.5 * np.cos(np.pi * shares), dtype=np.float64)


def _views(photograph: Frame, length: int, settings: SyntheticSettings, random: Random) -> Array:
    """Where the camera looks: frame by frame 2 3, from the frame to the photograph."""
    height, width = photograph.shape[:2]
    fits = min(width / settings.width, height / settings.height)
    zoom = fits * random.uniform(0.55, 0.85) * np.exp(0.08 * wave(random, length, _SLOW))
    free = np.array([width, height]) - fits * 0.7 * np.array([settings.width, settings.height])
    ways = np.stack([wave(random, length, _SLOW) for _ in range(2)], axis=1)
    centers = np.array([width, height]) / 2 + 0.45 * free * ways
    angles = 0.06 * wave(random, length, _SLOW)
    turned = poses(centers, np.stack([zoom, zoom], axis=1), angles)
    middle = np.array([settings.width, settings.height]) / 2
    turned[:, :, 2] -= turned[:, :, :2] @ middle
    if random.random() < 0.5:  # a mirror image
        turned[:, :, 2] += turned[:, :, 0] * settings.width
        turned[:, :, 0] *= -1
    return turned


def _light(length: int, settings: SyntheticSettings, random: Random) -> Table:
    """Brightness tables, frame by frame: N 256."""
    factors = np.exp(np.log(settings.light) * wave(random, length, _SLOW))
    values = np.arange(256)[None] * factors[:, None]
    tables: Table = np.clip(np.rint(values), 0, 255).astype(np.uint8)
    return tables


def _radius(settings: SyntheticSettings, random: Random) -> float:
    low, high = np.log([settings.smallest, settings.largest])
    return float(np.exp(random.uniform(low, high)))
