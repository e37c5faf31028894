"""Persona text: a seeded population of invented people who write short messages, made offline.

A persona has favourite topics, favourite words, habits (greetings, hedges, emoji, spelling, weekdays) and two
or three registers: the same person chats, writes mails, notes, reviews, diary entries or forum posts in very
different styles. The population serves two ends: personalisation (people differ) and gating per input (the
registers of one person differ, and register and topic show in the first few words).

Every text comes from a small grammar. A register holds sentence templates, a topic holds a lexicon, and slots
such as `{n}` (a noun) or `{when}` (a time to come) are filled from weighted lists. A persona is nothing but
its weights: for each list of K choices

    w = (1 - user_similarity) * Dirichlet(alpha) + user_similarity / K,

so that at `user_similarity = 1` all personas draw from one distribution. With `register_similarity = s`, each
part of a text (sentence, sign-off, surface) is written in the style of the persona's home register with
probability s (its opening with probability s^2), in that of its own register otherwise.

With `odd_spelling = p` each register of a persona is, with probability p, typed in one of the `SPELLINGS` from
beginning to end: capitals, dropped vowels, and so on.

All names are invented; there are no brands, real people or private data in here.
"""

from __future__ import annotations

import gzip
import json
import lzma
import re
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from numbers import Integral
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from dsa_gym.generators.checks import check_integer, check_share
from dsa_gym.generators.spellings import SPELLINGS
from dsa_gym.storage import atomic_path

MIN_CHARACTERS = 60
MAX_CHARACTERS = 250


@dataclass(frozen=True)
class PersonaConfig:
    """What the population looks like.

    Attributes:
        users: number of personas, at least 1.
        min_texts: fewest texts of a persona, at least 1.
        max_texts: most texts of a persona, at least `min_texts`.
        registers: fewest and most registers of a persona, each from 1 to the number of `REGISTERS`.
        user_similarity: from 0 (nothing shared beyond the grammar) to 1 (all draw from one distribution).
        register_similarity: from 0 (a persona's registers have disjoint styles) to 1 (one style for all).
        odd_spelling: probability that a register of a persona is typed in one of the `SPELLINGS`.
        seed: seed of the population, at least 0.
    """

    users: int = 200
    min_texts: int = 100
    max_texts: int = 500
    registers: tuple[int, int] = (2, 3)
    user_similarity: float = 0.3
    register_similarity: float = 0.2
    odd_spelling: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Check every value.

        Raises:
            ValueError: if a value is out of range; it names the argument, the value and what would be right.
        """
        for name, least in (("users", 1), ("min_texts", 1), ("max_texts", 1), ("seed", 0)):
            check_integer(name, getattr(self, name), least)
        if self.max_texts < self.min_texts:
            raise ValueError(f"max_texts={self.max_texts!r} must be at least min_texts={self.min_texts!r}")
        wanted = (
            f"registers={self.registers!r} must be two integers (fewest, most), 1 <= fewest <= most <= {len(REGISTERS)}"
        )
        if not isinstance(self.registers, tuple | list) or len(self.registers) != 2:
            raise ValueError(wanted)
        if not all(isinstance(n, Integral) and not isinstance(n, bool) for n in self.registers):
            raise ValueError(wanted)
        if not 1 <= self.registers[0] <= self.registers[1] <= len(REGISTERS):
            raise ValueError(wanted)
        for name in ("user_similarity", "register_similarity", "odd_spelling"):
            check_share(name, getattr(self, name))


@dataclass(frozen=True)
class PersonaText:
    """One message.

    Attributes:
        user: opaque name of the persona, such as `persona-0007-Mira`.
        index: position in the persona's own time order, from 0.
        text: the message on one line, 60 to 250 characters before an odd spelling.
        register: one of `REGISTERS`.
        topic: one of `TOPICS`.
    """

    user: str
    index: int
    text: str
    register: str
    topic: str


def generate_personas(config: PersonaConfig) -> Iterator[PersonaText]:
    """Yield the texts of the population, persona by persona, in time order within a persona.

    A persona's texts depend on the seed, its number and the other settings, not on the number of personas.

    Args:
        config: what the population looks like.

    Yields:
        One `PersonaText` after the other.

    Raises:
        ValueError: if `config` is not a `PersonaConfig`.
    """
    if not isinstance(config, PersonaConfig):
        raise ValueError(f"config={config!r} must be a PersonaConfig")
    for number in range(config.users):
        yield from _Persona(config, number).texts()


def write_personas(config: PersonaConfig, path: Path) -> int:
    """Write the population as JSON Lines with the keys user, index, text, register and topic.

    The file appears under its name only when it is complete: rows go to a temporary file beside it first.

    Args:
        config: what the population looks like.
        path: a name that ends in `.jsonl`, `.jsonl.gz` or `.jsonl.xz`, in a folder that exists.

    Returns:
        Number of rows written.

    Raises:
        ValueError: if the name ends differently, the folder is missing or `config` is no `PersonaConfig`.
    """
    path = Path(path)
    if not path.name.endswith((".jsonl", ".jsonl.gz", ".jsonl.xz")):
        raise ValueError(f"path={str(path)!r} must end in .jsonl, .jsonl.gz or .jsonl.xz")
    if not path.parent.is_dir():
        raise ValueError(f"path={str(path)!r} must lie in a folder that exists")
    rows = 0
    with atomic_path(path) as temporary, temporary.open("wb") as raw, _compressed(raw, path.suffix) as out:
        for row in generate_personas(config):
            out.write(json.dumps(row.__dict__, ensure_ascii=False).encode() + b"\n")
            rows += 1
    return rows


def _compressed(raw: IO[bytes], suffix: str) -> Any:
    """Return a writer over an open file; no name or time goes into it: equal rows are equal bytes."""
    if suffix == ".gz":
        return gzip.GzipFile(filename="", mode="wb", fileobj=raw, mtime=0, compresslevel=6)
    if suffix == ".xz":
        return lzma.LZMAFile(raw, "wb", preset=3)
    return open(raw.fileno(), "wb", closefd=False)


# ----------------------------------------------------------------------------------------------------------
# The persona: weights over every list of the grammar, and the writing of one text.


class _Choice(NamedTuple):
    """A weighted list: the items and their cumulated weights."""

    items: tuple[Any, ...]
    cumulated: list[float]


class _Persona:
    """One person: its weights, and its texts."""

    def __init__(self, config: PersonaConfig, number: int) -> None:
        """Draw the persona's weights.

        Args:
            config: the population's settings.
            number: the persona's number in the population, from 0.
        """
        self.config = config
        self.rng = np.random.default_rng(np.random.SeedSequence(entropy=int(config.seed), spawn_key=(number,)))
        self.uniform = self._uniforms().__next__
        self.name = _NAMES[int(self.rng.integers(len(_NAMES)))]
        self.user = f"persona-{number:04d}-{self.name}"
        friends = tuple(name for name in _NAMES if name != self.name)
        self.registers = self._own_registers()
        self.habits = {slot: self._weigh(items, 2.0) for slot, items in _SHARED.items()}
        self.habits["friend"] = self._weigh(friends, 2.0)
        self.lexica = {
            topic: {slot: self._weigh(items, 0.35 * len(items)) for slot, items in lexicon.items()}
            for topic, lexicon in _LEXICA.items()
        }
        # The weights of all registers are drawn, also of those the persona does not use: draws stay aligned.
        self.styles = {
            register: {
                slot: self._weigh(items, 0.5 * len(items) if slot in ("first", "body") else 2.0)
                for slot, items in style.items()
            }
            for register, style in _STYLES.items()
        }
        self.cheer = 0.6 + (1 - config.user_similarity) * float(self.rng.uniform(-0.3, 0.3))  # how often all is well
        self.register = self._weigh(self.registers, 6.0 * len(self.registers))
        taste = self._weights(len(TOPICS), 0.2 * len(TOPICS))
        tilt = self.rng.gamma(
            0.5, size=(len(self.registers), len(TOPICS))
        )  # what it rather chats about, or mails about
        tilt = (tilt + 0.02) ** ((1 - config.register_similarity) * (1 - config.user_similarity))
        self.spellings = self._own_spellings(number)
        self.topics = {r: _choice(TOPICS, taste * row) for r, row in zip(self.registers, tilt, strict=True)}

    def texts(self) -> Iterator[PersonaText]:
        """Yield all texts of the persona in order."""
        count = int(self.rng.integers(self.config.min_texts, self.config.max_texts + 1))
        for index in range(count):
            register = self._pick(self.register)
            topic = self._pick(self.topics[register])
            text = ""
            while not MIN_CHARACTERS <= len(text) <= MAX_CHARACTERS:
                text = self._write(register, topic)
            yield PersonaText(self.user, index, self.spellings[register](text), register, topic)

    def _own_spellings(self, number: int) -> dict[str, Callable[[str], str]]:
        """Draw how each register is typed, from draws of its own: the words do not depend on it."""
        rng = np.random.default_rng(np.random.SeedSequence(int(self.config.seed), spawn_key=(number, 1)))
        odd = list(SPELLINGS.values())
        return {
            register: odd[int(rng.integers(len(odd)))] if rng.random() < self.config.odd_spelling else str
            for register in self.registers
        }

    def _own_registers(self) -> tuple[str, ...]:
        """Draw which registers the persona writes in; the first is its home register."""
        fewest, most = self.config.registers
        count = int(self.rng.integers(fewest, most + 1))
        order = [REGISTERS[i] for i in self.rng.permutation(len(REGISTERS))]
        if self.rng.random() < self.config.user_similarity**2:  # the population's common set
            return REGISTERS[:most]
        return tuple(order[:count])

    def _weights(self, count: int, total: float) -> np.ndarray:
        """Draw the persona's weights over `count` choices; `total` is the Dirichlet's concentration."""
        own = self.rng.dirichlet(np.full(count, total / count))
        return (1 - self.config.user_similarity) * own + self.config.user_similarity / count

    def _weigh(self, items: tuple[Any, ...], total: float) -> _Choice:
        return _choice(items, self._weights(len(items), total))

    def _uniforms(self) -> Iterator[float]:
        while True:
            yield from self.rng.random(4096).tolist()

    def _pick(self, choice: _Choice) -> Any:
        return choice.items[bisect_right(choice.cumulated, self.uniform())]

    def _write(self, register: str, topic: str) -> str:
        """Write one text; its length is not checked here."""
        own, home, borrow = (
            self.styles[register],
            self.styles[self.registers[0]],
            self.config.register_similarity,
        )

        def style(probability: float = borrow) -> dict[str, _Choice]:
            return home if self.uniform() < probability else own

        scene = _Scene(self, self.lexica[topic], "+" if self.uniform() < self.cheer else "-")
        surface = style()
        sign = self._sign(style(), scene)
        sentences = [scene.sentence(style(borrow**2), "first")]  # squared: the first words should tell the register
        size = self._pick(surface["size"])
        length = len(sentences[0]) + len(sign)
        while len(sentences) < size or length < MIN_CHARACTERS:
            text = scene.sentence(style(), "body")
            length += len(text) + 2
            if length > MAX_CHARACTERS:
                break
            sentences.append(text)
        return self._finish(surface, sentences, sign)

    def _sign(self, style: dict[str, _Choice], scene: _Scene) -> str:
        """Draw the last words, such as 'Best wishes, Mira'; a trailing comma asks for the persona's name."""
        sign = scene.fill(self._pick(style["close"]), style)
        if sign.endswith(","):
            return f"{sign} {self.name}" if self.uniform() < 1 - self.config.user_similarity else sign[:-1]
        return sign

    def _finish(self, style: dict[str, _Choice], sentences: list[str], sign: str) -> str:
        """Put sentences together: case, punctuation, abbreviations and spelling."""
        lower = self._pick(style["case"])
        text = ""
        for sentence in sentences:
            if text:
                if text[-1].isalnum():
                    text += _spaced(self._pick(style["join"]))
                text += " "
            text += sentence
            if text[-1].isalnum():
                text += _spaced(self._pick(style["stop"]))
        if sign:
            text += f". {sign}" if text[-1].isalnum() and sign[0].isupper() else f" {sign}"
        text = self._pick(self.habits["spelling"])(text)
        text = text.lower() if lower else _START.sub(lambda start: start[0].upper(), _LONELY_I.sub("I", text))
        return " ".join(self._pick(style["short"])(text).split())


