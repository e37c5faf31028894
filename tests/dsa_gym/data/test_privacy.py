"""The scrubber: planted identifiers are found, what only looks like one stays, and time is linear."""

from __future__ import annotations

import builtins
import ipaddress
import random
from collections.abc import Callable
from typing import Any

import pytest
import stdnum.iban
import stdnum.luhn
from hypothesis import given, settings
from hypothesis import strategies as st
from stdnum.iso7064 import mod_97_10

from dsa_gym.data.privacy import KINDS, Scrubber

SALT = "nobody can guess this"
SCRUBBER = Scrubber(SALT)


def replaced(text: str) -> tuple[str, dict[str, int]]:
    scrubber = Scrubber(SALT)
    return scrubber.scrub(text), dict(+scrubber.counts)


# Planted identifiers

WORDS = ["sparrow", "lantern", "meadow", "copper", "violin", "harbour", "thistle", "pebble", "saffron", "walnut"]


def word(draw: random.Random) -> str:
    return draw.choice(WORDS)


def digits(draw: random.Random, count: int) -> str:
    return "".join(draw.choice("0123456789") for _ in range(count))


def grouped(text: str, sizes: list[int], mark: str) -> str:
    parts = []
    for size in sizes:
        parts.append(text[:size])
        text = text[size:]
    return mark.join(part for part in [*parts, text] if part)


def url(draw: random.Random) -> str:
    name, top = word(draw), draw.choice(["com", "org", "co.uk", "io", "de"])
    return draw.choice(
        [
            f"https://{name}.{top}",
            f"http://www.{name}.{top}/{word(draw)}?id={digits(draw, 6)}&mail=a@b.co#x",
            f"HTTPS://{name}.{top}:8080/{word(draw)}_({word(draw)})",
            f"ftp://{name}.{top}/{word(draw)}.tar.gz",
            f"http://{digits(draw, 2)}.1.2.3/{word(draw)}",
            f"www.{name}.{top}",
            f"{name}.{top}/@{word(draw)}/{digits(draw, 9)}",
            f"m.{name}.{top}/{word(draw)}/",
        ]
    )


def email(draw: random.Random) -> str:
    local = draw.choice(
        [
            word(draw),
            f"{word(draw)}.{word(draw)}",
            f"{word(draw)}+{word(draw)}",
            f"{word(draw)}_{digits(draw, 4)}",
            "é.ü",
        ]
    )
    host = draw.choice(["example.com", "mail.example.co.uk", "uni-example.de", "EXAMPLE.ORG", "a.museum"])
    return f"{local}@{host}"


def ip(draw: random.Random) -> str:
    four = ipaddress.IPv4Address(draw.getrandbits(32))
    six = ipaddress.IPv6Address(draw.getrandbits(64) | 0x20010DB8 << 96)
    short = ipaddress.IPv6Address(0x20010DB8 << 96 | draw.getrandbits(16))
    return draw.choice([str(four), str(four), six.compressed, six.exploded, short.compressed, f"::ffff:{four}"])


def iban(draw: random.Random) -> str:
    country, bank, count = draw.choice(
        [("DE", "", 18), ("GB", "WEST", 14), ("NO", "", 11), ("FR", "", 23), ("ES", "", 20)]
    )
    while True:  # some countries have check digits of their own
        body = bank + digits(draw, count)
        candidate = country + mod_97_10.calc_check_digits(body + country) + body
        if stdnum.iban.is_valid(candidate):
            break
    return draw.choice([candidate, grouped(candidate, [4] * 9, " "), candidate.lower()])


def account(draw: random.Random) -> str:
    ssn = f"{draw.randrange(100, 666)}-{draw.randrange(10, 99)}-{draw.randrange(1000, 9999)}"
    return draw.choice([iban(draw), iban(draw), ssn])


ANNOUNCED = [
    "my account number is {}",
    "Acct #{}",
    "account no. {}",
    "account: {}",
    "routing number {}",
    "Routing: {}",
    "ACCT {}",
    "the IBAN is {}",
    "social security number {}",
    "SSN: {}",
    "bank account {}",
    "sort code {}",
]


