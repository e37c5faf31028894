"""Hands: the same seed gives the same drawings; characters and styles can both be read from the pictures."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsa_gym.generators import hands
from dsa_gym.generators.hands import STYLES, HandConfig, draw_hands, style_of, write_hands

SMALL = HandConfig(users=6, characters=9, per_user=7, size=20, odd=0.5, seed=2)
PLAIN = HandConfig(users=40, characters=20, per_user=20, seed=1)
ODD = replace(PLAIN, users=72, odd=0.9, seed=2)


def ink_of(drawings):
    return 1 - drawings.image / 255


@pytest.fixture(scope="module")
def plain():
    return draw_hands(PLAIN)


@pytest.fixture(scope="module")
def odd():
    return draw_hands(ODD)


@pytest.fixture(scope="module")
def usual(plain):
    """Mean ordinary picture of every character."""
    return {name: ink_of(plain)[plain.condition == name].mean(0) for name in np.unique(plain.condition)}


def number_of(name):
    return int(name.rpartition("-")[2])


def features(picture, usual):
    """Amount, width, place and lean of the ink, and its likeness to the usual picture and to that in a mirror."""
    total = picture.sum()
    edges = np.abs(np.diff(picture, axis=0)).sum() + np.abs(np.diff(picture, axis=1)).sum()
    y, x = np.mgrid[: len(picture), : len(picture)] / len(picture)
    cx, cy = (picture * x).sum() / total, (picture * y).sum() / total
    across, along = (picture * (x - cx) * (y - cy)).sum() / total, (picture * (y - cy) ** 2).sum() / total
    ordinary = usual - usual.mean()
    like = [float(((picture - picture.mean()) * other).sum()) for other in (ordinary, ordinary[:, ::-1])]
    lean = across / along - ((usual * (x - 0.5) * (y - 0.5)).sum() / (usual * (y - 0.5) ** 2).sum())
    return [
        np.log(total / usual.sum()),
        total / edges,
        picture.max(),
        cx,
        cy,
        np.clip(lean, -2, 2),
        along,
        np.sign(like[0] - like[1]),
    ]


def nearest(points, centres):
    """Index of the nearest of some centres for each of some points."""
    return np.argmin(((points[:, None] - centres) ** 2).sum(-1), axis=1)


def test_same_config_gives_the_same_drawings():
    first, second, other = draw_hands(SMALL), draw_hands(SMALL), draw_hands(replace(SMALL, seed=3))
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))
    assert np.array_equal(first.user, other.user)
    assert not np.array_equal(first.image, other.image)


def test_a_writer_does_not_depend_on_the_number_of_writers():
    few, many = draw_hands(replace(SMALL, users=2)), draw_hands(SMALL)
    assert all(np.array_equal(a, b[: len(a)]) for a, b in zip(few, many, strict=True))


@settings(max_examples=25, deadline=None)
@given(
    users=st.integers(1, 3),
    characters=st.integers(1, 12),
    per_user=st.integers(1, 15),
    size=st.integers(16, 64),
    odd=st.floats(0, 1),
    seeds=st.tuples(st.integers(0, 2**70), st.integers(0, 5)),
)
def test_every_population_is_well_formed(users, characters, per_user, size, odd, seeds):
    drawings = draw_hands(HandConfig(users, characters, per_user, size, odd, *seeds))
    count = users * per_user
    assert drawings.image.shape == (count, size, size)
    assert drawings.image.dtype == np.uint8
    assert drawings.user.shape == drawings.condition.shape == (count,)
    assert drawings.user.dtype.kind == drawings.condition.dtype.kind == "U"
    for picture in ink_of(drawings):
        assert 0.4 < picture.max() <= 1
        assert 0.003 < picture.mean() < 0.6
        frame = np.concatenate([picture[0], picture[-1], picture[:, 0], picture[:, -1]])
        assert frame.max() < 0.6  # nothing is cut off at the edge
    for user in np.unique(drawings.user):
        drawn = np.unique(drawings.condition[drawings.user == user], return_counts=True)[1]
        assert len(drawn) == min(characters, per_user)
        assert np.ptp(drawn) <= 1


def test_writers_draw_different_characters_in_different_orders():
    drawings = draw_hands(replace(PLAIN, users=5, per_user=12))
    chosen = [tuple(drawings.condition[drawings.user == user]) for user in np.unique(drawings.user)]
    assert len({frozenset(names) for names in chosen}) == len(chosen)
    assert all(list(names) != sorted(names) for names in chosen)


def test_characters_are_readable_in_ordinary_hands(plain, usual):
    """Pictures of half of the writers, averaged, name the characters of the others; chance is 1/20."""
    known = np.array([number_of(user) % 2 == 0 for user in plain.user])
    names = np.array(list(usual))
    centres = np.array([ink_of(plain)[known & (plain.condition == name)].mean(0).ravel() for name in names])
    guesses = names[nearest(ink_of(plain)[~known].reshape(-1, centres.shape[1]), centres)]
    assert np.mean(guesses == plain.condition[~known]) > 0.9


def test_the_script_is_the_same_for_other_people(usual):
    other = draw_hands(replace(PLAIN, seed=8))
    names = np.array(list(usual))
    centres = np.array([usual[name].ravel() for name in names])
    pictures = ink_of(other).reshape(-1, centres.shape[1])
    assert np.mean(names[nearest(pictures, centres)] == other.condition) > 0.9
    another = draw_hands(replace(PLAIN, seed=8, characters_seed=1))
    pictures = ink_of(another).reshape(-1, centres.shape[1])
    assert np.mean(names[nearest(pictures, centres)] == another.condition) < 0.2


def test_a_longer_script_begins_with_the_shorter_one():
    short, long = (hands._script(count, 3) for count in (10, 30))
    assert all(
        np.array_equal(a, b) for one, two in zip(short, long, strict=False) for a, b in zip(one, two, strict=True)
    )


def test_a_style_is_readable_from_other_characters_of_other_writers(odd, usual):
    """Nine kinds of hands, known from ten characters of some writers; others draw ten other characters."""
    style = np.array([style_of(ODD, number_of(user)) for user in odd.user])
    writer = np.array([number_of(user) for user in odd.user])
    early = np.array([number_of(character) < 10 for character in odd.condition])
    known = early & (writer % 2 == 0)
    seen = np.array([features(p, usual[c]) for p, c in zip(ink_of(odd), odd.condition, strict=True)])
    seen = (seen - seen[known].mean(0)) / seen[known].std(0)
    names = np.unique(style)
    assert set(names) == {*STYLES, "ordinary"}
    centres = np.array([seen[known & (style == name)].mean(0) for name in names])
    asked = ~early & (writer % 2 == 1)
    guesses = names[nearest(seen[asked], centres)]
    assert np.mean(guesses == style[asked]) > 0.7  # from one drawing
    writers = np.unique(writer[asked])
    means = np.array([seen[asked & (writer == number)].mean(0) for number in writers])
    assert np.mean(names[nearest(means, centres)] == [style_of(ODD, number) for number in writers]) > 0.9  # from ten


def test_no_kind_of_hand_stands_in_for_another(odd):
    """The mean pictures of one kind of hand fit other writers of that kind, and worse all other kinds."""
    writer = np.array([number_of(user) for user in odd.user])
    style = np.array([style_of(ODD, number) for number in writer])
    names, characters = np.unique(style), np.unique(odd.condition)
    known, ink = writer % 2 == 0, ink_of(odd)

    def means(chosen):
        return np.array([ink[chosen & (odd.condition == name)].mean(0) for name in characters])

    taught = [means(known & (style == name)) for name in names]
    for own, name in enumerate(names):
        asked = means(~known & (style == name))
        misfits = [np.sum((asked - pictures) ** 2) for pictures in taught]
        assert np.delete(misfits, own).min() > 1.2 * misfits[own], (name, misfits)


def test_mirror_writing_is_the_ordinary_hand_in_a_mirror(monkeypatch):
    monkeypatch.setattr(hands, "style_of", lambda config, number: "ordinary")
    monkeypatch.setitem(hands._ORDINARY, "slant", (0.0, 0.0))
    monkeypatch.setitem(hands._ORDINARY, "tilt", (0.0, 0.0))
    monkeypatch.setitem(hands._ORDINARY, "wobble", (0.0, 0.0))
    straight = ink_of(draw_hands(SMALL))
    monkeypatch.setitem(hands._ORDINARY, "facing", (-1.0, -1.0))
    mirrored = ink_of(draw_hands(SMALL))[:, :, ::-1]
    assert np.abs(mirrored - straight).sum() < 0.7 * np.abs(mirrored[:, :, ::-1] - straight).sum()


def test_share_of_odd_writers():
    styles = [style_of(replace(ODD, odd=0.8), number) for number in range(2000)]
    counts = {name: styles.count(name) for name in styles}
    assert counts["ordinary"] / 2000 == pytest.approx(0.2, abs=0.03)
    assert set(counts) == {*STYLES, "ordinary"}
    assert min(counts.values()) > 0.8 * 1600 / len(STYLES)
    assert {style_of(PLAIN, number) for number in range(200)} == {"ordinary"}


def test_a_picture_looks_the_same_at_every_size():
    small, large = (ink_of(draw_hands(replace(SMALL, size=size))) for size in (24, 48))
    halved = large.reshape(len(large), 24, 2, 24, 2).mean((2, 4))
    assert np.corrcoef(small.ravel(), halved.ravel())[0, 1] > 0.95


def test_written_drawings_come_back(tmp_path):
    path = tmp_path / "hands.npz"
    path.write_text("old")
    assert write_hands(SMALL, path) == SMALL.users * SMALL.per_user
    with np.load(path, allow_pickle=False) as file:
        assert sorted(file) == ["condition", "image", "user"]
        for name, array in draw_hands(SMALL)._asdict().items():
            assert np.array_equal(file[name], array)
            assert file[name].dtype == array.dtype
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    first = path.read_bytes()
    write_hands(SMALL, path)
    assert path.read_bytes() == first


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    def broken(file, **arrays):
        raise OSError("disk full")

    monkeypatch.setattr(np, "savez_compressed", broken)
    (tmp_path / "hands.npz").write_text("old")
    with pytest.raises(OSError, match="disk full"):
        write_hands(SMALL, tmp_path / "hands.npz")
    assert (tmp_path / "hands.npz").read_text() == "old"


@pytest.mark.parametrize("name", ["hands", "hands.npy", "hands.npz.gz"])
def test_bad_paths(tmp_path, name):
    with pytest.raises(ValueError, match=r"must end in \.npz"):
        write_hands(SMALL, tmp_path / name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("users", 0),
        ("users", True),
        ("characters", 0),
        ("characters", 201),
        ("per_user", 0),
        ("per_user", 2.0),
        ("size", 15),
        ("size", 65),
        ("size", "28"),
        ("odd", -0.1),
        ("odd", float("nan")),
        ("odd", "0.5"),
        ("seed", -1),
        ("characters_seed", None),
    ],
)
def test_bad_settings_name_the_argument_and_the_value(name, value):
    with pytest.raises(ValueError) as error:
        HandConfig(**{name: value})
    assert f"{name}={value!r}" in str(error.value)
    assert "must be" in str(error.value)


def test_only_a_config_will_do():
    with pytest.raises(ValueError, match="must be a HandConfig"):
        draw_hands({"users": 3})
