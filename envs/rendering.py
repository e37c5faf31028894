"""Pictures of one step: who the user is, what was read, which pathways were on, and what that cost.

Two pure functions of a `Frame`: `ansi` for terminals and `rgb_array` for videos and slides. Both show the
reward as what it is, `-(loss + penalty)`, and the density beside it, because a mask that collapsed to all-on
or all-off looks healthy in the reward alone.
"""

from __future__ import annotations

import functools
import itertools
import math
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeGuard

import matplotlib
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

NO_DECISION = "no decision yet"
ANSI_WIDTH = 100
MIN_WIDTH, MIN_HEIGHT = 320, 180


@dataclass(frozen=True, eq=False)
class Frame:
    """What there is to see of one step.

    Attributes:
        user: The user's id.
        parts: Readable parts of the input, in order. The last one is the target that the loss scores; those
            before it are its context. For text: `{"prompt": ..., "continuation": ...}`. Empty parts
            are left out. Where room is short, the first of several keeps its end, the others their beginning. A
            part may be a picture, uint8 `(H, W)` or `(H, W, 3)`: all pictures are shown, side by side.
        mask: `(sites, pathways)` share of each pathway's parameters that is on at each site, 0..1.
        site_labels: One label per site, such as `"L0 attn"`.
        layers: Layer index of each site; neighbouring sites of one layer are drawn as a group.
        loss: In `unit`; None before the first step of an episode.
        penalty: In `unit`, `l0_penalty * active_parameters`; None before the first step.
        unit: Unit of loss, penalty and reward, such as `"nats per token"`.
        active_parameters: Adapter parameters the mask switches on; None before the first step.
        total_parameters: Adapter parameters there are.
        gates: The raw decision as text, such as `"01001000"`; may be empty.

    Raises:
        ValueError: If the shapes disagree, the mask leaves 0..1 or a picture is none.
    """

    user: str
    parts: dict[str, str | NDArray[np.uint8]]
    mask: NDArray[np.float32]
    site_labels: tuple[str, ...]
    layers: tuple[int, ...]
    loss: float | None
    penalty: float | None
    unit: str
    active_parameters: int | None
    total_parameters: int
    gates: str

    def __post_init__(self) -> None:
        if self.mask.ndim != 2 or 0 in self.mask.shape:
            raise ValueError(f"mask has shape {self.mask.shape}; expected (sites, pathways), at least (1, 1)")
        sites = self.mask.shape[0]
        if len(self.site_labels) != sites or len(self.layers) != sites:
            raise ValueError(
                f"mask has {sites} sites, but there are {len(self.site_labels)} site_labels and "
                f"{len(self.layers)} layers; expected one of each per site"
            )
        for name, part in self.parts.items():
            if not isinstance(part, str) and not _is_picture(part):
                kind = f"{part.dtype} of shape {part.shape}" if isinstance(part, np.ndarray) else type(part).__name__
                raise ValueError(f"parts[{name!r}]: {kind}; expected text or a picture, uint8 (H, W) or (H, W, 3)")
        if not bool(np.all((self.mask >= 0) & (self.mask <= 1))):
            raise ValueError(f"mask has values from {self.mask.min()} to {self.mask.max()}; expected 0..1")


@dataclass(frozen=True)
class _Outcome:
    """The numbers of a step that has been taken. Loss, penalty and reward in the unit."""

    loss: float
    penalty: float
    unit: str
    active: int
    total: int

    @property
    def reward(self) -> float:
        return -(self.loss + self.penalty)

    @property
    def density(self) -> str:
        return f"{100 * self.active / max(self.total, 1):.1f} %"


def _number(value: float, digits: int) -> str:
    return f"{value:,.{digits}f}" if abs(value) < 1e6 or not math.isfinite(value) else f"{value:.{digits}e}"


def _minus(text: str) -> str:
    """Typeset: a hyphen is too short for a minus."""
    return text.replace("-", "\N{MINUS SIGN}")