CARDS = [
    ("4", 16, [4, 4, 4]),
    ("4", 13, [13]),
    ("51", 16, [4, 4, 4]),
    ("2221", 16, [4, 4, 4]),
    ("37", 15, [4, 6]),
    ("36", 14, [4, 6]),
    ("6011", 16, [4, 4, 4]),
    ("62", 19, [4, 4, 4, 4]),
]


def card(draw: random.Random) -> str:
    begin, length, sizes = draw.choice(CARDS)
    number = begin + digits(draw, length - len(begin) - 1)
    number += stdnum.luhn.calc_check_digit(number)
    return draw.choice([number, grouped(number, sizes, " "), grouped(number, sizes, "-")])


def phone(draw: random.Random) -> str:
    area = draw.choice(["212", "415", "617", "303", "206"])
    middle, last = f"{draw.randrange(200, 999)}", digits(draw, 4)
    if middle.endswith("11"):  # no exchange: 411 and 911 are numbers of their own
        middle = "555"
    return draw.choice(
        [
            f"({area}) {middle}-{last}",
            f"{area}-{middle}-{last}",
            f"{area}.{middle}.{last}",
            f"{area} {middle} {last}",
            f"{area}{middle}{last}",
            f"1-{area}-{middle}-{last}",
            f"+1 {area} {middle} {last}",
            f"+1 ({area}) {middle}-{last}",
            f"+1{area}{middle}{last}",
            f"+44 20 7{digits(draw, 3)} {last}",
            f"+44 (0)20 7{digits(draw, 3)} {last}",
            f"+49 30 2{digits(draw, 7)}",
            f"+33 1 42 {digits(draw, 2)} {digits(draw, 2)} {digits(draw, 2)}",
            f"+61 2 9{digits(draw, 3)} {last}",
            f"+91 98{digits(draw, 3)} {digits(draw, 5)}",
            f"+41442{digits(draw, 6)}",
        ]
    )


def handle(draw: random.Random) -> str:
    name = f"{word(draw)}{draw.choice(['', '_', '_x'])}{draw.choice(['', digits(draw, 3)])}"
    return draw.choice(
        [f"@{name}", f"u/{name}", f"/u/{name}", f"@{name.title()}", f"@{digits(draw, 1)}{name}", "@żółw"]
    )


SENTENCES = [
    "{}",
    "{} is what I wrote down.",
    "You can use {}.",
    "It was {}, I think, or was it?",
    "Ask for it ({}) in 3 days!",
    'she said "{}" twice, in 2019',
    "line one\n{}\nline three",
    "[{}]",
    "first {}; then 12 more",
    "{}\u2014nobody knew",
    "the \u201c{}\u201d one, at 5:30",
    "see: {}",
    "\u0434\u0430, {} \u2014 \u043e\u043d",
    "\U0001f600 {} \U0001f600",
]
MAKERS: dict[str, Callable[[random.Random], str]] = {
    "URL": url,
    "EMAIL": email,
    "IP": ip,
    "ACCOUNT": account,
    "CARD": card,
    "PHONE": phone,
    "USER": handle,
}


@pytest.mark.parametrize("kind", KINDS)
def test_recall_on_planted_identifiers(kind: str) -> None:
    """200 of each kind: at least 99 % are replaced by their kind, and the sentence around stays."""
    draw = random.Random(KINDS.index(kind))
    missed, scrubber = [], Scrubber(SALT)
    for _ in range(200):
        sentence, planted = draw.choice(SENTENCES), MAKERS[kind](draw)
        if scrubber.scrub(sentence.format(planted)) != sentence.format(f"[{kind}]"):
            missed.append(sentence.format(planted))
    assert len(missed) <= 2, missed
    assert scrubber.counts[kind] >= 198
    assert scrubber.counts.total() - scrubber.counts[kind] <= 2


@pytest.mark.parametrize("announcement", ANNOUNCED)
def test_recall_on_announced_accounts(announcement: str) -> None:
    draw = random.Random(0)
    for _ in range(10):
        number = digits(draw, draw.randrange(6, 13))
        for form in (number, grouped(number, [2, 2, 2], "-"), grouped(number, [4, 4], " ")):
            for sentence in SENTENCES:
                text = sentence.replace("{}", announcement)
                assert replaced(text.format(form)) == (text.format("[ACCOUNT]"), {"ACCOUNT": 1})


