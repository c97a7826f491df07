"""A generated world of worded pictures: pattern x colour x shape, in several drawing styles.

Every picture is computed from signed distance functions, so the package needs no
download to run and no licence to ship data: the embedded default of the demo, of the
tests, and the training world of the bundled CLIP.

A picture is a function of (class, style, seed) alone. ``render`` returns uint8 RGB.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Pixels = NDArray[np.uint8]

SIZE = 64
SHAPES = ("circle", "square", "triangle", "star", "heart", "cross", "ring", "diamond")
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 40, 40),
    "orange": (240, 140, 30),
    "yellow": (238, 214, 50),
    "green": (50, 160, 70),
    "blue": (50, 90, 210),
    "purple": (140, 60, 170),
    "pink": (244, 130, 180),
    "brown": (130, 82, 45),
}
PATTERNS = ("plain", "striped", "dotted", "checked")
STYLES = ("photo", "poster", "sketch", "neon")


def _ordered_classes() -> tuple[str, ...]:
    """All 256 names, ordered so that any prefix spreads evenly and still holds near twins.

    Neighbours in the order differ in one word only, so even 24 classes need all three.
    """
    names = []
    for turn in range(len(COLOURS) * len(PATTERNS) // 4):
        for (s, shape), twin in itertools.product(enumerate(SHAPES), range(4)):
            colour = (s + turn // 2 * 2 + 3 * (twin // 2) + turn) % len(COLOURS)
            pattern = (s + turn // len(PATTERNS) + twin % 2 + 2 * (turn % 2)) % len(PATTERNS)
            names.append(f"{PATTERNS[pattern]} {list(COLOURS)[colour]} {shape}")
    everything = [f"{p} {c} {s}" for p, c, s in itertools.product(PATTERNS, COLOURS, SHAPES)]
    return tuple(dict.fromkeys([*names, *everything]))


ALL_CLASSES = _ordered_classes()


def class_names(count: int = 32) -> tuple[str, ...]:
    """The first ``count`` class names, sorted. The default world has 32 classes."""
    if not 2 <= count <= len(ALL_CLASSES):
        raise ValueError(f"classes must be between 2 and {len(ALL_CLASSES)}, got {count}")
    return tuple(sorted(ALL_CLASSES[:count]))


def _polygon(x: Floats, y: Floats, corners: Sequence[tuple[float, float]]) -> Floats:
    """Signed distance to a closed polygon (negative inside), by edges and winding."""
    distance = np.full_like(x, np.inf)
    inside = np.zeros(x.shape, bool)
    for (ax, ay), (bx, by) in itertools.pairwise([*corners, corners[0]]):
        ex, ey = bx - ax, by - ay
        px, py = x - ax, y - ay
        along = np.clip((px * ex + py * ey) / (ex * ex + ey * ey), 0, 1)
        distance = np.minimum(distance, (px - along * ex) ** 2 + (py - along * ey) ** 2)
        crosses = (ay > y) != (by > y)
        if ey:
            inside ^= crosses & (x < ax + (y - ay) * ex / ey)
    sign = np.where(inside, -1, 1).astype(np.float32)
    return np.asarray(sign * np.sqrt(distance), np.float32)


def _turned(count: int, radii: Sequence[float], start: float) -> list[tuple[float, float]]:
    angles = start + 2 * np.pi * np.arange(count) / count
    return [
        (float(radii[i % len(radii)] * np.sin(a)), float(-radii[i % len(radii)] * np.cos(a)))
        for i, a in enumerate(angles)
    ]


def _heart(x: Floats, y: Floats) -> Floats:
    lobes = np.minimum(np.hypot(x - 0.42, y + 0.3), np.hypot(x + 0.42, y + 0.3)) - 0.5
    tip = _polygon(x, y, [(-0.86, -0.06), (0.0, -0.3), (0.86, -0.06), (0.0, 0.95)])
    return np.asarray(np.minimum(lobes, tip), np.float32)


DISTANCE: dict[str, Callable[[Any, Any], Any]] = {
    "circle": lambda x, y: np.hypot(x, y) - np.float32(0.9),
    "square": lambda x, y: np.maximum(np.abs(x), np.abs(y)) - np.float32(0.8),
    "triangle": lambda x, y: _polygon(x, y, _turned(3, [1.05], 0.0)),
    "star": lambda x, y: _polygon(x, y, _turned(10, [1.05, 0.45], 0.0)),
    "heart": _heart,
    "cross": lambda x, y: np.minimum(
        np.maximum(np.abs(x) - 0.3, np.abs(y) - 0.95), np.maximum(np.abs(y) - 0.3, np.abs(x) - 0.95)
    ).astype(np.float32),
    "ring": lambda x, y: np.abs(np.hypot(x, y) - np.float32(0.68)) - np.float32(0.27),
    "diamond": lambda x, y: (np.abs(x) * 1.25 + np.abs(y) * 0.9 - 0.9).astype(np.float32),
}


def _texture(pattern: str, x: Floats, y: Floats, rng: np.random.Generator) -> Floats:
    """1 where the figure shows its own colour, 0 where the second tone shows."""
    if pattern == "plain":
        return np.ones_like(x)
    waves = rng.uniform(5.5, 7.5)
    if pattern == "striped":
        return np.asarray(np.sin(waves * 1.3 * y + rng.uniform(0, 6)) > 0, np.float32)
    u, v = np.sin(waves * x + rng.uniform(0, 6)), np.sin(waves * y + rng.uniform(0, 6))
    return np.asarray(u * v > 0 if pattern == "checked" else u * v <= 0.35, np.float32)


def _smooth_noise(rng: np.random.Generator, cells: int) -> Floats:
    """(SIZE, SIZE, 3) in [0, 1]: blocks of colour, linearly blended."""
    grid = rng.random((cells + 1, cells + 1, 3), dtype=np.float32)
    at = np.linspace(0, cells, SIZE, endpoint=False, dtype=np.float32)
    low, part = at.astype(int), at - at.astype(int)
    rows = grid[low] * (1 - part)[:, None, None] + grid[low + 1] * part[:, None, None]
    blend = part[None, :, None]
    return np.asarray(rows[:, low] * (1 - blend) + rows[:, low + 1] * blend, np.float32)


def render(name: str, style: str, seed: int) -> Pixels:
    """Draw one picture of a class in a style.

    Args:
        name: "pattern colour shape", for example "striped red circle".
        style: one of ``STYLES``.
        seed: any non-negative integer; equal arguments give equal pixels.

    Returns:
        uint8 array (64, 64, 3).
    """
    pattern, colour, shape = name.split()
    key = [PATTERNS.index(pattern), list(COLOURS).index(colour), SHAPES.index(shape)]
    rng = np.random.default_rng([seed, STYLES.index(style), *key])

    scale, turn = rng.uniform(0.42, 0.72), rng.normal(0, 0.22)
    shift = rng.uniform(-1, 1, 2) * (0.9 - scale)
    axis = np.linspace(-1, 1, SIZE, dtype=np.float32)
    gx, gy = np.meshgrid(axis - np.float32(shift[0]), axis - np.float32(shift[1]))
    cos, sin = np.float32(np.cos(turn) / scale), np.float32(np.sin(turn) / scale)
    x, y = gx * cos + gy * sin, gy * cos - gx * sin

    distance = DISTANCE[shape](x, y) * np.float32(scale)
    inside = np.clip(0.5 - distance * SIZE / 2, 0, 1)[..., None]
    edge = np.clip(1.6 - np.abs(distance) * SIZE / 2, 0, 1)[..., None]
    own = _texture(pattern, x, y, rng)[..., None]
    ink = np.array(COLOURS[colour], np.float32) / 255 + rng.normal(0, 0.05, 3).astype(np.float32)

    if style == "photo":
        light = 0.75 + 0.35 * (gx * rng.normal() + gy * rng.normal())[..., None]
        second = ink * 0.35 + 0.1
        ground = 0.25 + 0.5 * _smooth_noise(rng, 5)
        figure = (own * ink + (1 - own) * second) * np.clip(light, 0.45, 1.15)
        image = ground * (1 - inside) + figure * inside
        image += rng.normal(0, 0.05, image.shape).astype(np.float32)
    elif style == "poster":
        ground = np.full((SIZE, SIZE, 3), rng.uniform(0.82, 0.98), np.float32)
        image = ground * (1 - inside) + (own * ink + (1 - own) * np.float32(0.97)) * inside
    elif style == "sketch":
        paper = 0.93 + 0.05 * _smooth_noise(rng, 12)
        strokes = (np.sin(23 * (x + 0.6 * y) + rng.uniform(0, 6)) > 0.1)[..., None] * own
        image = paper * (1 - inside * strokes * 0.75) + ink * inside * strokes * 0.75
        image = image * (1 - edge) + (ink * 0.75) * edge
        image += rng.normal(0, 0.02, image.shape).astype(np.float32)
    else:
        ground = 0.05 + 0.12 * _smooth_noise(rng, 4)
        glow = np.exp(-np.abs(distance) * 14)[..., None]
        body = inside * own * 0.45
        image = ground + ink * (glow * 0.9 + body) + edge * 0.25
        image += rng.normal(0, 0.04, image.shape).astype(np.float32)
    return np.asarray(np.clip(image, 0, 1) * 255, np.uint8)


def pictures(
    names: Sequence[str], styles: Sequence[str], per_class: int, seed: int
) -> tuple[Pixels, NDArray[np.int64], NDArray[np.int64]]:
    """Draw ``per_class`` pictures of every class in every style.

    Returns:
        pixels (N, 64, 64, 3) uint8, labels (N,) into ``names``, domains (N,) into ``styles``.
    """
    rows = list(itertools.product(range(len(styles)), range(len(names)), range(per_class)))
    pixels = np.stack([render(names[c], styles[d], seed * 1_000_003 + i) for d, c, i in rows])
    index = np.array(rows, np.int64)
    return pixels, index[:, 1], index[:, 0]
