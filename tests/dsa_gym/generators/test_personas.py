"""Persona text: the same seed gives the same people, and the two similarities do what they say."""

import gzip
import json
import lzma
from collections import Counter, defaultdict
from dataclasses import replace
from itertools import combinations, pairwise

import numpy as np
import pytest

from dsa_gym.generators import personas
from dsa_gym.generators.personas import REGISTERS, TOPICS, PersonaConfig, PersonaText, generate_personas, write_personas

SMALL = PersonaConfig(users=24, min_texts=60, max_texts=120, seed=5)


@pytest.fixture(scope="module")
def rows() -> list[PersonaText]:
    return list(generate_personas(SMALL))


def by_user(rows: list[PersonaText]) -> dict[str, list[PersonaText]]:
    users = defaultdict(list)
    for row in rows:
        users[row.user].append(row)
    return users


def jensen_shannon(first: list[str], second: list[str]) -> float:
    """Jensen-Shannon divergence of two lists of texts' word distributions, in bits, from 0 to 1."""
    counts = [Counter(" ".join(texts).lower().split()) for texts in (first, second)]
    words = sorted(counts[0] | counts[1])
    p, q = (np.array([count[word] for word in words], dtype=float) for count in counts)
    p, q = p / p.sum(), q / q.sum()
    middle = (p + q) / 2
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(sum(np.nansum(x * np.log2(x / middle)) for x in (p, q)) / 2)


def user_distance(config: PersonaConfig) -> float:
    """Mean distance between different users who write in the same register."""
    texts = defaultdict(list)
    for row in generate_personas(config):
        texts[row.register, row.user].append(row.text)
    kept = {key: value[:40] for key, value in texts.items() if len(value) >= 40}
    pairs = [(a, b) for a, b in combinations(kept, 2) if a[0] == b[0] and a[1] != b[1]]
    return float(np.mean([jensen_shannon(kept[a], kept[b]) for a, b in pairs[:150]]))


def register_distance(config: PersonaConfig) -> float:
    """Mean distance between the registers of one user."""
    texts = defaultdict(list)
    for row in generate_personas(config):
        texts[row.user, row.register].append(row.text)
    kept = {key: value[:40] for key, value in texts.items() if len(value) >= 40}
    pairs = [(a, b) for a, b in combinations(kept, 2) if a[0] == b[0]]
    return float(np.mean([jensen_shannon(kept[a], kept[b]) for a, b in pairs]))


class NaiveBayes:
    """Naive Bayes on the first words of a text."""

    def __init__(self, texts: list[str], labels: list[str], words: int) -> None:
        self.words = words
        self.counts = defaultdict(Counter)
        for text, label in zip(texts, labels, strict=True):
            self.counts[label].update(self.split(text))
        self.vocabulary = len(set().union(*self.counts.values()))

    def split(self, text: str) -> list[str]:
        return text.lower().split()[: self.words]

    def score(self, text: str, label: str) -> float:
        count = self.counts[label]
        return sum(np.log((count[word] + 0.2) / (count.total() + 0.2 * self.vocabulary)) for word in self.split(text))

    def accuracy(self, texts: list[str], labels: list[str]) -> float:
        guesses = [max(self.counts, key=lambda label: self.score(text, label)) for text in texts]
        return float(np.mean([guess == label for guess, label in zip(guesses, labels, strict=True)]))


def test_same_config_gives_the_same_texts(rows):
    assert rows == list(generate_personas(SMALL))
    assert rows != list(generate_personas(replace(SMALL, seed=6)))


def test_a_user_does_not_depend_on_the_number_of_users(rows):
    few = list(generate_personas(replace(SMALL, users=3)))
    assert few == rows[: len(few)]


def test_shape_of_the_population(rows):
    users = by_user(rows)
    assert len(users) == SMALL.users
    for name, texts in users.items():
        assert name.startswith("persona-")
        assert [row.index for row in texts] == list(range(len(texts)))
        assert SMALL.min_texts <= len(texts) <= SMALL.max_texts
        assert 1 <= len({row.register for row in texts}) <= SMALL.registers[1]
    assert {row.register for row in rows} == set(REGISTERS)
    assert {row.topic for row in rows} == set(TOPICS)
    assert len({len(texts) for texts in users.values()}) > 5


def test_texts_are_short_clean_lines(rows):
    for row in rows:
        assert 60 <= len(row.text) <= 250, row
        assert row.text == " ".join(row.text.split()), row
        assert not set("{}+") & set(row.text.replace(" + ", " ")), row
    assert len({row.text for row in rows}) > 0.98 * len(rows)