class _Scene:
    """What stays fixed within one text: topic, mood, and the words already used."""

    def __init__(self, persona: _Persona, lexicon: dict[str, _Choice], mood: str) -> None:
        """Start a text.

        Args:
            persona: who writes.
            lexicon: the persona's weights over the topic's words.
            mood: "+" or "-", which of the paired slots are used.
        """
        self.pick, self.habits = persona._pick, persona.habits
        self.uniform = persona.uniform
        self.lexicon, self.mood = lexicon, mood
        self.used: set[Any] = set()
        self.plural = False
        self.first: dict[str, str] = {}

    def sentence(self, style: dict[str, _Choice], part: str) -> str:
        """Return one sentence without its full stop, from the templates `part` of a style."""
        text = self.fill(self._fresh(style[part]), style)
        return _ARTICLE.sub(lambda article: "an " if article[1] else "a ", text) if "(n)" in text else text

    def fill(self, template: tuple[str, ...], style: dict[str, _Choice]) -> str:
        """Fill the slots of a compiled template: literals at even places, slot names at odd ones."""
        out = list(template)
        for place in range(1, len(out), 2):
            out[place] = self._slot(out[place], style)
        text = "".join(out)
        return text.strip()

    def _slot(self, slot: str, style: dict[str, _Choice]) -> str:
        if slot in _AGREEMENT:
            return _AGREEMENT[slot][self.plural]
        if slot in _STICKY:
            item = self.first.get(slot)
            if item is None or self.uniform() >= _STICKY[slot]:
                item = self._fresh(self.lexicon[slot])
                self.first.setdefault(slot, item)
            self.plural = item[0] == "+"
            return item[self.plural :]
        if slot in _VERB_FORMS:
            return str(self._fresh(self.lexicon["act"])[_VERB_FORMS[slot]])
        for name in (slot, slot + self.mood):
            for lists in (self.lexicon, style, self.habits):
                if name in lists:
                    item = self._fresh(lists[name])
                    return self.fill(item, style) if isinstance(item, tuple) else str(item)
        raise KeyError(slot)

    def _fresh(self, choice: _Choice) -> Any:
        """Pick an item that the text has not used yet, if there is one."""
        for _ in range(3):
            item = self.pick(choice)
            if item not in self.used:
                break
        else:
            left = [item for item in choice.items if item not in self.used]
            if left:
                item = left[int(self.uniform() * len(left))]
        self.used.add(item)
        return item


