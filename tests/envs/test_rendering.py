"""Pictures of a step: they show what happened, and no user's text, mask or number breaks them."""

from __future__ import annotations

import math
import re
import unicodedata
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from dsa_gym.envs.rendering import ANSI_WIDTH, NO_DECISION, Frame, ansi, rgb_array

PROMPT = "I went down to the harbour this morning, and the fishermen told me"
CONTINUATION = "the storm would pass before noon."
LONG = "The quick brown fox jumps over the lazy dog. " * 5000
# Control characters, right-to-left, wide, combining, unassigned, a lone surrogate: whatever users write.
STRANGE = "été 用户\t\n\r\x1b[31m\x00 שלום مرحبا \N{RIGHT-TO-LEFT OVERRIDE}e\u0301\u0378 \N{PILE OF POO} \ud800"


def make_frame(layers: int = 4, per_layer: int = 2, pathways: int = 8, **changes: Any) -> Frame:
    sites = layers * per_layer
    names = ("attn", "ffn", "cross", "out")
    mask = (np.random.default_rng(0).random((sites, pathways)) < 0.3).astype(np.float32)
    arguments: dict[str, Any] = {
        "user": "ann_0042",
        "parts": {"prompt": PROMPT, "continuation": CONTINUATION},
        "mask": mask,
        "site_labels": tuple(f"L{layer} {names[i % 4]}" for layer in range(layers) for i in range(per_layer)),
        "layers": tuple(layer for layer in range(layers) for _ in range(per_layer)),
        "loss": 4.4321,
        "penalty": 0.0721,
        "unit": "nats per token",
        "active_parameters": 16_384,
        "total_parameters": 131_072,
        "gates": "01001000",
    }
    return Frame(**(arguments | changes))


def picture(height: int, width: int, *channels: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (height, width, *channels), dtype=np.uint8)


TITLES = [f"The Lantern of Harbour Street {i} (19{50 + i})" for i in range(10)]
PICTURES: dict[str, Any] = {
    "condition": "Latin/a",
    "noised": picture(28, 28, seed=1),
    "denoised": picture(28, 28, seed=2),
    "image": picture(28, 28, seed=3),
}
UNDECIDED: dict[str, Any] = {"loss": None, "penalty": None, "active_parameters": None, "gates": ""}
FRAMES = {
    "usual": make_frame(),
    "before the first step": make_frame(**UNDECIDED),
    "one site, one pathway": make_frame(1, 1, 1),
    "64 sites, 32 pathways": make_frame(32, 2, 32, gates="granularity component: 31 of 256 on"),
    "64 sites in one layer": make_frame(1, 64, 32),
    "more pathways than columns": make_frame(2, 2, 700),
    "long texts": make_frame(
        user=LONG, parts={"prompt": LONG, "continuation": LONG}, gates="01" * 500, site_labels=(LONG,) * 8
    ),
    "no spaces": make_frame(parts={"prompt": "x" * 9000, "continuation": "お" * 9000}),
    "strange characters": make_frame(
        user=STRANGE, parts={STRANGE: STRANGE, "b": STRANGE}, gates=STRANGE, site_labels=(STRANGE,) * 8
    ),
    "no parts": make_frame(parts={}),
    "empty part": make_frame(parts={"prompt": "", "continuation": " \n"}),
    "many parts": make_frame(parts={f"item {i}": f"film {i}" for i in range(30)}),
    "three lists": make_frame(parts={name: "; ".join(TITLES) for name in ("history", "top 10", "next")}),
    "pictures": make_frame(parts=PICTURES),
    "a picture before the first step": make_frame(
        parts={"condition": "Latin/a", "image": picture(28, 28)}, **UNDECIDED
    ),
    "pictures of all sizes": make_frame(
        parts={"a": picture(1, 1), "b": picture(300, 700, 3), "c": picture(700, 2), "d": picture(2, 700, 3)}
    ),
    "many pictures": make_frame(parts={"a": LONG, "b": LONG} | {f"p{i}": picture(28, 28, 3) for i in range(30)}),
    "a picture of a strange name": make_frame(parts={STRANGE: picture(9, 9), LONG: picture(9, 9), "": picture(9, 9)}),
    "a picture, then text": make_frame(parts={"image": picture(28, 28, 3), "caption": LONG}),
    "empty user": make_frame(user="", gates=""),
    "no parameters": make_frame(loss=0.0, penalty=0.0, active_parameters=0, total_parameters=0),
    "negative loss": make_frame(loss=-3.0),
    "not a number": make_frame(loss=math.nan),
    "infinite": make_frame(loss=math.inf),
    "huge": make_frame(loss=1e300, penalty=1e300, active_parameters=10**15, total_parameters=10**15),
    "minute": make_frame(loss=5e-324, penalty=0.0),
}
every_frame = pytest.mark.parametrize("frame", FRAMES.values(), ids=FRAMES.keys())


def plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def columns(line: str) -> int:
    return sum(0 if unicodedata.combining(char) else 1 + (unicodedata.east_asian_width(char) in "WF") for char in line)


@every_frame
def test_picture_has_its_shape_and_is_deterministic(frame: Frame) -> None:
    picture = rgb_array(frame)
    assert picture.shape == (540, 960, 3)
    assert picture.dtype == np.uint8
    assert picture.flags.writeable
    np.testing.assert_array_equal(picture, rgb_array(replace(frame, mask=frame.mask.copy())))
    border = np.concatenate([picture[:, :4], picture[:, -4:]], axis=1)
    assert (border == 255).all(), "something runs over the edge"


@every_frame
@pytest.mark.parametrize("size", [(320, 180), (1920, 1080), (400, 900), (1600, 180)])
def test_picture_of_any_size(frame: Frame, size: tuple[int, int]) -> None:
    width, height = size
    assert rgb_array(frame, width=width, height=height).shape == (height, width, 3)


@pytest.mark.parametrize("size", [(319, 540), (960, 179), (0, 0), (-1, 540)])
def test_picture_too_small_to_draw(size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=f"{size[0]}, {size[1]}: too small"):
        rgb_array(make_frame(), width=size[0], height=size[1])


@pytest.mark.parametrize("shape", [(4, 2, 8), (32, 2, 32), (1, 1, 1)])
def test_every_cell_of_the_mask_is_seen(shape: tuple[int, int, int]) -> None:
    off = make_frame(*shape)
    off = replace(off, mask=np.zeros_like(off.mask))
    blank = rgb_array(off)
    cells = [np.unravel_index(i, off.mask.shape) for i in np.linspace(0, off.mask.size - 1, 9, dtype=int)]
    seen = set()
    for cell in set(cells):
        for share in (0.02, 0.5, 1.0):
            mask = off.mask.copy()
            mask[cell] = share
            changed = rgb_array(replace(off, mask=mask)) != blank
            assert changed.any()
            seen.add((share, changed.tobytes()))
    assert len({bytes_ for _, bytes_ in seen}) >= len(set(cells)), "two cells share their pixels"


@pytest.mark.parametrize(
    "change",
    [
        {"user": "bob"},
        {"parts": {"prompt": PROMPT, "continuation": "something else"}},
        {"parts": {"prompt": "something else", "continuation": CONTINUATION}},
        {"parts": PICTURES},
        {"loss": 3.0},
        {"penalty": 0.5},
        {"active_parameters": 20_000},
        {"gates": "11111111"},
        UNDECIDED,
    ],
)
def test_every_field_is_seen(change: dict[str, Any]) -> None:
    frame = make_frame()
    assert (rgb_array(frame) != rgb_array(replace(frame, **change))).any()
    assert ansi(frame) != ansi(replace(frame, **change))


@every_frame
def test_terminal_lines_are_narrow_and_safe(frame: Frame) -> None:
    text = ansi(frame)
    assert text == ansi(frame)
    text.encode("utf-8")
    for line in text.split("\n"):
        assert columns(plain(line)) <= ANSI_WIDTH
        # The colours are ours and are ended; nothing of the user's moves the cursor.
        assert not any(unicodedata.category(char) in ("Cc", "Cf", "Cs") for char in plain(line))
        assert line.count("\x1b[0m") == line.count("\x1b[") / 2


def test_terminal_shows_everything() -> None:
    text = plain(ansi(make_frame()))
    for piece in ("ann_0042", PROMPT, CONTINUATION, "01001000", "L0", "L3", "attn", "ffn"):
        assert piece in text
    for number in ("4.4321", "0.0721", "-4.5042", "12.5 %", "16,384", "131,072"):
        assert number in text


def test_terminal_dims_the_context_and_makes_the_target_bold() -> None:
    text = ansi(make_frame())
    assert f"\x1b[2m{PROMPT}\x1b[0m" in text
    assert f"\x1b[1m{CONTINUATION}\x1b[0m" in text


@pytest.mark.parametrize("shape", [(4, 2, 8), (1, 1, 1), (32, 2, 32), (2, 4, 32), (2, 2, 700)])
def test_terminal_mask_is_the_mask(shape: tuple[int, int, int]) -> None:
    frame = make_frame(*shape)
    mask = frame.mask * np.random.default_rng(1).choice(np.array([0.5, 1], np.float32), frame.mask.shape)
    blocks = re.findall("[█▄░]", plain(ansi(replace(frame, mask=mask))))
    shares = {"█": 1.0, "▄": 0.5, "░": 0.0}
    np.testing.assert_array_equal(np.array([shares[block] for block in blocks]), mask.ravel())


