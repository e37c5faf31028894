"""Scrubbing of texts: what identifies a person is replaced by a placeholder, and users' names by opaque ids.

It finds identifiers that have a form (addresses, numbers, handles), not names of people or places.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import re
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

__all__ = ["KINDS", "Scrubber"]

KINDS = ("URL", "EMAIL", "IP", "ACCOUNT", "CARD", "PHONE", "USER")
"""What is replaced, each by its name in brackets, in the order in which it is looked for."""

_SHORTEST_SALT = 16
_GAP = r"[ \u00a0\u2009\u202f-]"
_IN_URL = r"[^\s<>\"\u201c\u201d\u201e\u2018\u2019\u00ab\u00bb\u2014]"
_DOMAINS = (
    "com|org|net|edu|gov|io|co|me|info|biz|tv|ly|gl|gg|be|app|dev|ai|uk|de|fr|eu|us|ca|au|in|jp|nl|it|es|ch|ru|br"
)

# All repetitions are bounded, or end where the next match may begin: time is linear in the length of the text.
# Only ASCII letters hold off a match: not all scripts put spaces between words.
_URL = re.compile(
    rf"(?<![a-z0-9])[a-z][a-z0-9+.-]{{1,20}}://{_IN_URL}+"
    rf"|(?<![a-z0-9_@.-])www\.{_IN_URL}+"
    rf"|(?<![a-z0-9_@./-])(?:[a-z0-9-]{{1,63}}\.){{1,5}}(?:{_DOMAINS})/{_IN_URL}+",
    re.IGNORECASE,
)
_EMAIL = re.compile(r"(?<![\w.%+-])[\w%+](?:[\w.%+'-]{0,62}[\w%+-])?@(?:[\w-]{1,63}\.){1,8}[^\W\d_]{2,24}(?!\w)")
_IP4 = re.compile(r"(?<![\w.])(?:[0-9]{1,3}\.){3}[0-9]{1,3}(?!\w|\.\d)", re.ASCII)
_IP6 = re.compile(
    r"(?<![\w:.])(?=[0-9a-f]*:)[0-9a-f:]{2,39}(?:[0-9]{0,3}(?:\.[0-9]{1,3}){3})?(?![\w:]|\.\d)",
    re.IGNORECASE | re.ASCII,
)
_VERSION = re.compile(r"(?:\bv|\bver|version|release|build|firmware)[.:]? ?\Z", re.IGNORECASE)
_IBAN = re.compile(
    r"(?<!\w)[a-z]{2}[0-9]{2}"
    rf"(?:[a-z0-9]{{11,30}}|(?:{_GAP}[a-z0-9]{{4}}){{2,7}}(?:{_GAP}[a-z0-9]{{1,3}})?)(?!\w)",
    re.IGNORECASE | re.ASCII,
)
_SSN = re.compile(r"(?<![\w-])[0-9]{3}-[0-9]{2}-[0-9]{4}(?![\w-])", re.ASCII)
_ANNOUNCED = re.compile(
    r"\b(?:accounts?|acct|a/c|iban|routing|aba|sort code|ssn|social security)\b\.?"
    r"(?: (?:numbers?|no|num|nr|code|id)\b\.?)?"
    rf"[ \t]?(?:is|was|:|=|#|-){{0,2}}[ \t]{{0,2}}[#(]?(?P<number>[0-9](?:{_GAP}?[0-9]){{5,19}})(?!\w)",
    re.IGNORECASE | re.ASCII,
)
_CARD = re.compile(rf"(?<![\w.])[2-6][0-9]{{2,18}}(?:{_GAP}[0-9]{{1,6}}){{0,5}}(?!\w)", re.ASCII)
_ISSUER = re.compile(r"2[2-7]|3[04-9]|[4-6]")
_PHONE = re.compile(r"\d(?:\D{0,4}\d){6}")
_USER = re.compile(
    r"(?<![a-z0-9_@])@(?=[0-9_]*[^\W\d_])(?![0-9]+[a-z]{0,3}\b)\w{1,50}"
    r"|(?<![\w/])/?u/[a-z0-9_-]{3,32}(?![\w-])",
    re.IGNORECASE,
)

Spans = Iterator[tuple[int, int]]
"""Where something is in a text: begins and ends, in order and without overlap."""


class Scrubber:
    """Replaces identifiers in texts by placeholders, and counts them.

    Attributes:
        counts: how many of each kind have been replaced so far.
    """

    def __init__(self, salt: str, *, region: str = "US") -> None:
        """Set the key of the users' ids.

        Args:
            salt: secret key: with it, anyone can find out whose id it is by trying names.
            region: country (ISO 3166) whose national phone numbers are found; international ones always are.

        Raises:
            ValueError: If the salt is short or the region unknown.
            ImportError: If the libraries of the extra `privacy` are not installed.
        """
        if len(salt) < _SHORTEST_SALT:
            raise ValueError(
                f"salt: expected at least {_SHORTEST_SALT} characters that nobody can guess, got {len(salt)}"
            )
        try:
            import phonenumbers
            import stdnum.iban
            import stdnum.luhn
            import stdnum.us.ssn
        except ImportError as error:
            raise ImportError(
                'scrubbing needs phonenumbers and python-stdnum: pip install "dsa-gym[privacy]"'
            ) from error
        if region not in phonenumbers.SUPPORTED_REGIONS:
            raise ValueError(f"region={region!r}: expected the two capital letters of a country, such as 'US'")
        self.counts: Counter[str] = Counter()
        self._salt = salt.encode()
        self._region = region
        self._phonenumbers: Any = phonenumbers
        # Without the rules of single countries, some of which ask whether there is such a bank.
        self._is_iban = partial(stdnum.iban.is_valid, check_country=False)
        self._is_luhn = stdnum.luhn.is_valid
        self._is_ssn = stdnum.us.ssn.is_valid

    def anonymise(self, user: str) -> str:
        """The opaque id that stands for a user: the same for the same name and salt, unlinkable across salts.

        It is HMAC-SHA256 of the name, of which 64 bits are kept: among 10 million users two share an id with a
        probability of 3 in a million.
        """
        return f"user-{hmac.new(self._salt, user.encode('utf-8', 'surrogatepass'), hashlib.sha256).hexdigest()[:16]}"

    def scrub(self, text: str) -> str:
        """Replace what identifies a person by its kind, for example `[EMAIL]`; idempotent.

        The time is linear in the length of the text.
        """
        # Once more after a change: what touched an identifier may be one itself now.
        while (scrubbed := self._pass(text)) != text:
            text = scrubbed
        return text

    def _pass(self, text: str) -> str:
        finders = (_urls, _emails, _addresses, self._accounts, self._cards, self._phones, _handles)
        for kind, find in zip(KINDS, finders, strict=True):
            pieces, end = [], 0
            for start, stop in find(text):
                pieces += [text[end:start], f"[{kind}]"]
                end = stop
            self.counts[kind] += len(pieces) // 2
            text = "".join([*pieces, text[end:]]) if pieces else text
        return text

    def _accounts(self, text: str) -> Spans:
        """IBANs, US social security numbers, and numbers that a word announces."""
        spans = [
            *_accepted(_IBAN, text, self._iban_end),
            *(
                match.span("number")
                for match in _ANNOUNCED.finditer(text)
                if not _years(re.split(_GAP, match["number"]))
            ),
        ]
        spans += [match.span() for match in _SSN.finditer(text) if self._is_ssn(match[0])]
        return _disjoint(spans)

    def _iban_end(self, match: re.Match[str]) -> int | None:
        return next((end for end in _ends(match) if self._is_iban(match.string[match.start() : end])), None)

    def _cards(self, text: str) -> Spans:
        """Card numbers: 13 to 19 digits that a card's issuer could have given, with a valid check digit (Luhn)."""
        return _accepted(_CARD, text, self._card_end)

    def _card_end(self, match: re.Match[str]) -> int | None:
        for end in _ends(match):
            groups = re.split(_GAP, match.string[match.start() : end])
            digits = "".join(groups)
            # Lists of short numbers are no cards, nor are ISBNs and years.
            if 13 <= len(digits) <= 19 and all(len(group) >= 4 for group in groups[:-1]) and self._is_luhn(digits):
                return end if _ISSUER.match(digits) and not _years(groups) else None
        return None

    def _phones(self, text: str) -> Spans:
        """Phone numbers; national ones must be grouped as it is usual."""
        if not _PHONE.search(text):
            return
        matcher, leniency = self._phonenumbers.PhoneNumberMatcher, self._phonenumbers.Leniency
        for match in matcher(text, self._region, leniency=leniency.VALID, max_tries=len(text)):
            # The matcher takes an opening bracket of the sentence along.
            raw = match.raw_string
            bracket = raw[0] in "([" and len(re.findall(r"[(\[]", raw)) > len(re.findall(r"[)\]]", raw))
            start, raw = match.start + bracket, raw[bracket:]
            grouped = raw.startswith("+") or matcher(raw, self._region, leniency=leniency.STRICT_GROUPING).has_next()
            # As the end of the number of an article, AB-212-555-0123.
            part_of_more = re.search(r"[A-Za-z0-9_]\Z|[A-Z0-9]-\Z", text[max(0, start - 2) : start])
            if grouped and not part_of_more:
                yield start, match.end


