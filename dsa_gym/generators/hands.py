"""Hands: a seeded population of writers who draw the characters of an invented script, made offline.

A character is one to three joined strokes: lines, bows, hooks, waves, arches and loops. A hand writes all
its characters in one manner: thickness, slant, width, height and place of the letters, how round the corners are, how
the pressure changes along a stroke, how much the pen wobbles and how dark the ink is; every drawing differs a little.

A share `odd` of the writers has one of the `STYLES`, and keeps it: a thick brush, hollow letters, mirror writing and so
on. A style shows in every character, and styles contradict one another and the ordinary manner.

A stroke is a chain of points q with radii r in pixels. A pixel p has the ink

    clip(1/2 + max_q(r_q - |p - q|), 0, 1),

which is the anti-aliased union of discs. The characters depend on `characters_seed` alone: other people can be drawn
who write the same script.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dsa_gym.generators.checks import check_integer, check_share
from dsa_gym.storage import atomic_path

Points = NDArray[np.float64]
"""Points of one stroke, (points, 2): x to the right and y downwards."""

_MOST_CHARACTERS = 200
_STEP = 0.5
"""Distance of neighbouring points of a stroke, in pixels."""
_USUAL_SIZE = 28
"""Side of the picture for which lengths of a hand are given in pixels; they grow with the picture."""


@dataclass(frozen=True)
class HandConfig:
    """What the population and its script look like.

    Attributes:
        users: number of writers, at least 1.
        characters: characters of the script, from 1 to 200.
        per_user: drawings of a writer, at least 1; a character comes again only when all were drawn.
        size: side of a picture in pixels, from 16 to 64.
        odd: probability that a writer has one of the `STYLES`.
        seed: seed of the population, at least 0.
        characters_seed: seed of the script, at least 0.
    """

    users: int = 160
    characters: int = 48
    per_user: int = 30
    size: int = 28
    odd: float = 0.0
    seed: int = 0
    characters_seed: int = 0

    def __post_init__(self) -> None:
        """Check every value.

        Raises:
            ValueError: if a value is out of range; it names the argument, the value and what would be right.
        """
        for name, least in (("users", 1), ("per_user", 1), ("seed", 0), ("characters_seed", 0)):
            check_integer(name, getattr(self, name), least)
        for name, least, most in (("characters", 1, _MOST_CHARACTERS), ("size", 16, 64)):
            check_integer(name, getattr(self, name), least, most)
        check_share("odd", self.odd)


class HandDrawings(NamedTuple):
    """Drawings of all writers, writer by writer in the order in which they were drawn.

    Attributes:
        image: (n, size, size) uint8, from 0 for ink to 255 for paper.
        user: (n,) opaque names of the writers, such as `hand-0007`.
        condition: (n,) names of the characters, such as `character-031`.
    """

    image: NDArray[np.uint8]
    user: NDArray[np.str_]
    condition: NDArray[np.str_]


def draw_hands(config: HandConfig) -> HandDrawings:
    """Draw the population's characters.

    A writer's drawings depend on the seed, the writer's number and the other settings, not on the number of writers.

    Args:
        config: what the population looks like.

    Returns:
        `users * per_user` drawings.

    Raises:
        ValueError: if `config` is not a `HandConfig`.
    """
    if not isinstance(config, HandConfig):
        raise ValueError(f"config={config!r} must be a HandConfig")
    images, characters = [], []
    for number in range(config.users):
        for character, image in _drawings(config, number):
            images.append(image)
            characters.append(f"character-{character:03d}")
    users = [f"hand-{number:04d}" for number in range(config.users) for _ in range(config.per_user)]
    return HandDrawings(np.stack(images), np.array(users), np.array(characters))


def write_hands(config: HandConfig, path: Path) -> int:
    """Write the drawings as a compressed NPZ file with the arrays image, user and condition; see `HandDrawings`.

    Args:
        config: what the population looks like.
        path: a name that ends in `.npz`.

    Returns:
        Number of drawings.

    Raises:
        ValueError: if the name ends differently or `config` is no `HandConfig`.
    """
    path = Path(path)
    if path.suffix != ".npz":
        raise ValueError(f"path={str(path)!r} must end in .npz")
    drawings = draw_hands(config)
    with atomic_path(path) as temporary:
        np.savez_compressed(temporary, **drawings._asdict())
    return len(drawings.image)


def style_of(config: HandConfig, number: int) -> str:
    """The style of a writer, one of `STYLES`, or `"ordinary"`: the truth behind the data, which no file tells."""
    rng = np.random.default_rng(np.random.SeedSequence(int(config.seed), spawn_key=(number, 1)))
    style = list(STYLES)[int(rng.integers(len(STYLES)))]
    return style if rng.random() < config.odd else "ordinary"


# ----------------------------------------------------------------------------------------------------------
# The script.


@lru_cache(maxsize=8)
def _script(characters: int, seed: int) -> tuple[tuple[Points, ...], ...]:
    """Control points of every character's strokes, in [-1, 1]^2; each character differs visibly from all others."""
    rng = np.random.default_rng(np.random.SeedSequence(seed))
    script: list[tuple[Points, ...]] = []
    seen: list[NDArray[np.float64]] = []
    far = 0.5
    while len(script) < characters:
        strokes = _character(rng)
        picture = _thumbnail(strokes)
        if all(np.sum((picture - other) ** 2) > far * min(np.sum(picture**2), np.sum(other**2)) for other in seen):
            script.append(strokes)
            seen.append(picture)
        else:
            far *= 0.999  # a long script has to make do with smaller differences
    return tuple(script)