def _outcome(frame: Frame) -> _Outcome | None:
    if frame.loss is None or frame.penalty is None or frame.active_parameters is None:
        return None
    unit = _fit(_name(frame.unit), _LONGEST_UNIT, len)
    return _Outcome(frame.loss, frame.penalty, unit, frame.active_parameters, frame.total_parameters)


# ------------------------------------------------------------------------------------------------------- text

Measure = Callable[[str], float]
Keep = Literal["start", "end"]
# Characters. A user's text may be megabytes; these fill every picture.
_LONGEST_PART, _LONGEST_NAME, _LONGEST_UNIT = 4000, 400, 20


def _clean(text: str) -> str:
    """One line of printable text: users' data must not move the cursor or break an encoder."""
    # Cc: control (escape codes); Cf: format (bidi overrides); Cs: lone surrogates, which UTF-8 refuses.
    kinds = {"Cc": " ", "Zl": " ", "Zp": " ", "Cf": "", "Cs": "\N{REPLACEMENT CHARACTER}"}
    return " ".join("".join(kinds.get(unicodedata.category(char), char) for char in text).split())


def _name(text: str) -> str:
    """A clean user id, label or list of gates."""
    return _clean(text if len(text) <= _LONGEST_NAME else text[:_LONGEST_NAME] + "…")


def _columns(text: str) -> int:
    """Terminal columns that a text takes: two for wide characters, none for combining ones."""
    if text.isascii():
        return len(text)
    return sum(
        0 if unicodedata.combining(char) else 2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in text
    )


def _fit(text: str, width: float, measure: Measure, keep: Keep = "start") -> str:
    """The longest piece of `text` that fits `width`, with an ellipsis where it was cut."""
    if measure(text) <= width:
        return text

    def cut(length: int) -> str:
        return text[:length].rstrip() + "…" if keep == "start" else "…" + text[len(text) - length :].lstrip()

    low, high = 0, len(text)  # cut(low) fits (or nothing does), cut(high) does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if measure(cut(middle)) <= width else (low, middle)
    return cut(low)


def _words(text: str, width: float, measure: Measure) -> Iterator[str]:
    """Words no wider than `width`; longer ones, and scripts without spaces, are broken."""
    for word in text.split(" "):
        while len(word) > 1 and measure(word) > width:
            length = max(1, len(_fit(word, width, measure)) - 1)
            yield word[:length]
            word = word[length:]
        if word:
            yield word


def _wrap(text: str, width: float, lines: int, measure: Measure, keep: Keep = "start") -> list[str]:
    """At most `lines` lines of at most `width`; a longer text loses its end or (keep="end") its beginning."""
    longest = lines * (int(width / measure("l")) + 1)  # characters worth measuring
    piece = text[:longest] if keep == "start" else text[-longest:]
    wrapped: list[str] = []
    for word in _words(piece, width, measure):
        longer = f"{wrapped[-1]} {word}" if wrapped else word
        if wrapped and measure(longer) <= width:
            wrapped[-1] = longer
        else:
            wrapped.append(word)
    if len(wrapped) <= lines and len(piece) == len(text):
        return wrapped
    if keep == "start":
        return [*wrapped[: lines - 1], _fit(wrapped[lines - 1] + "…", width, measure)]
    if lines == 1:  # the last of the wrapped lines may be a single word
        return [_fit("…" + piece, width, measure, "end")]
    first, *others = wrapped[-lines:]
    return [_fit("…" + first, width, measure, "end"), *others]


class _Text(NamedTuple):
    """A part that holds text, clean. The target is what the loss scores; `keep` says which end outlives a cut."""

    name: str
    text: str
    target: bool
    keep: Keep