def test_several_in_one_text_are_counted_by_kind() -> None:
    draw = random.Random(1)
    planted = {kind: [make(draw) for _ in range(3)] for kind, make in MAKERS.items()}
    text = " and ".join(f"{kind} {one}" for kind, some in planted.items() for one in some)
    expected = " and ".join(f"{kind} [{kind}]" for kind in planted for _ in range(3))
    scrubber = Scrubber(SALT)
    assert scrubber.scrub(text) == expected
    assert scrubber.counts == dict.fromkeys(KINDS, 3)
    scrubber.scrub(text)
    assert scrubber.counts == dict.fromkeys(KINDS, 6)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("see [this](https://a.example/b_(c)), ok", "see [this]([URL]), ok"),
        ("mailto:a@b.co", "mailto:[EMAIL]"),
        ("<a@b.co>", "<[EMAIL]>"),
        ("https://me:secret@example.com/x", "[URL]"),
        ("@ann@mastodon.social", "@[EMAIL]"),
        (".@ann hello", ".[USER] hello"),
        ("4111 1111 1111 1111 12/25 123", "[CARD] 12/25 123"),
        ("10.0.0.1:8080 and [2001:db8::1]:443", "[IP]:8080 and [[IP]]:443"),
        ("pay GB82 WEST 1234 5698 7654 32 and BE68 5390 0754 7034 then", "pay [ACCOUNT] and [ACCOUNT] then"),
        ("+44 2079 460958", "[PHONE]"),
        ("tel:+1-212-555-0123", "tel:[PHONE]"),
        ("212-555-0123 x45", "[PHONE]"),
        ("卡号4111111111111111和212-555-0123。看@ann。看www.example.com", "卡号[CARD]和[PHONE]。看[USER]。看[URL]"),
    ],
)
def test_edges_of_identifiers(text: str, expected: str) -> None:
    assert SCRUBBER.scrub(text) == expected


def test_national_phone_numbers_are_those_of_the_region() -> None:
    text = "020 7946 0958 and (212) 555-0123"
    assert Scrubber(SALT, region="GB").scrub(text) == "[PHONE] and (212) 555-0123"
    assert Scrubber(SALT, region="US").scrub(text) == "020 7946 0958 and [PHONE]"


# What stays

UNTOUCHED = """
$1,299.99 or €1.299,99
£12.50 each, 3 for £30
it costs 1200000 dollars
$2125550123
on 2024-02-29 at 14:05
29/02/2024, 29.02.2024 and 02-29-2024
2024-02-29T14:05:33.123456Z
20240229
20240229140533
from 1914-1918 and 1939/1945
2019 2020 2021 2022 2023
2019-2020 2021-2022
the years 1999, 2000 and 2001
10:30:45 and 7:05
at 12::30
ISBN 978-0-306-40615-7
ISBN 9780306406157
ISBN 0-306-40615-2
ISBN 2-253-00422-1
ISSN 0378-5955
version 1.2.3
v1.2.3.4
version 10.0.0.1
release 2.31.0.1
Firmware 1.0.0.12
Chrome 91.0.4472.124
1.2.3.4.5
section 4.1.2.3.7
1/2 cup and 3/4 of 5/6
they won 3-2, then 10-9 and 21-19
John 3:16 and Genesis 1:1-2:3
e.g., C++ and i.e. C#
a.b and x.y.z
std::vector<int> and a::b and std::cafe
Foo::Bar::baz
meet @ 5 pm
@5pm @10am @2nd @60fps
and/or, he/she, w/o, n/a
you/me and u/a
r/python and /r/aww
menu/list
#hashtag #2020 #1
3.14159265358979
0.4111111111111111
1234567890123456
4111111111111112
4111 1111 1111 1112
1700000000000
1700000000
170000000000000000018
1e-10, 6.022e23
555-0123
part no. 555-1234-567
AB-212-555-0123
SKU 4111-22-X
order 00012345
account of 2019
account 1234
the accounts 2019-2020
account for 12345678 reasons
000-12-3456 and 666-12-3456
DE00 3704 0044 0532 0130 00
AB12 CDEF 3456 7890
00:1B:44:11:3A:B7
999.1.1.1 and 256.256.256.256
192.168.1
50% of 100%
a@b
foo@localhost
@
www. and http://
example.com
readme.md and main.py
etc.../
:-) ;-) :/ =/
Wait...what?!
1,000,000,000,000,000
(1) (2) (3) (4) (5) (6) (7)
1 2 3 4 5 6 7 8 9 10
12 34 56 78 90 12 34
68° F, 20°C, 5'11"
[URL] [EMAIL] [IP] [ACCOUNT] [CARD] [PHONE] [USER]
""".strip().splitlines()