@pytest.mark.parametrize("extreme", [0.0, 1.0])
def test_extremes_keep_the_lengths(extreme):
    config = replace(SMALL, users=6, user_similarity=extreme, register_similarity=extreme)
    assert all(60 <= len(row.text) <= 250 for row in generate_personas(config))


@pytest.mark.parametrize("registers", [(1, 1), (3, 3), (len(REGISTERS), len(REGISTERS))])
def test_number_of_registers(registers):
    config = PersonaConfig(users=4, min_texts=200, max_texts=200, registers=registers, user_similarity=0.0)
    for texts in by_user(list(generate_personas(config))).values():
        assert len(texts) == 200
        assert len({row.register for row in texts}) == registers[0]


def test_users_grow_alike_with_user_similarity():
    config = PersonaConfig(users=16, min_texts=150, max_texts=150, seed=1)
    distances = [user_distance(replace(config, user_similarity=value)) for value in (0.0, 0.3, 0.6, 1.0)]
    assert all(far > near + 0.02 for far, near in pairwise(distances)), distances
    assert distances[0] > 1.5 * distances[-1]


def test_registers_grow_alike_with_register_similarity():
    config = PersonaConfig(users=16, min_texts=150, max_texts=150, seed=2)
    distances = [register_distance(replace(config, register_similarity=value)) for value in (0.0, 0.3, 0.6, 1.0)]
    assert all(far > near + 0.02 for far, near in pairwise(distances)), distances
    assert distances[0] > 1.5 * distances[-1]


def test_same_distribution_means_no_signature_gives_the_writer_away():
    config = PersonaConfig(users=8, min_texts=60, max_texts=60, registers=(2, 2), user_similarity=1.0)
    signed = [row for row in generate_personas(config) if row.text.endswith(row.user.split("-")[-1])]
    assert not signed


@pytest.mark.parametrize(("label", "words", "least"), [("register", 6, 0.9), ("topic", 9, 0.6)])
def test_first_words_tell_register_and_topic_of_unseen_users(rows, label, words, least):
    """Chance is 1/6 for the register and 1/16 for the topic."""
    users = sorted({row.user for row in rows})
    known = set(users[: len(users) * 3 // 4])
    seen, unseen = ([row for row in rows if (row.user in known) == side] for side in (True, False))
    model = NaiveBayes([row.text for row in seen], [getattr(row, label) for row in seen], words)
    assert model.accuracy([row.text for row in unseen], [getattr(row, label) for row in unseen]) > least


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("users", 0),
        ("users", 2.0),
        ("users", True),
        ("min_texts", 0),
        ("max_texts", 99),
        ("seed", -1),
        ("seed", None),
        ("registers", (0, 2)),
        ("registers", (3, 2)),
        ("registers", (2, len(REGISTERS) + 1)),
        ("registers", (2,)),
        ("registers", (1.0, 2.0)),
        ("registers", 2),
        ("user_similarity", -0.1),
        ("user_similarity", float("nan")),
        ("register_similarity", 1.1),
        ("register_similarity", "0.5"),
    ],
)
def test_bad_settings_name_the_argument_and_the_value(name, value):
    with pytest.raises(ValueError) as error:
        PersonaConfig(**{name: value})
    assert f"{name}={value!r}" in str(error.value)
    assert "must be" in str(error.value)


def test_generate_wants_a_config():
    with pytest.raises(ValueError, match="PersonaConfig"):
        next(generate_personas({"users": 3}))


@pytest.mark.parametrize(("suffix", "reader"), [(".jsonl", open), (".jsonl.gz", gzip.open), (".jsonl.xz", lzma.open)])
def test_written_rows_come_back(tmp_path, suffix, reader):
    config = replace(SMALL, users=2)
    path = tmp_path / f"personas{suffix}"
    path.write_text("old")
    assert write_personas(config, path) == len(list(generate_personas(config)))
    with reader(path, "rt", encoding="utf-8") as file:
        assert [PersonaText(**json.loads(line)) for line in file] == list(generate_personas(config))
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    first = path.read_bytes()
    write_personas(config, path)
    assert path.read_bytes() == first


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    def broken(config):
        yield PersonaText("persona-0000-Mira", 0, "text", "chat", "chess")
        raise RuntimeError("disk full")

    monkeypatch.setattr(personas, "generate_personas", broken)
    path = tmp_path / "personas.jsonl"
    path.write_text("old")
    with pytest.raises(RuntimeError, match="disk full"):
        write_personas(SMALL, path)
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_bad_paths(tmp_path):
    with pytest.raises(ValueError, match=r"must end in \.jsonl"):
        write_personas(SMALL, tmp_path / "personas.csv")
    with pytest.raises(ValueError, match="folder that exists"):
        write_personas(SMALL, tmp_path / "missing" / "personas.jsonl")