def _texts(frame: Frame, most: int) -> list[_Text]:
    """The last `most` parts that hold text."""
    last = next(reversed(frame.parts), None)
    shown: list[_Text] = []
    for name, text in frame.parts.items():
        if not isinstance(text, str):
            continue
        # What comes first is the past, whose end is nearest; a ranking or a model's text begins with what matters.
        keep: Keep = "start" if shown or name == last else "end"
        if len(text) > _LONGEST_PART:
            text = text[:_LONGEST_PART] + "…" if keep == "start" else "…" + text[-_LONGEST_PART:]
        if cleaned := _clean(text):
            shown.append(_Text(_name(name), cleaned, name == last, keep))
    return shown[-most:]


class _Picture(NamedTuple):
    """A part that is a picture."""

    name: str
    image: Image.Image
    target: bool


def _is_picture(part: Any) -> TypeGuard[NDArray[np.uint8]]:
    if not isinstance(part, np.ndarray) or part.dtype != np.uint8 or 0 in part.shape:
        return False
    return part.ndim == 2 or (part.ndim == 3 and part.shape[2] == 3)


def _pictures(frame: Frame) -> list[_Picture]:
    last = next(reversed(frame.parts), None)
    parts = frame.parts.items()
    return [_Picture(_name(name), Image.fromarray(part), name == last) for name, part in parts if _is_picture(part)]


def _layers(frame: Frame) -> Iterator[tuple[int, list[int]]]:
    """Each layer with its neighbouring sites, in the order of the sites."""
    for layer, sites in itertools.groupby(range(len(frame.layers)), key=frame.layers.__getitem__):
        yield layer, list(sites)


# ------------------------------------------------------------------------------------------------------- ansi

_RESET, _BOLD, _DIM, _CYAN = "\x1b[0m", "\x1b[1m", "\x1b[2m", "\x1b[36m"
_ON, _PARTLY, _OFF = ("█", "\x1b[32m"), ("▄", "\x1b[33m"), ("░", "\x1b[90m")
_GUTTER = 14


def ansi(frame: Frame) -> str:
    """Draws a frame for a terminal.

    Args:
        frame: What to draw.

    Returns:
        Lines of at most 100 columns with ANSI colours: the user, the parts of the input (context dim, target
        bold; pictures as blocks of at most 28 columns and 14 lines, dark pixels dense), the mask with one row per
        layer (full, half and empty blocks for pathways that are on, partly on and off), the gates, and the reward
        with its parts and their unit. No newline at the end.
    """
    sites, pathways = frame.mask.shape
    width = ANSI_WIDTH - _GUTTER
    lines = [_row("user", _style(_BOLD, _fit(_name(frame.user), width, _columns)))]
    for name, text, target, keep in _texts(frame, most=6):
        wrapped = _wrap(text, width, 4, _columns, keep)
        names = itertools.chain([_fit(name, _GUTTER - 1, _columns)], itertools.repeat(""))
        lines += [_row(next(names), _style(_BOLD if target else _DIM, line)) for line in wrapped]
    lines += _ansi_pictures(frame)
    lines += [_row("mask", _style(_DIM, f"{sites} sites x {pathways} pathways, P0 first"))]
    lines += _ansi_mask(frame)
    if frame.gates:
        lines.append(_row("gates", _fit(_name(frame.gates), width, _columns)))
    outcome = _outcome(frame)
    if outcome is None:
        lines.append(_row("reward", _style(_DIM, NO_DECISION)))
    else:
        lines += [
            _row("loss", f"{_number(outcome.loss, 4)} {outcome.unit}"),
            _row("penalty", f"{_number(outcome.penalty, 4)} {outcome.unit}"),
            _row("reward", _style(_BOLD, f"{_number(outcome.reward, 4)} {outcome.unit}")),
            _row("density", f"{outcome.density} on: {outcome.active:,} of {outcome.total:,} parameters"),
        ]
    return "\n".join(lines)