def _spaced(stop: str) -> str:
    """Put a space before what is not punctuation proper, such as a smiley or a dash."""
    return stop if not stop or stop[0] in ".,;!?" else f" {stop}"


def _choice(items: tuple[Any, ...], weights: np.ndarray) -> _Choice:
    cumulated = list(accumulate((weights / weights.sum()).tolist()))
    cumulated[-1] = 1.0  # a uniform number is below 1, so rounding can never point past the end
    return _Choice(tuple(items), cumulated)


# ----------------------------------------------------------------------------------------------------------
# Notation: lists are written as "a; b; c", an empty item means "nothing". "{slot}" is filled from the topic's
# lexicon, the register's style or the shared habits, in this order; slots that end in + or - are chosen by
# the mood of the text.

_LONELY_I = re.compile(r"\bi\b(?!\.)")
_START = re.compile(r"(?:^|[.!?★☆] )[a-z]")
_ARTICLE = re.compile(r"\ba\(n\) (?=([aeio])?)")
_STICKY = {"product": 1.0, "n": 0.35}  # how often a later mention means the thing mentioned first
_VERB_FORMS = {"do": 0, "did": 1, "doing": 2}
_AGREEMENT = {"is": ("is", "are"), "was": ("was", "were"), "it": ("it", "they"), "them": ("it", "them")}


def _list(text: str) -> tuple[str, ...]:
    return tuple(" ".join(item.split()) for item in text.split(";"))


def _template(text: str) -> tuple[str, ...]:
    """Compile a template: literals at even places, slot names at odd ones."""
    return tuple(re.split(r"\{([^}]+)\}", text.strip()))


def _acts(text: str) -> tuple[tuple[str, str, str], ...]:
    """Expand 'bake/baked/baking: a loaf; rolls' lines to (base, past, -ing form) with every object."""
    acts = []
    for line in text.strip().splitlines():
        verbs, objects = line.split(":", 1)
        for thing in _list(objects):
            base, past, present = (f"{verb.strip()} {thing}" for verb in verbs.split("/"))
            acts.append((base, past, present))
    return tuple(acts)


def _respell(pairs: str) -> Callable[[str], str]:
    """Return a function that replaces whole words, from 'old=new; old=new'; initial capitals are kept."""
    table = dict(pair.split("=") for pair in _list(pairs)) if pairs else {}
    if not table:
        return str
    table = {old.lower(): new for old, new in table.items()}
    find = re.compile(r"\b(" + "|".join(sorted(map(re.escape, table), key=len, reverse=True)) + r")\b", re.IGNORECASE)

    def swap(match: re.Match[str]) -> str:
        new = table[match[0].lower()]
        return new[:1].upper() + new[1:] if match[0][0].isupper() and match[0] != "I" else new

    return lambda text: find.sub(swap, text)


_NAMES = _list(
    "Mira; Tomas; Ines; Jonah; Petra; Oskar; Lena; Rafi; Noor; Silas; Greta; Hugo; Amara; Felix; Yuna; "
    "Marek; Tilda; Bruno; Esme; Kofi; Dalia; Anton; Runa; Milo; Selma; Idris; Vera; Luca; Hanna; Emil; Zora; "
    "Theo; Nadia; Casper; Freya; Pavel; Alma; Rohan; Ida; Joris; Leila; Arno; Suki; Viktor; Maja; Elio; "
    "Thea; Omar; Linnea; Dario; Bela; Nils; Ayla; Ruben"
)

_SHARED: dict[str, tuple[Any, ...]] = {
    "when": _list(
        "tomorrow; on Monday; on Tuesday; on Wednesday; on Thursday; on Friday; on Saturday; on Sunday; this "
        "weekend; after work; next week; tonight; before breakfast; after lunch; as soon as it stops "
        "raining; early in the morning; at the end of the month"
    ),
    "past": _list(
        "yesterday; last night; this morning; on Monday; on Tuesday; on Wednesday; on Thursday; on Friday; "
        "on Saturday; on Sunday; last week; after work; before breakfast; all afternoon; over the weekend; "
        "two days ago"
    ),
    "day": _list("Monday; Tuesday; Wednesday; Thursday; Friday; Saturday; Sunday"),
    "who": _list(
        "my neighbour; my sister; my brother; my mum; my flatmate; my cousin; {friend}; {friend} from work; "
        "the kids; an old friend"
    ),
    "spelling": tuple(
        _respell(pairs)
        for pairs in (
            "",
            "neighbour=neighbor; colour=color; colours=colors; favourite=favorite; mum=mom; "
            "practise=practice; practised=practiced; practising=practicing; organise=organize; "
            "organised=organized; programme=program; travelled=traveled; football=soccer; cosy=cozy; "
            "grey=gray; metres=meters; flatmate=roommate; autumn=fall; realised=realized; flavour=flavor",
            "definitely=definately; a lot=alot; tomorrow=tommorow; weird=wierd; until=untill; "
            "believe=beleive; separate=seperate",
            "do not=don't; I am=I'm; it is=it's; I have=I've; I would=I'd; we should=we ought to; "
            "cannot=can't; did not=didn't",
            "maybe=perhaps; really=truly; nice=lovely; a bit=rather; okay=all right; great=splendid; kids=children",
        )
    ),
}
_SHARED["who"] = tuple(_template(who) for who in _SHARED["who"])