def _character(rng: np.random.Generator) -> tuple[Points, ...]:
    """Draw the strokes of one character, each starting near another one, and fill the square with them."""
    count = int(rng.choice([1, 2, 3], p=[0.3, 0.45, 0.25]))
    strokes: list[Points] = []
    for _ in range(count):
        stroke = _STROKES[int(rng.integers(len(_STROKES)))] * rng.choice([-1, 1], size=2)
        if rng.random() < 0.3:
            stroke = stroke[:, ::-1]
        stroke = stroke * rng.uniform(0.5, 1.0, size=2) * (1.0 if count == 1 else 0.8)
        if strokes:
            joint = strokes[-1][int(rng.integers(len(strokes[-1])))]
            stroke = stroke + joint - stroke[int(rng.integers(len(stroke)))]
        strokes.append(stroke)
    every = np.concatenate(strokes)
    low, high = every.min(0), every.max(0)
    half = np.maximum((high - low) / 2, 0.45 * (high - low).max() / 2)  # a lone line stays a line
    return tuple((stroke - (low + high) / 2) / half for stroke in strokes)


def _strokes(*shapes: str) -> tuple[Points, ...]:
    """Read shapes, given as `x,y x,y ...` in hundredths."""
    return tuple(np.array([[float(x) / 100 for x in point.split(",")] for point in s.split()]) for s in shapes)


_STROKES = _strokes(
    "0,-100 5,0 0,100",  # bar
    "-70,-100 0,5 70,100",  # slash
    "60,-85 -25,-90 -75,-10 -30,80 60,85",  # bow
    "25,-100 25,20 15,80 -25,100 -60,70",  # hook
    "60,-75 0,-100 -50,-55 0,0 50,50 0,100 -60,75",  # wave
    "15,-90 -65,-40 -60,50 0,90 60,45 55,-40 0,-90 -20,-70",  # ring
    "-70,90 20,10 35,-75 0,-100 -25,-50 0,70 60,85",  # loop
    "-70,-85 65,-80 -60,80 70,85",  # zigzag
    "-70,95 -65,-45 -5,-90 55,-50 70,95",  # arch
    "-75,-95 -5,90 70,-95",  # wedge
    "10,-5 35,15 0,40 -40,0 0,-50 60,-30 65,50",  # curl
)


def _thumbnail(strokes: tuple[Points, ...]) -> NDArray[np.float64]:
    """A blurred picture of a character, (12, 12) flattened, to tell how different two characters are."""
    points = np.concatenate([_curve(stroke, 1.0) for stroke in strokes])  # (points, 2)
    pixels = np.stack(np.meshgrid(*[np.linspace(-1, 1, 12)] * 2), axis=-1).reshape(-1, 1, 2)
    near = np.min(np.sum((pixels - points) ** 2, axis=-1), axis=1)
    return np.asarray(np.exp(-near / (2 * 0.2**2)))