_SHADES = "@%#*+=-:. "
"""Ink to paper."""
_PICTURE_WIDTH, _PICTURE_HEIGHT, _PICTURES_PER_ROW = 28, 14, 3


def _ansi_pictures(frame: Frame) -> list[str]:
    """Pictures side by side under their names; what does not fit goes on in the next row."""
    pictures = _pictures(frame)
    lines: list[str] = []
    for first in range(0, len(pictures), _PICTURES_PER_ROW):
        names, blocks = "", []
        for name, image, target in pictures[first : first + _PICTURES_PER_ROW]:
            block = _ansi_picture(image)
            fitted = _fit(name, _PICTURE_WIDTH, _columns)
            width = max(len(block[0]), _columns(fitted))
            names += _style(_BOLD if target else _DIM, fitted) + " " * (width + 1 - _columns(fitted))
            blocks.append([row.ljust(width) for row in block])
        height = max(map(len, blocks))
        lines += [_row("", names.rstrip())]
        lines += [
            _row("", " ".join(block[y] if y < len(block) else " " * len(block[0]) for block in blocks))
            for y in range(height)
        ]
    return lines


def _ansi_picture(image: Image.Image) -> list[str]:
    """Lines of characters, each of which stands for a place twice as high as wide."""
    ratio = min(1.0, _PICTURE_WIDTH / image.width, 2 * _PICTURE_HEIGHT / image.height)
    size = max(1, round(ratio * image.width)), max(1, round(ratio * image.height / 2))
    grey = np.asarray(image.convert("L").resize(size, Image.Resampling.BOX), dtype=np.float32)
    shades = np.rint(grey / 255 * (len(_SHADES) - 1)).astype(int)
    return ["".join(_SHADES[shade] for shade in row) for row in shades.tolist()]


def _style(code: str, text: str) -> str:
    return f"{code}{text}{_RESET}"


def _row(name: str, text: str) -> str:
    return (_style(_CYAN, name) if name else "") + " " * (_GUTTER - _columns(name)) + text


def _ansi_mask(frame: Frame) -> list[str]:
    """One row per layer, its sites side by side; what does not fit goes on in the next row."""
    width = ANSI_WIDTH - _GUTTER
    names = [
        _fit(_clean(label.removeprefix(f"L{layer} ")), 20, _columns)
        for label, layer in zip(frame.site_labels, frame.layers, strict=True)
    ]
    label_width = max(map(_columns, names)) + 1
    gap = 3
    most_sites = max(len(sites) for _, sites in _layers(frame))
    pathways = frame.mask.shape[1]
    # Spaces between the pathways as long as that still puts a layer on one row.
    pitch = 2 if most_sites * (label_width + 2 * pathways + gap) <= width else 1
    per_row = (width - label_width) // pitch
    lines: list[str] = []
    for layer, sites in _layers(frame):
        row, used, start = "", 0, f"  L{layer}"
        for site in sites:
            for first in range(0, pathways, per_row):
                cells = frame.mask[site, first : first + per_row]
                size = label_width + pitch * len(cells)
                if used and used + gap + size > width:
                    lines.append(_row(start, row))
                    row, used, start = "", 0, ""
                name = names[site] if first == 0 else ""
                row += " " * (gap if used else 0) + name + " " * (label_width - _columns(name))
                row += _ansi_cells(cells, pitch)
                used += size + (gap if used else 0)
        lines.append(_row(start, row))
    return lines


def _ansi_cells(shares: NDArray[np.float32], pitch: int) -> str:
    kinds = [_ON if share >= 1 else _PARTLY if share > 0 else _OFF for share in shares.tolist()]
    return "".join(
        _style(colour, block.ljust(pitch) * len(list(run))) for (block, colour), run in itertools.groupby(kinds)
    )


# -------------------------------------------------------------------------------------------------- rgb_array