# A topic: nouns that follow "the" or "my" (+ marks a plural), acts, what went well or badly, adjectives for
# the nouns, places, questions, gear to get, products to review ("this ..."), and the topic's own name.
_TOPIC_TEXT: dict[str, dict[str, str]] = {
    "cooking": {
        "name": "cooking; baking; dinner; the kitchen",
        "n": "sourdough; lentil soup; lemon cake; apple pie; mushroom risotto; tomato sauce; chickpea curry; "
        "+dumplings; +pancakes; +cinnamon rolls; vegetable stew; onion tart",
        "act": """bake/baked/baking: two loaves; an apple pie; a tray of cinnamon rolls; rye bread
            cook/cooked/cooking: a pot of soup; the chickpea curry; dinner for six; risotto
            chop/chopped/chopping: the onions; a pile of carrots; fresh herbs
            try/tried/trying: a new recipe; the old family recipe; the dumplings again""",
        "good": "the crust came out golden; the dough rose beautifully; everyone asked for seconds; the "
        "sauce thickened just right; the whole kitchen smelled of butter; the filling held together",
        "bad": "the bottom burned; the dough did not rise; I forgot the salt; the sauce split; the oven went "
        "cold halfway; the middle stayed raw",
        "adj+": "tasty; crisp; creamy; fragrant; rich; light",
        "adj-": "soggy; bland; oversalted; dry; burnt; lumpy",
        "at": "in the kitchen; at the farmers' market; at my aunt's place; at the village bakery; at the "
        "community kitchen",
        "ask": "how long do you let the dough rest; which flour do you use; can I freeze the sauce; do you "
        "peel the tomatoes first; how much salt goes into the stock",
        "gear": "flour; fresh yeast; a dozen eggs; red lentils; two lemons; a jar of tahini; brown sugar; garlic",
        "product": "cast-iron pan; bread knife; spice mix; stand mixer; soup cookbook; rolling pin",
    },
    "football": {
        "name": "football; the match; training; the team",
        "n": "second half; back line; penalty; new striker; home game; away match; derby; free kick; +corner "
        "kicks; +young defenders; goalkeeper; team talk",
        "act": """watch/watched/watching: the derby; the cup match; the second half; the under-tens play
            play/played/playing: five-a-side; on the left wing; in goal; a friendly
            practise/practised/practising: penalties; headers; long passes
            coach/coached/coaching: the youth team; the keepers; the Saturday squad""",
        "good": "we won by two goals; the keeper saved a penalty; our winger scored twice; the defence "
        "stayed calm; we equalised in the last minute; the crowd sang the whole time",
        "bad": "we lost in extra time; the referee missed a clear foul; our striker limped off; we let in "
        "three goals; the pitch was under water; nobody marked their tall midfielder",
        "adj+": "sharp; fearless; brilliant; solid; exciting; well organised",
        "adj-": "sloppy; slow; nervous; hopeless; chaotic; dull",
        "at": "at the stadium; on the muddy pitch; in the sports bar; behind the goal; on the training ground",
        "ask": "who plays in goal; what time is kick-off; are there tickets left; should we press higher; "
        "who brings the balls",
        "gear": "shin pads; a new scarf; a ball pump; studs; two tickets; the blue bibs; tape; orange slices",
        "product": "training ball; pair of boots; team scarf; goalkeeper glove; goal net; tactics book",
    },
    "gardening": {
        "name": "gardening; the garden; the allotment; the greenhouse",
        "n": "rose bush; compost heap; apple tree; greenhouse; herb bed; lawn; +tomato plants; +tulips; "
        "+runner beans; +strawberries; hedge; lavender",
        "act": """water/watered/watering: the tomato plants; the seedlings; the whole greenhouse
            plant/planted/planting: garlic; two rows of beans; tulip bulbs; an apple tree
            prune/pruned/pruning: the roses; the hedge; the old pear tree
            dig/dug/digging: the potato bed; a small pond; in the compost""",
        "good": "the first seedlings came up; the roses bloomed early; we picked a bucket of beans; the bees "
        "loved the lavender; the new compost worked wonders; everything smelled of rain",
        "bad": "slugs ate the lettuce; the frost got the dahlias; the hose sprang a leak; the beans "
        "withered; the fox dug up the bulbs; weeds took over the path",
        "adj+": "lush; green; healthy; fragrant; colourful; tidy",
        "adj-": "dry; yellow; overgrown; shabby; droopy; sickly",
        "at": "in the allotment; behind the shed; in the greenhouse; along the fence; at the plant fair",
        "ask": "when do you sow the carrots; how do you keep slugs away; is it too late for tulips; how much "
        "shade does mint need; do I prune the roses now",
        "gear": "seed potatoes; a bag of compost; twine; slug tape; a watering can; sunflower seeds; bamboo "
        "canes; gloves",
        "product": "pruning saw; garden hose; seed mix; raised bed; garden fork; watering timer",
    },
    "cycling": {
        "name": "cycling; the bike; the ride; the bike club",
        "n": "chain; rear wheel; front brake; saddle; hill climb; coast road; +gears; +tyres; +bike lights; "
        "river path; group ride; headwind",
        "act": """ride/rode/riding: to the coast; up the long hill; sixty kilometres; the river path
            fix/fixed/fixing: a puncture; the rear brake; the squeaky saddle
            clean/cleaned/cleaning: the chain; the gears; the muddy frame
            plan/planned/planning: a tour over the pass; the Sunday loop; a slow ride with the kids""",
        "good": "the tailwind pushed me home; my legs felt fresh; the new tyres gripped well; I set a best "
        "time on the climb; the descent was pure joy; the gears shifted without a sound",
        "bad": "I got two punctures; the chain snapped; it hailed on the pass; a car cut me off; my knee "
        "hurt on the climb; the rear light died",
        "adj+": "smooth; fast; light; quiet; reliable; fun",
        "adj-": "rusty; wobbly; noisy; worn out; exhausting; slippery",
        "at": "on the coast road; at the bike workshop; on the towpath; below the pass; along the canal",
        "ask": "which tyres do you ride in winter; how often do you oil the chain; is the towpath open; how "
        "steep is the last climb; do I need a wider saddle",
        "gear": "a spare tube; chain oil; a patch kit; energy bars; warm gloves; a front light; brake pads; "
        "a bottle cage",
        "product": "rain jacket; floor pump; touring bike; gel saddle; bike lock; helmet",
    },
    "music": {
        "name": "piano practice; the choir; band practice; the cello",
        "n": "slow movement; left hand; second verse; waltz; cello part; metronome; duet; opening chord; "
        "+scales; +high notes; rehearsal; bridge section",
        "act": """practise/practised/practising: the waltz; scales for an hour; the left hand alone; the duet
            learn/learned/learning: the second verse; a new chord; the slow movement by heart
            record/recorded/recording: the chorus; a rough demo; the cello part
            tune/tuned/tuning: the guitar; the old piano; the cello""",
        "good": "the rhythm finally clicked; the harmony sounded warm; the teacher smiled; I played it "
        "without a mistake; the choir held the last note; my fingers found the keys alone",
        "bad": "a string broke; I lost the beat in the bridge; the high notes cracked; my wrist got stiff; "
        "the metronome drove me mad; we started in the wrong key",
        "adj+": "gentle; mellow; warm; graceful; steady; moving",
        "adj-": "flat; rushed; stiff; shrill; uneven; muffled",
        "at": "in the rehearsal room; at the music school; at the old piano; in the church hall; at the open stage",
        "ask": "how fast do you play the waltz; which fingering works there; who sings the low part; how "
        "often do you change strings; can we start a tone lower",
        "gear": "new strings; the sheet music; a music stand; rosin; a pencil for the score; earplugs; a capo; reeds",
        "product": "digital piano; music stand; violin bow; guitar strap; metronome; song book",
    },
    "chess": {
        "name": "chess; the chess club; the tournament; the endgame",
        "n": "rook endgame; opening; queen sacrifice; knight fork; passed pawn; middle game; bishop pair; "
        "king's side attack; +pawns; +blitz games; chess clock; final round",
        "act": """play/played/playing: the queen's pawn; three blitz games; a long game; the champion
            study/studied/studying: rook endgames; an old opening; my lost games
            solve/solved/solving: ten puzzles; a mate in four; the weekly problem
            analyse/analysed/analysing: the final round; the sacrifice; that knight move""",
        "good": "I found the winning fork; my opponent ran out of time; the sacrifice worked; I held the "
        "draw a pawn down; my rating went up; the passed pawn ran through",
        "bad": "I blundered my queen; I missed a mate in two; my flag fell; I mixed up the move order; the "
        "endgame slipped away; I hung a rook on move twelve",
        "adj+": "sharp; solid; elegant; instructive; precise; clever",
        "adj-": "passive; hopeless; confusing; drawish; slow; unsound",
        "at": "at the chess club; at the tournament hall; in the corner cafe; under the oak in the park; in "
        "the library",
        "ask": "what do you play against the early queen; was the rook move sound; how do you study "
        "endgames; who is on board one; can black hold that ending",
        "gear": "a chess clock; score sheets; the endgame book; a travel board; fresh pencils; the club key; "
        "a pairing list; spare pawns",
        "product": "travel chess set; endgame book; chess clock; puzzle book; magnetic board; wooden board",
    },
    "software": {
        "name": "the release; the code; the build; the login bug",
        "n": "parser; login page; database migration; unit test; build server; search function; cache; error "
        "message; +log files; +integration tests; pull request; deployment",
        "act": """fix/fixed/fixing: the login bug; a memory leak; the flaky test; the date parser
            write/wrote/writing: unit tests; the release notes; a small script
            refactor/refactored/refactoring: the cache; the search function; old database code
            deploy/deployed/deploying: the hotfix; version two; the new search""",
        "good": "all tests passed; the build went green; the query runs in ten milliseconds; the bug was one "
        "missing comma; the migration ran without errors; nobody noticed the switch",
        "bad": "the server crashed again; the build broke overnight; the tests timed out; we lost the log "
        "files; the migration locked the table; the cache served stale pages",
        "adj+": "fast; stable; readable; tidy; simple; robust",
        "adj-": "flaky; slow; messy; broken; complicated; buggy",
        "at": "at the office; in the server room; at the hackathon; at the coffee machine; in the meeting room",
        "ask": "who owns the parser; can you review my branch; why does the test hang; which version is in "
        "production; do we need the old endpoint",
        "gear": "a bigger disk; the access token; a staging server; the crash log; a code review; a spare "
        "laptop; the test data; a rollback plan",
        "product": "laptop stand; mechanical keyboard; docking station; database handbook; second monitor; "
        "quiet server",
    },
    "astronomy": {
        "name": "stargazing; the telescope; the night sky; the observatory",
        "n": "telescope; double star; crescent moon; star map; eyepiece; comet; tripod; meteor shower; "
        "+sunspots; +star charts; nebula; dark sky",
        "act": """observe/observed/observing: Saturn's rings; a double star; the comet; the crescent moon
            set up/set up/setting up: the telescope; the tripod in the field; the star tracker
            sketch/sketched/sketching: the lunar craters; the nebula; Jupiter's moons
            count/counted/counting: forty meteors; the sunspots; the stars in the cluster""",
        "good": "the sky was perfectly clear; the rings stood out sharply; we saw a bright fireball; the "
        "nebula showed faint arms; the comet had a fine tail; my eyes adapted well",
        "bad": "clouds rolled in at ten; the lens fogged up; the moon was too bright; a street lamp ruined "
        "the view; the mount kept drifting; I froze my fingers off",
        "adj+": "sharp; bright; breathtaking; steady; clear; easy to find",
        "adj-": "blurry; faint; dull; shaky; hard to find; hazy",
        "at": "on the hill; at the observatory; in the dark field; from the balcony; by the lake",
        "ask": "which eyepiece do you use for planets; when does the comet rise; is the hill dark enough; "
        "how do you align the mount; can you see the nebula from town",
        "gear": "a red torch; a star map; spare batteries; a warm hat; a moon filter; a folding chair; a dew "
        "heater; hot tea",
        "product": "beginner telescope; star atlas; moon filter; star lamp; tripod; pair of binoculars",
    },
    "knitting": {
        "name": "knitting; the knitting circle; the wool shop; crochet",
        "n": "left sleeve; cable pattern; wool; blanket; baby hat; lace shawl; collar; striped scarf; "
        "+mittens; +socks; cardigan; border",
        "act": """knit/knitted/knitting: a pair of socks; the left sleeve; a baby hat; twenty rows
            wind/wound/winding: the green wool; three skeins; the leftover yarn
            unravel/unravelled/unravelling: the collar; half the scarf; ten rows of lace
            finish/finished/finishing: the blanket; the striped scarf; the second mitten""",
        "good": "the cables lined up; the heel fits perfectly; the colours look lovely together; I did not "
        "drop a stitch; the wool is soft as a cloud; the shawl blocked out wide",
        "bad": "I dropped a stitch; I ran out of the blue wool; the sleeve came out too long; the cat got "
        "into the yarn; I misread the chart; the needles snapped",
        "adj+": "soft; cosy; even; colourful; warm; neat",
        "adj-": "itchy; tight; uneven; lopsided; tangled; baggy",
        "at": "at the wool shop; on the sofa; at the knitting circle; on the bus; by the stove",
        "ask": "which needles fit this yarn; how do you turn the heel; is there more of the green dye lot; "
        "how many stitches do I cast on; does this wool felt",
        "gear": "stitch markers; four skeins of blue; bamboo needles; a row counter; sewing thread; big "
        "buttons; a cable needle; sock yarn",
        "product": "sock pattern; merino yarn; needle set; wool winder; knitting bag; lace book",
    },
    "birds": {
        "name": "birdwatching; the marsh; the bird count; the feeder",
        "n": "kingfisher; barn owl; nest box; grey heron; bird hide; feeder; woodpecker; dawn chorus; "
        "+swallows; +binoculars; +wild geese; marsh",
        "act": """spot/spotted/spotting: a kingfisher; two herons; the barn owl; a rare warbler
            count/counted/counting: the swallows; sixty geese; the ducks on the lake
            clean/cleaned/cleaning: the nest box; the feeder; my binoculars
            watch/watched/watching: the woodpecker; the swifts at dusk; a pair of owls""",
        "good": "the owl sat in plain sight; a kingfisher flashed past; the geese came in at dusk; the "
        "chicks left the nest; the light on the reeds was perfect; we added two new species",
        "bad": "a dog scared the heron away; the fog hid everything; the squirrel emptied the feeder; the "
        "hide was locked; the warbler only sang and never showed; my binoculars misted up",
        "adj+": "close; calm; splendid; lively; busy; beautiful",
        "adj-": "distant; shy; empty; silent; hard to identify; damp",
        "at": "in the marsh; from the hide; at the reservoir; in the old oak wood; by the feeder",
        "ask": "when do the swifts leave; is that a marsh harrier; what seed do finches like; where did you "
        "see the owl; how high should the nest box hang",
        "gear": "sunflower hearts; the field guide; a lens cloth; rubber boots; a notebook; a thermos; fat "
        "balls; a nest box",
        "product": "field guide; pair of binoculars; window feeder; nest box camera; spotting scope; rain poncho",
    },
    "finance": {
        "name": "the budget; savings; the tax form; the household accounts",
        "n": "tax form; electricity bill; savings account; rent; monthly budget; insurance; spreadsheet; "
        "pension letter; +bank fees; +travel costs; loan; deposit",
        "act": """pay/paid/paying: the electricity bill; the rent; the last instalment; the insurance
            sort/sorted/sorting: the receipts; the tax papers; a year of invoices
            compare/compared/comparing: three loans; the savings rates; two insurance quotes
            save/saved/saving: fifty a week; for a new roof; a tenth of the salary""",
        "good": "the refund came through; we stayed under budget; the rate went up a little; I found a "
        "cheaper tariff; the numbers add up at last; the bank dropped the fee",
        "bad": "the bill doubled; I missed the deadline; the transfer bounced; a receipt went missing; the "
        "fees ate the interest; the spreadsheet was off by a hundred",
        "adj+": "affordable; fair; clear; modest; reasonable; easy to follow",
        "adj-": "overdue; confusing; steep; unexpected; odd; hard to justify",
        "at": "at the bank; at the notary; at the tax office; at the kitchen table; at the advice centre",
        "ask": "when is the tax form due; can we claim the travel costs; which account has no fees; is the "
        "loan fixed for ten years; how much should we put aside",
        "gear": "the receipts; last year's statement; a binder; the tax number; stamps; the loan contract; a "
        "calculator; payslips",
        "product": "budget planner; cash box; tax guide; receipt scanner; money handbook; desk calculator",
    },
    "parenting": {
        "name": "the kids; school; the baby; bedtime",
        "n": "school run; bedtime story; packed lunch; birthday party; pushchair; swimming lesson; toddler; "
        "homework; +school shoes; +twins; nursery; class trip",
        "act": """read/read/reading: a bedtime story; the dragon book again; to the twins
            pack/packed/packing: the lunch boxes; the swimming bag; spare clothes
            build/built/building: a blanket fort; a cardboard castle; a train track
            take/took/taking: the twins to school; the baby to the doctor; the kids to the playground""",
        "good": "the baby slept through; the twins shared their toys; she tied her own laces; he ate all his "
        "peas; the teacher was full of praise; nobody cried at drop-off",
        "bad": "the toddler drew on the wall; we were late for school; someone lost a shoe; nobody slept "
        "before midnight; the lunch box leaked; she came home with a fever",
        "adj+": "sweet; peaceful; hilarious; magical; easy; cheerful",
        "adj-": "exhausting; late; chaotic; loud; sticky; tiring",
        "at": "at the playground; at the school gate; in the nursery; at the paediatrician; on the living room floor",
        "ask": "who picks up the twins; did she take her gym bag; how do you get yours to sleep; is there "
        "school on the holiday; what did you put in the party bags",
        "gear": "nappies; a birthday cake; glue sticks; gym shoes; plasters; crayons; a night light; wet wipes",
        "product": "pushchair; picture book; baby carrier; toy kitchen; night light; lunch box",
    },
    "trains": {
        "name": "the train; the trip; the night train; the journey",
        "n": "night train; window seat; connection; platform; timetable; dining car; mountain line; ticket "
        "office; +reserved seats; +delays; sleeping car; border station",
        "act": """take/took/taking: the night train; the slow line; the early express; the scenic route
            book/booked/booking: a sleeper; two window seats; the return ticket
            catch/caught/catching: the last connection; the 6:40; the ferry train
            ride/rode/riding: the mountain line; in the sleeping car; the tram to the station""",
        "good": "the connection waited for us; we had a compartment alone; the view over the gorge was "
        "stunning; we arrived on the minute; the conductor found us a table; I slept like a stone",
        "bad": "the train stood still for an hour; the heating failed; our seats were double booked; I left "
        "my hat on the rack; the last bus was gone; they changed the platform twice",
        "adj+": "punctual; comfortable; scenic; spacious; quiet; cheap",
        "adj-": "delayed; crowded; late; draughty; overpriced; cramped",
        "at": "at the station; in the dining car; on platform nine; near the border; at the ticket office",
        "ask": "which side has the better view; do I need a reservation; is there a night train back; how "
        "long is the change; can I take my bike along",
        "gear": "a neck pillow; the paper tickets; sandwiches; a rail map; earplugs; a crossword; a small "
        "suitcase; the rail card",
        "product": "travel blanket; rail map; folding suitcase; luggage tag; travel pillow; rail atlas",
    },
    "photography": {
        "name": "photography; the camera; the darkroom; the photo walk",
        "n": "portrait; wide lens; tripod; darkroom; old camera; contact sheet; long exposure; backlight; "
        "+prints; +negatives; photo series; shutter",
        "act": """shoot/shot/shooting: two rolls of film; portraits of my uncle; the harbour; a long exposure
            develop/developed/developing: the negatives; the holiday film; a contact sheet
            edit/edited/editing: the portraits; the wedding series; fifty pictures
            print/printed/printing: the harbour picture; a small book; ten postcards""",
        "good": "the light was soft and golden; the focus sat right on the eye; the print has deep blacks; "
        "the fog made the picture; my uncle laughed at the right moment; the grain looks wonderful",
        "bad": "the battery died; I left the lens cap on; the film was blank; every shot came out blurred; "
        "the colours turned green; the memory card failed",
        "adj+": "sharp; moody; well lit; striking; balanced; crisp",
        "adj-": "blurry; overexposed; flat; grainy; crooked; dim",
        "at": "at the harbour; in the darkroom; on the old bridge; in the studio; in the old town",
        "ask": "which film do you use at night; how long do you fix the paper; is the studio free; what lens "
        "was that; do you shoot raw or not",
        "gear": "two rolls of film; a lens cloth; developer; a spare battery; photo paper; a memory card; a "
        "grey card; cotton gloves",
        "product": "camera bag; wide lens; photo printer; darkroom kit; carbon tripod; picture frame",
    },
    "fitness": {
        "name": "running; the gym; the workout; yoga",
        "n": "interval run; plank; yoga class; swim session; warm-up; half marathon; rowing machine; "
        "training plan; +squats; +push-ups; long run; cool-down",
        "act": """run/ran/running: eight kilometres; intervals on the track; up the stairs; along the river
            lift/lifted/lifting: heavier weights; the kettlebell; twice this week
            stretch/stretched/stretching: my back; both hips; after the run
            swim/swam/swimming: forty lengths; before work; in the cold lake""",
        "good": "I beat my old time; my knee did not hurt; my breathing stayed calm; I held the plank for "
        "three minutes; the coach added weight; I slept deeply afterwards",
        "bad": "I pulled a muscle; my calves cramped; I skipped the warm-up; the pool was shut; I ran out of "
        "breath; my shoulder clicked all the time",
        "adj+": "energising; strong; easy; relaxing; motivating; steady",
        "adj-": "brutal; stiff; tedious; painful; half-hearted; boring",
        "at": "at the gym; on the track; in the park; at the pool; on the yoga mat",
        "ask": "how often do you rest; which shoes do you run in; is the pool open early; how do you warm up "
        "your hips; what do you eat before a long run",
        "gear": "running socks; a foam roller; a water bottle; blister plasters; a resistance band; goggles; "
        "a towel; oat bars",
        "product": "foam roller; yoga mat; pair of running shoes; skipping rope; heart rate belt; rowing machine",
    },
    "boardgames": {
        "name": "game night; the board game; the dice game; the campaign",
        "n": "rulebook; dragon card; trading phase; final score; co-op mode; harbour tile; game box; scoring "
        "track; +wooden tokens; +dice; expansion; campaign map",
        "act": """play/played/playing: the island game; two rounds of cards; the space campaign; in teams
            explain/explained/explaining: the rules; the trading phase; the final scoring
            try/tried/trying: the dice game; the new expansion; a solo campaign
            sort/sorted/sorting: the tokens; the cards; the game shelf""",
        "good": "we beat the dragon in the last round; the trade deal paid off; everyone laughed until "
        "midnight; I drew the perfect card; the new player won; the rules clicked at once",
        "bad": "we ran out of time; I rolled nothing but ones; a token went missing; we got the rules wrong; "
        "the game dragged on for hours; someone spilled tea on the map",
        "adj+": "clever; tense; balanced; hilarious; beautiful; quick",
        "adj-": "random; fiddly; endless; confusing; unfair; badly printed",
        "at": "at game night; around the kitchen table; at the games cafe; in the library; in the attic",
        "ask": "how many can play; who explains the rules; do we use the expansion; can you trade after "
        "rolling; what do you play with two",
        "gear": "snacks; card sleeves; a dice tray; the expansion; score sheets; spare tokens; crisps; a bigger table",
        "product": "co-op game; card game; dice tray; strategy game; party game; expansion box",
    },
}
TOPICS: tuple[str, ...] = tuple(_TOPIC_TEXT)
"""Names of the topics."""