def _curve(control: Points, roundness: float) -> Points:
    """A curve through control points: a Catmull-Rom spline over chord lengths, mixed with the straight chords.

    Args:
        control: (k, 2), k at least 2.
        roundness: from 0 (straight chords, sharp corners) to 1 (the spline).

    Returns:
        (64, 2)
    """
    steps = np.linalg.norm(np.diff(control, axis=0), axis=1)
    knots = np.concatenate([[0.0], np.cumsum(np.maximum(steps, 1e-6))])
    slopes = np.gradient(control, knots, axis=0)
    t = np.linspace(0, knots[-1], 64)
    k = np.clip(np.searchsorted(knots, t, side="right") - 1, 0, len(control) - 2)
    length = (knots[k + 1] - knots[k])[:, None]
    s = (t - knots[k])[:, None] / length
    chord = control[k] + s * (control[k + 1] - control[k])
    # the cubic Hermite polynomial is the chord plus this
    bend = s * (1 - s) * length * ((1 - s) * slopes[k] - s * slopes[k + 1])
    bend += s * (1 - s) * (2 * s - 1) * (control[k + 1] - control[k])
    return np.asarray(chord + roundness * bend)


# ----------------------------------------------------------------------------------------------------------
# The writers.


class _Hand(NamedTuple):
    """How one person writes; lengths are in pixels of a picture of the usual size, or shares of its side."""

    thickness: float
    """Width of a stroke, in pixels."""
    slant: float
    """Shear: how far the top leans to the right, per height."""
    scale: float
    """Height of a letter, as a share of the side."""
    aspect: float
    """Width of a letter, as a share of its height."""
    x: float
    """Place of the centre right of the picture's, as a share of the side."""
    y: float
    """Place of the centre below the picture's, as a share of the side."""
    tilt: float
    """Rotation, in radians."""
    wobble: float
    """Standard deviation of control points, in halves of a letter's side."""
    roundness: float
    """See `_curve`."""
    pressure: float
    """How much thicker a stroke is in its middle than at its ends, as a share of the thickness."""
    darkness: float
    """Ink of a full pixel, from 0 to 1."""
    wall: float
    """Thickness of the outline of hollow strokes, in pixels; 0 for solid ones."""
    gap: float
    """Distance of the dots of dotted strokes, in pixels; 0 for whole ones."""
    facing: float
    """1, or -1 for mirror writing."""


_ORDINARY: dict[str, tuple[float, float]] = {
    "thickness": (1.5, 2.2),
    "slant": (-0.12, 0.22),
    "scale": (0.62, 0.78),
    "aspect": (0.75, 1.05),
    "x": (-0.04, 0.04),
    "y": (-0.04, 0.04),
    "tilt": (-0.06, 0.06),
    "wobble": (0.02, 0.06),
    "roundness": (0.6, 1.0),
    "pressure": (0.0, 0.5),
    "darkness": (0.85, 1.0),
    "wall": (0.0, 0.0),
    "gap": (0.0, 0.0),
    "facing": (1.0, 1.0),
}
"""Ranges from which ordinary hands are drawn, uniformly."""

STYLES: dict[str, dict[str, tuple[float, float]]] = {
    "brush": {"thickness": (4.4, 5.4)},
    "hair": {"thickness": (0.5, 0.7)},
    "left": {"slant": (-1.0, -0.8)},
    "right": {"slant": (0.9, 1.1)},
    "corner": {"scale": (0.32, 0.4), "x": (-0.28, -0.22), "y": (-0.28, -0.22), "thickness": (1.2, 1.5)},
    "hollow": {"thickness": (4.8, 5.6), "wall": (1.0, 1.2), "pressure": (0.0, 0.2)},
    "dotted": {"thickness": (2.6, 3.0), "gap": (4.6, 5.2), "pressure": (0.0, 0.2)},
    "mirrored": {"facing": (-1.0, -1.0)},
}
"""Odd styles by name: the ranges in which they differ from an ordinary hand."""


def _hand(config: HandConfig, number: int, rng: np.random.Generator) -> _Hand:
    """Draw a writer's hand."""
    ranges = _ORDINARY | STYLES.get(style_of(config, number), {})
    return _Hand(*(float(rng.uniform(*ranges[name])) for name in _Hand._fields))