Colour = tuple[int, int, int]
_WHITE: Colour = (255, 255, 255)
_INK: Colour = (24, 33, 47)
_GREY: Colour = (118, 129, 145)
_RULE: Colour = (222, 227, 234)
_OFF_CELL: Colour = (236, 239, 244)
_LOW_CELL: Colour = (196, 219, 247)  # the least share that is on: clearly not off
_ON_CELL: Colour = (22, 84, 176)
_LOSS: Colour = (88, 104, 130)
_PENALTY: Colour = (233, 129, 46)


def rgb_array(frame: Frame, *, width: int = 960, height: int = 540) -> NDArray[np.uint8]:
    """Draws a frame as a picture.

    Args:
        frame: What to draw.
        width: Pixels, at least 320.
        height: Pixels, at least 180. Lettering follows the smaller of width / 960 and height / 540.

    Returns:
        `(height, width, 3)` RGB values. The same frame gives the same picture.

    Raises:
        ValueError: If the picture would be too small to draw.
    """
    if width < MIN_WIDTH or height < MIN_HEIGHT:
        raise ValueError(
            f"width, height = {width}, {height}: too small to draw; expected at least {MIN_WIDTH}, {MIN_HEIGHT}"
        )
    image = Image.new("RGB", (width, height), _WHITE)
    pen = _Pen(image, ImageDraw.Draw(image), min(width / 960, height / 540))
    left, right, bottom = pen.px(32), width - pen.px(32), height - pen.px(24)
    top = _draw_title(pen, frame, left, right)
    top = _draw_parts(pen, frame, left, right, top)
    split = left + round(0.62 * (right - left))
    _draw_mask(pen, frame, (left, top, split, bottom))
    _draw_reward(pen, frame, (split + pen.px(44), top, right, bottom))
    return np.asarray(image).copy()


@functools.lru_cache(maxsize=64)
def _font(name: str, size: int) -> ImageFont.FreeTypeFont:
    """A font that ships with matplotlib, so that pictures look alike on every machine."""
    path = Path(matplotlib.get_data_path(), "fonts", "ttf", f"{name}.ttf")
    # The other layout engine is not in every Pillow.
    return ImageFont.truetype(str(path), size, layout_engine=ImageFont.Layout.BASIC)


@dataclass(frozen=True)
class _Pen:
    """A drawing and the size of its lettering, relative to a picture of 960 x 540."""

    image: Image.Image
    draw: ImageDraw.ImageDraw
    scale: float

    def px(self, length: float) -> int:
        return max(1, round(length * self.scale))

    def font(self, size: float, face: str = "") -> ImageFont.FreeTypeFont:
        return _font(f"DejaVuSans{face}", max(6, self.px(size)))

    def text(
        self, x: float, y: float, text: str, font: ImageFont.FreeTypeFont, fill: Colour, anchor: str = "ls"
    ) -> None:
        self.draw.text((x, y), text, font=font, fill=fill, anchor=anchor)

    def box(self, left: int, top: int, right: int, bottom: int, fill: Colour) -> None:
        """Fills the pixels from left and top up to, not including, right and bottom."""
        if right > left and bottom > top:
            self.draw.rectangle((left, top, right - 1, bottom - 1), fill=fill)

    def picture(self, left: int, top: int, picture: Image.Image) -> None:
        """Pastes a picture, with an outline of one pixel around it: its paper may be as white as ours."""
        self.box(left - 1, top - 1, left + picture.width + 1, top + picture.height + 1, _RULE)
        self.image.paste(picture.convert("RGB"), (left, top))