_LEXICA: dict[str, dict[str, tuple[Any, ...]]] = {
    topic: {slot: _acts(text) if slot == "act" else _list(text) for slot, text in lists.items()}
    for topic, lists in _TOPIC_TEXT.items()
}
for _lexicon in _LEXICA.values():
    _lexicon["out+"], _lexicon["out-"] = _lexicon["good"], _lexicon["bad"]

# A register: templates for the first sentence and for the others, last words ("Best wishes," takes the
# writer's name), numbers of sentences, full stops (where there is none, sentences are joined with `join`),
# abbreviations, lower case or not, and its own small lists.
_STYLE_TEXT: dict[str, dict[str, str]] = {
    "chat": {
        "first": """{hey} just {did} {laugh}
            {hey} gonna {do} {when}, wanna join?
            {hey} {out} {laugh}
            {hey} the {n} {was} {int} {adj} {laugh}
            {hey} {ask}?
            {hey} {doing} rn, {out}
            {hey} still {doing}? the {n} {is} {int} {adj} btw
            {hey} u bringing {gear} {when}?
            {hey} {doing} {at} {when} or nah?""",
        "body": """{out} {laugh}
            the {n} {was} {int} {adj}
            {hedge} gonna {do} {when}
            {ask}?
            {who} says the {n} {is} {int} {adj}
            can u bring {gear}?
            {hedge} the {n} next time
            shoulda been {at}
            wanna {do} {when}?
            nvm, got {gear} {laugh}
            ngl the {n} looked {int} {adj}
            tell {friend} i {did}
            meet u {at} {when}""",
        "hey": "hey {friend},; omg; lol; ok so; yo; haha; guess what,; heyy; sooo; psst; dude; hiya "
        "{friend}!; ugh; {friend}!!; wait,",
        "laugh": "lol; haha; 😂; :); xD; :D; omg; hehe; 🙈; ;; tbh; smh; fr; 🎉; <3",
        "hedge": "prob; maybe; idk,; i guess; tbh; kinda think i'm; def; not sure but",
        "int": "so; sooo; super; kinda; totally; mega; way; lowkey; pretty; insanely",
        "close": ";;;cu; x; ttyl; 👋; laters; byeee; lmk; 😘; k?; 👍; xx",
        "size": "2; 2; 3; 3; 4",
        "stop": ";;!; ..; ...; !!; 😅; 🙂; lol",
        "join": ",; ...; -; /; .",
        "case": "lower; lower; sentence",
    },
    "mail": {
        "first": """{dear} thank you for your help with the {n} {past}
            {dear} the {n} {is} still {int} {adj-}, I am afraid
            {dear} regarding the {n}: {ask}?
            {dear} as agreed, I {did} {past}
            {dear} could you please bring {gear} {when}?
            {dear} would you be free to {do} {when}?
            {dear} about {name}: I {did} {past}, and {out}
            {dear} a short report on the {n}: {out}
            {dear} we are {doing} {at} {when} and you are warmly invited""",
        "body": """I am {pleased} to report that {out}
            {mayhap} we should {do} {when}
            please let me know whether you could {do} {when}
            I would suggest that we {do} {when}
            {friend} has kindly offered {gear}
            as for the {n}, {it} {was} {int} {adj}
            I have also asked {friend} about the {n}
            if it suits you, we could meet {at} {when}
            may I ask you one thing: {ask}?
            we will need {gear} and {gear} by {day}
            I must admit that {out}""",
        "dear": "Dear {friend},; Hello {friend},; Hi {friend},; Good morning {friend},; Good evening "
        "{friend},; Dear all,; Dear {friend} and {friend},; Hi everyone,; {friend},",
        "pleased+": "glad; happy; pleased; delighted; proud; relieved",
        "pleased-": "sorry; obliged; sad; embarrassed; forced",
        "mayhap": "perhaps; in my opinion,; if I may say so,; I believe; as I see it,; it seems to me that; "
        "personally, I think",
        "int": "very; most; rather; quite; remarkably; somewhat; particularly; exceptionally",
        "close": "Best wishes,; Kind regards,; Many thanks,; Yours,; Warm regards,; All the best,; "
        "Sincerely,; With thanks,; Cheers,; Take care,; See you soon,; Looking forward to your reply,",
        "size": "2; 2; 2; 3",
        "stop": ".",
        "join": ".",
        "case": "sentence",
    },
    "note": {
        "first": """{todo} {do} {when}
            {todo} get {gear}, {gear}, {gear}
            {todo} {gear} for {name}
            {todo} {n} - {do}
            {todo} {n} {adj-}, {do} {when}
            {todo} ask {friend} re {n}
            {todo} {name}, {day}: {do}, {do}""",
        "body": """{do} by {day}
            pick up {gear}
            check {n}
            ask {friend}: {ask}?
            call {friend} re {n}
            return {gear} to {friend}
            {n} = {adj}
            {gear}: how much?
            {day}: {do}
            {n} {urgent}
            then {do}""",
        "todo": "TODO:; -; [ ]; Reminder:; Don't forget:; Memo:; *; Note to self:; !!; {day}:; Must:; List:; >",
        "urgent": "(urgent); !!!; - can wait; asap; ???; (maybe); - done?; (ask first)",
        "close": ";;;- done by {day}; (!); etc.; OK; {when}",
        "size": "3; 3; 4; 5",
        "stop": "",
        "join": ",; |; +; /; -; &",
        "case": "lower; sentence",
    },
    "review": {
        "first": """{stars} This {product} is {int} {verdict}
            {stars} {verdict} {product}, used it for {doing}
            {stars} Bought this {product} for {doing}
            {stars} a(n) {int} {verdict} {product} for {doing}
            {stars} After a month with this {product}: {out}
            {stars} Got the {product} {past} and {did} with it""",
        "body": """my {n} {was} {int} {adj} with it
            {who} tried it too and called it {int} {verdict}
            used it {at} and {out}
            the {product} arrived {arrived}
            {advice}
            for the price it is {int} {verdict}
            compared with our old one, this {product} is {int} {verdict}
            in short: {verdict}
            on the very first try, {out}
            customers should know that {out}""",
        "stars+": "5/5.; 4/5.; Five stars.; Four stars:; ★★★★★; ★★★★☆; Recommended!; Great buy.; 10/10.; Pros only:",
        "stars-": "1/5.; 2/5.; One star.; Two stars:; ★☆☆☆☆; ★★☆☆☆; Disappointed.; Avoid.; 3/10.; Not for me:",
        "verdict+": "useful; sturdy; practical; well made; solid; handy; lovely; reliable",
        "verdict-": "flimsy; overpriced; useless; badly made; disappointing; shoddy; clumsy; unreliable",
        "arrived+": "on time; well packed; a day early; with clear instructions",
        "arrived-": "late; scratched; without instructions; in a torn box",
        "advice+": "would buy again; ideal as a gift; highly recommended; get it before it sells out; no "
        "complaints at all",
        "advice-": "would not buy again; sent it back; save your money; still waiting for a refund; look elsewhere",
        "int": "really; genuinely; surprisingly; incredibly; truly; absolutely; simply; frankly",
        "close": ";;;; Verified purchase.; Will update.; Hope this helps.; Value: {few}/5.; Would recommend to {who}.",
        "few": "1; 2; 3; 4; 5",
        "size": "2; 3; 3; 4",
        "stop": ".; .; !",
        "join": ".",
        "case": "sentence",
    },
    "diary": {
        "first": """{dated} I {did} {at}, and {out}
            {dated} {did} with {who}
            {dated} {woke} and {did} {at}
            {dated} spent hours {doing}
            {dated} {who} and I {did}
            {dated} the {n} kept me busy; {out}
            {dated} thought about the {n} while {doing}""",
        "body": """{out}, and I felt {feeling}
            later I {did} {at} with {who}
            afterwards we talked about the {n}
            I keep thinking of the {n}, so {int} {adj}
            {who} laughed when I told the story: {out}
            how {adj} the {n} {was}
            I wonder why {doing} makes me {feeling}
            {weather}
            must {do} {when}, I promised {who}
            for once I was {feeling}
            it struck me that {out}
            I {did} until it got dark""",
        "dated": "{day}.; {day} night.; Dear diary,; {day}, rain.; {day}, sunshine.; Today; Late again.; A "
        "quiet {day}.; This evening; Strange day.; {day} morning.",
        "woke": "woke at six; got up late; skipped breakfast; slept badly; stayed home; took the day off",
        "feeling+": "content; at peace; proud; light-hearted; grateful; wide awake; ten years old again",
        "feeling-": "tired; low; restless; a little lonely; cross with myself; homesick; empty",
        "weather": "the evening was mild and the swallows flew low; rain on the window all night; first "
        "frost on the roofs; the street lay quiet under the snow; a warm wind came up after dark; thunder "
        "far away; the moon stood over the chimneys",
        "int": "strangely; terribly; wonderfully; hopelessly; quietly; oddly; dreadfully; tenderly",
        "close": ";;;; To bed now.; Enough for today.; So it goes.; Good night.; More tomorrow.; And yet.",
        "size": "2; 2; 3; 3",
        "stop": ".; .; ...",
        "join": ".",
        "case": "sentence",
    },
    "forum": {
        "first": """{post} {ask}?
            {post} my {n} {is} {int} {adj-} and I have no idea why
            {post} has anyone here tried {doing} {at}?
            {post} is it normal that the {n} {is} {int} {adj-}?
            {post} tips for {doing}?
            {post} which {product} would you get for {doing}?
            {post} I {did} {past} and {bad}
            {post} update on my {n}: {out}""",
        "body": """I already {did}, but {bad}
            {did} {past}, same result
            {newbie}, so please be {gentle}
            someone in another thread said to {do}
            would {gear} help?
            does {doing} make any difference?
            my setup: {gear}, {gear} and a(n) {product}
            {ask}?
            edit: {did}, and now {good}
            what worked for me was {doing}
            the {n} {is} {int} {adj-} as well""",
        "post": "Question:; Hi all,; Hello from a newcomer,; Help needed:; Long-time reader here,; [solved]; "
        "[question]; Quick poll:; Hey folks,; Beginner question:; Sorry if asked before:; Greetings forum,",
        "newbie": "I am new to all this; complete beginner here; only started in spring; second season for "
        "me; coming back after years",
        "gentle": "gentle; patient; honest; specific; kind",
        "int": "rather; fairly; extremely; noticeably; slightly; constantly; seriously; weirdly",
        "close": ";;; Thanks in advance.; Any ideas?; TIA!; Cheers,; Thoughts?; Appreciate any pointers.; "
        "Photos below.; Solved, thanks!",
        "size": "2; 2; 3; 3",
        "stop": ".; .; !; ...",
        "join": ".",
        "case": "sentence",
    },
}
REGISTERS: tuple[str, ...] = tuple(_STYLE_TEXT)
"""Names of the registers."""