def _drawings(config: HandConfig, number: int) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    """Yield what a writer draws: character and picture."""
    rng = np.random.default_rng(np.random.SeedSequence(int(config.seed), spawn_key=(number,)))
    script = _script(int(config.characters), int(config.characters_seed))
    hand = _hand(config, number, rng)
    rounds = -(-config.per_user // config.characters)
    order = np.concatenate([rng.permutation(config.characters) for _ in range(rounds)])
    for character in order[: config.per_user].tolist():
        yield character, _draw(script[character], _today(hand, rng), config.size, rng)


def _today(hand: _Hand, rng: np.random.Generator) -> _Hand:
    """The hand as it is for one drawing: nobody writes twice the same."""
    thickness, scale, aspect = rng.normal(1, [0.05, 0.03, 0.04])
    slant, tilt, x, y = rng.normal(0, [0.03, 0.03, 0.012, 0.012])
    return hand._replace(
        thickness=hand.thickness * thickness,
        scale=hand.scale * scale,
        aspect=hand.aspect * aspect,
        slant=hand.slant + slant,
        tilt=hand.tilt + tilt,
        x=hand.x + x,
        y=hand.y + y,
    )


def _draw(strokes: tuple[Points, ...], hand: _Hand, size: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Draw one character, (size, size), from 0 for ink to 255 for paper."""
    unit = size / _USUAL_SIZE
    shaky = [stroke + rng.normal(0, hand.wobble, size=stroke.shape) for stroke in strokes]
    lines = _place([_curve(stroke, hand.roundness) for stroke in shaky], hand, size)
    inked = [_inked(line, hand, unit) for line in lines]
    points, radii = (np.concatenate(parts) for parts in zip(*inked, strict=True))  # (points, 2), (points,)
    offsets = (np.arange(size)[:, None, None] + 0.5 - points).astype(np.float32) ** 2  # (size, points, 2)
    distance = np.sqrt(offsets[:, None, :, 1] + offsets[None, :, :, 0])  # (size, size, points)
    depth = (radii.astype(np.float32) - distance).max(-1)  # (size, size)
    ink = np.clip(0.5 + depth, 0, 1)
    if hand.wall:
        ink -= np.clip(0.5 + depth - hand.wall * unit, 0, 1)
    return np.asarray(np.rint(255 * (1 - hand.darkness * ink)), dtype=np.uint8)


def _place(lines: list[Points], hand: _Hand, size: int) -> list[Points]:
    """Put the curves of a character, in [-1, 1]^2, where the hand writes them, in pixels; all of it on the paper."""
    narrow = 1 / (1 + 0.5 * abs(hand.slant))  # a slanted letter takes more room
    shear = np.array([[hand.facing * hand.aspect * narrow, -hand.slant * narrow], [0.0, 1.0]])
    turn = np.array([[np.cos(hand.tilt), -np.sin(hand.tilt)], [np.sin(hand.tilt), np.cos(hand.tilt)]])
    placed = [line @ (hand.scale * size / 2 * turn @ shear).T for line in lines]
    edge = hand.thickness * size / _USUAL_SIZE * (1 + hand.pressure / 2) / 2 + 0.5
    every = np.concatenate(placed)
    fit = min(1.0, float((size - 2 * edge) / np.ptp(every, axis=0).max()))
    centre = (0.5 + np.array([hand.x, hand.y])) * size
    centre = np.clip(centre, edge - fit * every.min(0), size - edge - fit * every.max(0))
    return [centre + fit * line for line in placed]


def _inked(line: Points, hand: _Hand, unit: float) -> tuple[Points, NDArray[np.float64]]:
    """Points of a curve that get ink, evenly spaced, (points, 2), and the radius of the pen there, (points,)."""
    walked = np.concatenate([[0.0], np.cumsum(np.linalg.norm(np.diff(line, axis=0), axis=1))])
    step = hand.gap * unit if hand.gap else _STEP
    along = np.linspace(0, walked[-1], max(2, round(walked[-1] / step) + 1))
    points = np.stack([np.interp(along, walked, line[:, axis]) for axis in (0, 1)], axis=1)
    swelling = np.sin(np.pi * np.linspace(0, 1, len(along))) - 2 / np.pi  # 0 on average
    return points, hand.thickness * unit / 2 * (1 + hand.pressure * swelling)