def _draw_title(pen: _Pen, frame: Frame, left: int, right: int) -> int:
    """The user at the left, the raw decision at the right. Returns where the next block begins."""
    baseline, small, large = pen.px(46), pen.font(14), pen.font(24, "-Bold")
    mono = pen.font(14, "Mono")
    name_at = left + round(small.getlength("user")) + pen.px(10)
    gates = _fit(_name(frame.gates), 0.42 * (right - left), mono.getlength)
    gates_at = right - round(mono.getlength(gates))
    pen.text(left, baseline, "user", small, _GREY)
    pen.text(name_at, baseline, _fit(_name(frame.user), 0.4 * (right - left), large.getlength), large, _INK)
    if gates:
        pen.text(gates_at, baseline, gates, mono, _INK)
        pen.text(gates_at - pen.px(10), baseline, "gates", small, _GREY, "rs")
    rule = pen.px(62)
    pen.box(left, rule, right, rule + pen.px(1), _RULE)
    return rule + pen.px(16)


_ALL_LINES = 6
_MOST_LINES = {0: (), 1: (4,), 2: (3, 2), 3: (4, 3, 2), 4: (1, 1, 1, 2)}
"""Lines of each text by the number of texts; more than six together would leave the reward no room."""


def _share_lines(texts: list[_Text], most: tuple[int, ...], width: float, measure: Measure) -> list[list[str]]:
    """Wraps texts: the last takes the lines it needs first, and each leaves one for every text above it."""
    wrapped: list[list[str]] = []
    room = _ALL_LINES
    for above in reversed(range(len(texts))):
        text = texts[above]
        wrapped.insert(0, _wrap(text.text, width, min(most[above], room - above), measure, text.keep))
        room -= len(wrapped[0])
    return wrapped


def _draw_parts(pen: _Pen, frame: Frame, left: int, right: int, top: int) -> int:
    """The input's parts, wrapped, their names in a gutter. Returns where the next block begins."""
    pictures = _pictures(frame)
    texts = _texts(frame, most=2 if pictures else 4)
    if not texts and not pictures:
        return top + pen.px(2)
    font, small, pitch = pen.font(16), pen.font(13), pen.px(23)
    text_at = left + pen.px(124)
    baseline = top + pen.px(15)
    most = (1, 1) if pictures else _MOST_LINES[len(texts)]
    for text, lines in zip(texts, _share_lines(texts, most, right - text_at, font.getlength), strict=True):
        pen.text(left, baseline, _fit(text.name, pen.px(112), small.getlength), small, _GREY)
        for line in lines:
            pen.text(text_at, baseline, line, font, _INK if text.target else _GREY)
            baseline += pitch
        baseline += pen.px(6)
    if pictures:
        # No lower than six lines of text reach, so that the reward below always has its room.
        return _draw_pictures(pen, pictures, (text_at, baseline, right, top + pen.px(164))) + pen.px(16)
    return baseline - pitch + pen.px(20)


def _draw_pictures(pen: _Pen, pictures: list[_Picture], area: tuple[int, int, int, int]) -> int:
    """Pictures side by side under their names, whose baseline is the area's top. Returns where they end.

    Pixels become squares of whole pixels; only a picture too large for its place is made smaller.
    """
    left, baseline, right, bottom = area
    small, top = pen.font(13), baseline + pen.px(7)
    place = (right - left) / len(pictures)
    gap = min(pen.px(16), int(place / 4))
    x, end = left, top
    for name, image, target in pictures:
        most = max(1, int(place) - gap)
        ratio = min(most / image.width, max(1, bottom - top) / image.height)
        ratio = math.floor(ratio) if ratio >= 1 else ratio
        size = max(1, round(ratio * image.width)), max(1, round(ratio * image.height))
        fitted = _fit(name, most, small.getlength)
        x = min(x, right - size[0])
        pen.text(x, baseline, fitted, small, _INK if target else _GREY)
        pen.picture(x, top, image.resize(size, Image.Resampling.NEAREST if ratio >= 1 else Image.Resampling.BOX))
        x += gap + max(size[0], min(most, math.ceil(small.getlength(fitted))))
        end = max(end, top + size[1])
    return end


def _shade(share: float) -> Colour:
    if share <= 0:
        return _OFF_CELL
    red, green, blue = (round(a + share * (b - a)) for a, b in zip(_LOW_CELL, _ON_CELL, strict=True))
    return red, green, blue