def _accepted(pattern: re.Pattern[str], text: str, end_of: Callable[[re.Match[str]], int | None]) -> Spans:
    """Matches whose end is accepted; behind a refused one the next letter is a start again."""
    position = 0
    while match := pattern.search(text, position):
        end = end_of(match)
        if end is not None:
            yield match.start(), end
        position = end or match.start() + 1


def _disjoint(spans: list[tuple[int, int]]) -> Spans:
    """The spans in order, without those that begin inside of another."""
    end = 0
    for start, stop in sorted(spans):
        if start >= end:
            yield start, stop
            end = stop


def _ends(match: re.Match[str]) -> Iterator[int]:
    """The end of a match, and those of its groups of letters and digits from the last to the first."""
    yield match.end()
    gaps = [match.start() + gap.start() for gap in re.finditer(_GAP, match[0])]
    yield from reversed(gaps)


def _years(groups: list[str]) -> bool:
    return all(len(group) == 4 and group[:2] in ("19", "20") for group in groups)


def _urls(text: str) -> Spans:
    return _accepted(_URL, text, _url_end) if "." in text or "://" in text else iter(())


def _url_end(match: re.Match[str]) -> int | None:
    """The end without the punctuation of the sentence around."""
    url = match[0]
    end, unclosed = len(url), url.count("(") - url.count(")")
    while url[end - 1] in ".,;:!?'*_~)]}" and not (url[end - 1] == ")" and unclosed >= 0):
        unclosed += url[end - 1] == ")"
        end -= 1
    _, mark, rest = url[:end].partition("://")
    return match.start() + end if rest or (not mark and end > len("www.")) else None


def _emails(text: str) -> Spans:
    return (match.span() for match in _EMAIL.finditer(text)) if "@" in text else iter(())


def _addresses(text: str) -> Spans:
    """IP addresses, versions 4 and 6; not the four numbers of a program's version."""
    spans = [*_accepted(_IP4, text, _ip4_end), *(_accepted(_IP6, text, _ip6_end) if ":" in text else ())]
    return _disjoint(spans)


def _ip4_end(match: re.Match[str]) -> int | None:
    before = match.string[max(0, match.start() - 12) : match.start()]
    return match.end() if _is_address(match[0]) and not _VERSION.search(before) else None


def _ip6_end(match: re.Match[str]) -> int | None:
    """The end of an address; `a::b` may be code: one with few groups must begin with a long one."""
    address = match[0].rstrip(":") if not match[0].endswith("::") else match[0]
    groups = [group for group in address.split(":") if group]
    long = len(groups) >= 3 or (len(groups) > 0 and len(groups[0]) == 4)
    end = match.start() + len(address)
    return end if long and re.search("[0-9]", address) and _is_address(address) else None


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def _handles(text: str) -> Spans:
    return (match.span() for match in _USER.finditer(text))