@pytest.mark.parametrize("text", UNTOUCHED)
def test_what_stays(text: str) -> None:
    assert replaced(text) == (text, {})
    assert replaced(f"Well, {text} it is") == (f"Well, {text} it is", {})


@settings(deadline=None)
@given(st.text(st.characters(exclude_categories=["Nd", "Nl", "No"], exclude_characters="@/.")))
def test_text_without_digits_and_marks_stays(text: str) -> None:
    assert replaced(text) == (text, {})


PIECES = st.one_of(
    st.sampled_from(
        ["@", ".", "/", ":", "-", " ", "(", ")", "+", "u/", "http://", "www.", ".com", "account ", "x", "é"]
    ),
    st.sampled_from(
        ["a@b.co", "4111 1111 1111 1111", "(212) 555-0123", "10.0.0.1", "2001:db8::1", "DE893704004405320130"]
    ),
    st.text("0123456789 -.", max_size=8),
    st.text(max_size=4),
)


@settings(deadline=None, max_examples=300)
@given(st.lists(PIECES, max_size=12).map("".join))
def test_scrubbing_is_idempotent(text: str) -> None:
    once = SCRUBBER.scrub(text)
    assert replaced(once) == (once, {})


LONG = "ab12" + 40 * "x"


# A megabyte of what makes regular expressions slow; none takes longer than some seconds, quadratic time would be hours.
@pytest.mark.parametrize(
    "piece",
    [*"a1:/", "a.", "a@", "a@a.", "a@b.co@", "http://)", "ab://. ", "account 1-", "u/", "www.", "x.com", LONG],
    ids=repr,
)
def test_long_texts(piece: str) -> None:
    text = piece * (1_000_000 // len(piece))
    once = SCRUBBER.scrub(text)
    assert len(once) < 2 * len(text)
    assert SCRUBBER.scrub(once) == once


@pytest.mark.slow
@pytest.mark.parametrize("piece", ["@1", "1:", "1 ", "4444 ", "4111 1111 1111 1112 ", "+1 (", "1.", "ab12 "])
def test_long_texts_of_numbers(piece: str) -> None:
    assert len(SCRUBBER.scrub(piece * (1_000_000 // len(piece)))) <= 1_000_000


# Users


def test_ids_of_users() -> None:
    one, other = Scrubber(SALT), Scrubber(SALT + "!")
    names = ["ann", "bob", "Ann", "ann ", "用户", "\ud83d"]
    ids = [one.anonymise(name) for name in names]
    assert ids == [Scrubber(SALT).anonymise(name) for name in names]
    assert len({*ids, *(other.anonymise(name) for name in names)}) == 2 * len(names)
    assert all(len(user) == len("user-") + 16 and int(user[5:], 16) >= 0 for user in ids)
    assert one.anonymise("ann") == "user-8096821eb0120369"  # users keep their ids in the next version
    assert one.counts.total() == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"salt": "short"}, "salt: expected at least 16 characters that nobody can guess, got 5"),
        ({"salt": SALT, "region": "Europe"}, "region='Europe': expected the two capital letters of a country"),
    ],
)
def test_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Scrubber(**arguments)


@pytest.mark.parametrize("missing", ["phonenumbers", "stdnum.iban"])
def test_missing_libraries_name_the_extra(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    original = builtins.__import__

    def without(name: str, *arguments: Any, **others: Any) -> Any:
        if name == missing:
            raise ImportError(name)
        return original(name, *arguments, **others)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r'pip install "dsa-gym\[privacy\]"'):
        Scrubber(SALT)