def _draw_mask(pen: _Pen, frame: Frame, area: tuple[int, int, int, int]) -> None:
    """The mask as a heat map: rows are sites grouped by layer, columns are pathways."""
    left, top, right, bottom = area
    small = pen.font(12)
    heading, top = top + pen.px(14), top + pen.px(48)
    pen.text(left, heading, "Mask", pen.font(15, "-Bold"), _INK)
    sites, pathways = frame.mask.shape
    groups = list(_layers(frame))
    labels = [_fit(_name(label), pen.px(120), small.getlength) for label in frame.site_labels]
    gutter = round(max(small.getlength(text) for text in [*labels, "L00"])) + pen.px(12)
    # The space between layers shrinks before the cells do.
    between = min(pen.px(6), int(0.2 * (bottom - top) / len(groups)))
    cell_height = min(pen.px(34.0), (bottom - top - between * (len(groups) - 1)) / sites)
    cell_width = min(pen.px(60.0), (right - left - gutter) / pathways)
    # Whole pixels make a neat grid; where there are hardly any to share out, let the cells differ by one.
    cell_height, cell_width = (math.floor(size) if size >= 3 else size for size in (cell_height, cell_width))
    space = 0 if min(cell_height, cell_width) < 4 else 1 if min(cell_height, cell_width) < 14 else 2
    xs = [left + gutter + round(column * cell_width) for column in range(pathways + 1)]
    ys = [top + round(site * cell_height) + group * between for group, (_, of) in enumerate(groups) for site in of]

    _draw_legend(pen, max(xs[-1] - space, left + pen.px(220)), heading, small)
    step = math.ceil((small.getlength(f"P{pathways - 1}") + pen.px(4)) / cell_width)
    for column in range(0, pathways, step):
        centre = (xs[column] + xs[column + 1] - space) / 2
        pen.text(centre, top - pen.px(6), f"P{column}", small, _GREY, "ms")
    for y, shares in zip(ys, frame.mask.tolist(), strict=True):
        for column, share in enumerate(shares):
            end = max(xs[column] + 1, xs[column + 1] - space)
            pen.box(xs[column], y, end, max(y + 1, y + round(cell_height) - space), _shade(share))

    line = small.size
    label_at = left + gutter - pen.px(8)
    if cell_height >= line:
        rows = [(y + cell_height / 2, label) for y, label in zip(ys, labels, strict=True)]
    else:  # too many rows to name each: name the layers, as many as there is room for
        rows = [((ys[of[0]] + ys[of[-1]] + cell_height) / 2, f"L{layer}") for layer, of in groups]
        rows = rows[:: math.ceil(line * len(rows) / (bottom - top))]
    for centre, label in rows:
        pen.text(label_at, centre - space / 2, label, small, _GREY, "rm")


def _draw_legend(pen: _Pen, right: int, baseline: int, font: ImageFont.FreeTypeFont) -> None:
    size, steps = pen.px(11), 5
    pen.text(right, baseline, "all on", font, _GREY, "rs")
    x = right - round(font.getlength("all on")) - pen.px(6) - steps * size
    pen.text(x - pen.px(6), baseline, "off", font, _GREY, "rs")
    for step in range(steps):
        pen.box(x + step * size, baseline - size, x + (step + 1) * size, baseline, _shade(step / (steps - 1)))


def _ceiling(value: float) -> float:
    """The next round number, of few, so that the axis seldom changes between the frames of a video."""
    if not 1e-300 < value < 1e300:
        return 1.0
    unit = 10.0 ** math.floor(math.log10(value))
    return next(step * unit for step in (1, 2, 3, 4, 6, 8, 10, 20) if value <= step * unit)