_SHORT = {
    "chat": (
        "",
        "you=u; are=r; your=ur; please=pls; thanks=thx; people=ppl; great=gr8",
        "tomorrow=tmrw; with=w/; and=&; because=cuz; weekend=wknd; tonight=2nite; before=b4",
        "going to=gonna; the=da; this=dis; that=dat; my=ma; everyone=every1; someone=some1",
        "was=woz; really=rly; something=smth; probably=prolly; about=bout; nothing=nuthin",
    ),
    "note": (
        "",
        "Monday=Mon; Tuesday=Tue; Wednesday=Wed; Thursday=Thu; Friday=Fri; Saturday=Sat; Sunday=Sun; "
        "tomorrow=tmw; week=wk",
        "the=; my=; an=",
        "and=&; with=w/; without=w/o; before=bef.; after=aft.; next week=next wk; tonight=tonite",
    ),
}


def _style(register: str, lists: dict[str, str]) -> dict[str, tuple[Any, ...]]:
    """Compile a register: templates, lists (items with slots become templates), and surface functions."""
    style: dict[str, tuple[Any, ...]] = {}
    for slot, text in lists.items():
        if slot in ("first", "body"):
            style[slot] = tuple(_template(line) for line in text.splitlines())
        elif slot == "case":
            style[slot] = tuple(case == "lower" for case in _list(text))
        elif slot == "size":
            style[slot] = tuple(int(size) for size in _list(text))
        else:
            style[slot] = tuple(_template(item) if "{" in item or slot == "close" else item for item in _list(text))
    style["short"] = tuple(_respell(pairs) for pairs in _SHORT.get(register, ("",)))
    return style


_STYLES: dict[str, dict[str, tuple[Any, ...]]] = {
    register: _style(register, lists) for register, lists in _STYLE_TEXT.items()
}