def test_nothing_decided_yet() -> None:
    text = plain(ansi(make_frame(**UNDECIDED)))
    assert NO_DECISION in text
    assert PROMPT in text
    for absent in ("None", "nats per token", "gates", "density"):
        assert absent not in text


def test_long_context_keeps_its_end_and_long_target_its_beginning() -> None:
    context = "BEGINNING " + LONG + " NEARBY"
    target = "FIRST " + LONG + " LAST"
    text = plain(ansi(make_frame(parts={"prompt": context, "continuation": target})))
    assert text.count("…") == 2
    assert "NEARBY" in text and "FIRST" in text
    assert "BEGINNING" not in text and "LAST" not in text


def test_long_text_costs_no_more_than_what_is_shown() -> None:
    short, long = "word " * 2000, "word " * 200_000
    first = make_frame(parts={"prompt": short, "continuation": short})
    second = make_frame(parts={"prompt": long, "continuation": long})
    np.testing.assert_array_equal(rgb_array(first), rgb_array(second))
    assert ansi(first) == ansi(second)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mask": np.zeros(8, np.float32)}, "mask has shape"),
        ({"mask": np.zeros((8, 0), np.float32)}, "mask has shape"),
        ({"mask": np.zeros((7, 8), np.float32)}, "mask has 7 sites, but there are 8 site_labels"),
        ({"layers": (0, 1)}, "2 layers"),
        ({"parts": {"image": picture(8, 8).astype(np.float32)}}, r"parts\['image'\]: float32 of shape \(8, 8\)"),
        ({"parts": {"image": picture(8, 8, 4)}}, r"uint8 of shape \(8, 8, 4\); expected text or a picture"),
        ({"parts": {"image": picture(8, 8, 1)}}, r"shape \(8, 8, 1\)"),
        ({"parts": {"image": picture(1, 8, 8, 3)}}, r"shape \(1, 8, 8, 3\)"),
        ({"parts": {"image": picture(8, 0)}}, r"shape \(8, 0\)"),
        ({"parts": {"prompt": PROMPT, "image": None}}, r"parts\['image'\]: NoneType"),
        ({"mask": np.full((8, 8), 1.5, np.float32)}, r"1\.5; expected 0\.\.1"),
        ({"mask": np.full((8, 8), np.nan, np.float32)}, r"expected 0\.\.1"),
    ],
)
def test_frames_that_make_no_sense(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(make_frame(), **change)


@settings(max_examples=40)
@given(user=st.text(max_size=40), prompt=st.text(max_size=300), continuation=st.text(max_size=300))
def test_any_text(user: str, prompt: str, continuation: str) -> None:
    frame = make_frame(user=user, parts={"prompt": prompt, "continuation": continuation})
    assert rgb_array(frame, width=320, height=180).shape == (180, 320, 3)
    assert max(columns(line) for line in plain(ansi(frame)).split("\n")) <= ANSI_WIDTH


def contains(whole: NDArray[np.uint8], piece: NDArray[np.uint8]) -> bool:
    height, width = piece.shape[:2]
    starts = (whole[: 1 - height or None, : 1 - width or None] == piece[0, 0]).all(-1)
    ends = (whole[height - 1 :, width - 1 :] == piece[-1, -1]).all(-1)
    corners = np.argwhere(starts & ends)
    return any(np.array_equal(whole[y : y + height, x : x + width], piece) for y, x in corners)


@pytest.mark.parametrize(
    ("size", "scale"), [((960, 540), 4), ((320, 180), 1), ((1920, 1080), 8), ((400, 900), 1), ((640, 360), 2)]
)
def test_pictures_are_drawn_pixel_by_pixel(size: tuple[int, int], scale: int) -> None:
    whole = rgb_array(make_frame(parts=PICTURES), width=size[0], height=size[1])
    for name in ("noised", "denoised", "image"):
        enlarged = np.kron(PICTURES[name], np.ones((scale, scale), np.uint8))
        assert contains(whole, np.repeat(enlarged[..., None], 3, axis=2)), name


def test_picture_keeps_its_colours_and_its_shape() -> None:
    image = picture(10, 35, 3)
    enlarged = image.repeat(6, axis=0).repeat(6, axis=1)  # 241 pixels wide is the place of each
    assert contains(rgb_array(make_frame(parts={"one": image, "two": picture(20, 5), "image": image})), enlarged)


@pytest.mark.parametrize("texts", [0, 1, 2])
@pytest.mark.parametrize("shape", [(28, 28), (1, 1), (512, 512, 3), (700, 2), (31, 17)])
def test_pictures_leave_the_reward_its_room(texts: int, shape: tuple[int, ...]) -> None:
    parts: dict[str, Any] = {f"text {i}": LONG for i in range(texts)} | {"image": picture(*shape)}
    drawn = rgb_array(make_frame(parts=parts))
    assert (drawn[-20:] == 255).all(), "something runs over the lower edge"


def picture_lines(text: str, rows: int) -> list[str]:
    lines = plain(text).split("\n")
    end = next(i for i, line in enumerate(lines) if line.startswith("mask"))
    return lines[end - rows - 1 : end]


def test_terminal_pictures_stand_side_by_side_under_their_names() -> None:
    white, black = np.full((28, 28), 255, np.uint8), np.zeros((28, 28, 3), np.uint8)
    half = np.vstack([black[:14], np.full((14, 28, 3), 255, np.uint8)])
    text = ansi(make_frame(parts={"condition": "Latin/a", "black": black, "white": white, "half": half}))
    names, *rows = picture_lines(text, 14)
    starts = [names.index(name) for name in ("black", "white", "half")]
    for y, row in enumerate(rows):
        assert [row[x : x + 28] for x in starts] == ["@" * 28, " " * 28, ("@" if y < 7 else " ") * 28]
        assert row in text.split("\n"), "a picture holds escape codes"
    assert "Latin/a" in text


def test_terminal_pictures_of_several_heights_stay_in_their_columns() -> None:
    low, high = np.zeros((4, 28), np.uint8), np.zeros((56, 10), np.uint8)
    names, *rows = picture_lines(ansi(make_frame(parts={"low": low, "the high one": high, "low again": low})), 14)
    for name, lines in (("low", 2), ("the high one", 14), ("low again", 2)):
        inked = [row[names.index(name)] == "@" for row in rows]
        assert inked == [True] * lines + [False] * (14 - lines)


@settings(max_examples=30)
@given(st.lists(st.tuples(st.integers(1, 90), st.integers(1, 90), st.booleans()), min_size=1, max_size=3))
def test_terminal_pictures_of_any_size(shapes: list[tuple[int, int, bool]]) -> None:
    parts = {f"p{i}": np.zeros((h, w, 3) if colour else (h, w), np.uint8) for i, (h, w, colour) in enumerate(shapes)}
    lines = plain(ansi(make_frame(parts=parts))).split("\n")
    start = next(i for i, line in enumerate(lines) if "p0" in line)
    end = next(i for i, line in enumerate(lines) if line.startswith("mask"))
    assert all(f"p{i}" in lines[start] for i in range(len(shapes)))
    assert 1 <= end - start - 1 <= 14
    assert max(len(run) for line in lines[start + 1 : end] for run in line.split()) <= 28


def test_all_pictures_are_shown_even_of_the_same_name() -> None:
    parts: dict[str, Any] = {"image" + "\t" * i: np.zeros((2, 2), np.uint8) for i in range(7)}
    assert plain(ansi(make_frame(parts=parts))).count("image") == 7
    assert (rgb_array(make_frame(parts=parts)) != rgb_array(make_frame(parts=dict(list(parts.items())[1:])))).any()


def test_ranking_between_history_and_target_keeps_its_beginning() -> None:
    parts: dict[str, Any] = {
        "history": "OLDEST; " + LONG + "NEWEST",
        "top 10": "FIRST; " + LONG + "; LAST",
        "next": "TARGET",
    }
    text = plain(ansi(make_frame(parts=parts)))
    for shown in ("NEWEST", "FIRST", "TARGET"):
        assert shown in text
    for cut in ("OLDEST", "LAST"):
        assert cut not in text


def test_three_lists_share_the_lines_there_are() -> None:
    def drawn(history: str, ranking: str) -> NDArray[np.uint8]:
        return rgb_array(make_frame(parts={"history": history, "top 10": ranking, "next": TITLES[0]}))

    titles = [title.removeprefix("The ")[:20] for title in TITLES]
    whole = drawn("; ".join(titles), "; ".join(titles))
    for i in range(len(titles)):
        changed = "; ".join([*titles[:i], titles[i].upper(), *titles[i + 1 :]])
        assert (drawn("; ".join(titles), changed) != whole).any(), f"place {i + 1} of the ranking is not seen"
        if i >= 5:
            assert (drawn(changed, "; ".join(titles)) != whole).any(), f"place {i + 1} of the history is not seen"