def _draw_reward(pen: _Pen, frame: Frame, area: tuple[int, int, int, int]) -> None:
    """The reward, its two parts as a stacked bar, and the density."""
    left, top, right, _ = area
    heading, small, body = pen.font(15, "-Bold"), pen.font(12), pen.font(14)
    outcome = _outcome(frame)
    pen.text(left, top + pen.px(14), "Reward", heading, _INK)
    if outcome is None:
        pen.box(left, top + pen.px(30), right, top + pen.px(94), _OFF_CELL)
        pen.text((left + right) / 2, top + pen.px(62), NO_DECISION, body, _GREY, "mm")
        return
    large = pen.font(34, "-Bold")
    room = right - left - pen.px(16) - body.getlength(outcome.unit)
    reward = _fit(_minus(_number(outcome.reward, 3)), room, large.getlength)
    baseline = top + pen.px(58)
    pen.text(left, baseline, reward, large, _INK)
    pen.text(left + large.getlength(reward) + pen.px(8), baseline, outcome.unit, body, _GREY)
    y = baseline + pen.px(20)
    _draw_stack(pen, outcome, left, right, y)
    y += pen.px(68)
    for name, value, colour in (("loss", outcome.loss, _LOSS), ("penalty", outcome.penalty, _PENALTY)):
        pen.box(left, y - pen.px(11), left + pen.px(11), y, colour)
        pen.text(left + pen.px(19), y, name, body, _GREY)
        pen.text(right, y, _minus(_number(value, 3)), body, _INK, "rs")
        y += pen.px(23)
    y += pen.px(20)
    pen.text(left, y, "Density", heading, _INK)
    pen.text(right, y, outcome.density, heading, _INK, "rs")
    y += pen.px(10)
    share = min(max(outcome.active / max(outcome.total, 1), 0.0), 1.0)
    pen.box(left, y, right, y + pen.px(10), _OFF_CELL)
    pen.box(left, y, left + math.ceil(share * (right - left)), y + pen.px(10), _ON_CELL)
    y += pen.px(29)
    count = f"{outcome.active:,} of {outcome.total:,} parameters on"
    pen.text(left, y, _fit(count, right - left, small.getlength), small, _GREY)


def _draw_stack(pen: _Pen, outcome: _Outcome, left: int, right: int, top: int) -> None:
    """Loss and penalty end to end from zero, negative parts to its left, over an axis."""
    parts = [(value, colour) for value, colour in ((outcome.loss, _LOSS), (outcome.penalty, _PENALTY))]
    if not math.isfinite(outcome.reward):
        parts = []  # a bar of what is left would look like a result
    above = sum(max(value, 0.0) for value, _ in parts)
    below = -sum(min(value, 0.0) for value, _ in parts)
    end_of_axis = _ceiling(max(above, below))
    high = end_of_axis if above or not below else 0.0
    low = -end_of_axis if below else 0.0
    bottom, small = top + pen.px(24), pen.font(12)

    def at(value: float) -> int:
        return left + round((min(value, high) - low) / (high - low) * (right - left))

    pen.box(left, top, right, bottom, _OFF_CELL)
    ends = [at(0.0), at(0.0)]  # where the next positive and the next negative part begin
    sums = [0.0, 0.0]
    for value, colour in parts:
        side = int(value < 0)
        sums[side] += value
        end = at(max(sums[side], low))
        if value and end == ends[side]:
            end += 1 - 2 * side  # too little to see is not nothing
        pen.box(min(end, ends[side]), top, max(end, ends[side]), bottom, colour)
        ends[side] = end
    ticks = sorted({low, 0.0, high} | ({high / 2} if not below else set()))
    for tick in ticks:
        x = min(at(tick), right - 1)
        pen.box(x, bottom, x + 1, bottom + pen.px(4), _GREY)
        anchor = "ls" if tick == ticks[0] else "rs" if tick == ticks[-1] else "ms"
        pen.text(x, bottom + pen.px(17), _minus(f"{tick:g}"), small, _GREY, anchor)
