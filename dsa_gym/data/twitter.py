"""Users' texts from Twitter (X): the archive of an account, the API's JSON Lines, and tables of tweets."""

from __future__ import annotations

import html
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dsa_gym.data.streams import compression, read_whole
from dsa_gym.data.tables import DataError, check_name, check_string, named, order_key, read_objects, read_rows
from dsa_gym.data.texts import Text

__all__ = ["read_twitter"]

# An archive's file is one JSON array and cannot be streamed.
_LARGEST_ARCHIVE = 1 << 30
_ASSIGNMENT = re.compile(r"\s*window\.YTD\.(\w+)\.part\d+\s*=\s*")
_USER_COLUMNS = ("author", "author_id", "user", "username", "screen_name", "user_name", "user_id")
_TEXT_COLUMNS = ("full_text", "text", "tweet", "content")
_TIME_COLUMNS = ("created_at", "date", "timestamp", "time")
# Wed Oct 10 20:19:24 +0000 2018; not strptime, whose names of months are those of the locale.
_TIME = re.compile(r"[A-Z][a-z]{2} ([A-Z][a-z]{2}) (\d\d) (\d\d:\d\d:\d\d) ([+-]\d{4}) (\d{4})", re.ASCII)
_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
_EXPECTED = (
    "a tweet as the API gives it: user.screen_name or user.id_str, full_text or text, and created_at (v1.1), or "
    "author_id, text and created_at (v2)"
)


def read_twitter(path: Path, skipped: Counter[str]) -> Iterator[Text]:
    """The tweets of a file in the order of their times; retweets are left out and counted.

    HTML entities are resolved.

    Args:
        path: `*.js` is the archive that an account's owner can download (`tweets.js`); its user is the one that
            `account.js` beside it names, else the name of the folder, or of the one above if that is `data`.
            `*.csv`, `*.tsv` and `*.parquet` are tables with a column for the user (`author`, `author_id`, `user`,
            `username`, `screen_name`, `user_name` or `user_id`), one for the text (`full_text`, `text`, `tweet` or
            `content`) and maybe one for the time (`created_at`, `date`, `timestamp` or `time`). Everything else is
            JSON Lines of tweets as the API gives them, version 1.1 or 2. All may have `.gz`, `.bz2`, `.xz` or `.zst`
            behind it.
        skipped: where the retweets are counted.

    Raises:
        DataError: the file is not one of these.
    """
    suffix = (path.with_suffix("") if compression(path) else path).suffix.lower()
    read = {".js": _archive, ".csv": _table, ".tsv": _table, ".parquet": _table}.get(suffix, _api)
    for where, user, text, order in read(path):
        if text.startswith("RT @"):
            skipped["they are retweets"] += 1
        else:
            yield Text(where, user, html.unescape(text), order)


def _archive(path: Path) -> Iterator[Text]:
    """The tweets of an account's archive."""
    user = _account(path)
    for number, entry in enumerate(_assigned(path, ("tweet", "tweets")), 1):
        where = f"{path}, tweet {number}"
        # Archives of before 2020 have the tweet itself there.
        tweet = entry.get("tweet", entry) if isinstance(entry, dict) else None
        if not isinstance(tweet, dict) or not {"full_text", "created_at"} <= tweet.keys():
            raise DataError(f"{where}: expected an object with full_text and created_at")
        text = check_string(tweet["full_text"], "full_text", where)
        yield Text(where, user, text, _order(tweet["created_at"], where))


def _account(path: Path) -> str:
    """Whose archive it is."""
    beside = path.with_name("account.js")
    if beside.exists():
        for entry in _assigned(beside, ("account",)):
            account = entry.get("account") if isinstance(entry, dict) else None
            for name in ("username", "accountId", "accountDisplayName"):
                if isinstance(account, dict) and account.get(name):
                    return check_name(account[name], name, str(beside))
        raise DataError(f"{beside}: expected an account with username, accountId or accountDisplayName")
    folder = path.resolve().parent
    return (folder.parent if folder.name == "data" else folder).name


def _assigned(path: Path, expected: Sequence[str]) -> list[Any]:
    """The array that a file of an archive assigns to a variable."""
    content = read_whole(path, _LARGEST_ARCHIVE)
    start = _ASSIGNMENT.match(content)
    if start is None or start[1] not in expected:
        raise DataError(
            f"{path} is not a file of a Twitter archive: expected it to begin with "
            f"window.YTD.{expected[-1]}.part0 =, it begins with {content[:40]!r}"
        )
    try:
        array, end = json.JSONDecoder().raw_decode(content, start.end())
    except json.JSONDecodeError as error:
        raise DataError(f"{path}, line {error.lineno}: not JSON at column {error.colno}: {error.msg}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not usable JSON: {error}") from error
    if not isinstance(array, list) or content[end:].strip(" \t\r\n;"):
        raise DataError(f"{path}: expected one array behind window.YTD.{start[1]}")
    if not array:
        raise DataError(f"{path} is empty: it has no rows")
    return array


def _api(path: Path) -> Iterator[Text]:
    """The tweets of a JSON Lines file, one object a line."""
    for where, tweet in read_objects(path):
        account = tweet.get("user")
        if isinstance(account, dict):
            user = account.get("screen_name") or account.get("id_str")
        else:
            user = tweet.get("author_id")
        # Version 1.1 cuts `text` and has the whole one elsewhere, if it is asked to.
        extended = tweet.get("extended_tweet")
        whole = extended if isinstance(extended, dict) and "full_text" in extended else tweet
        text = whole.get("full_text", tweet.get("text"))
        if user is None or text is None:
            raise DataError(f"{where}: expected {_EXPECTED}; it has {named(tweet)}")
        order = _order(tweet.get("created_at"), where)
        yield Text(where, check_name(user, "user", where), check_string(text, "text", where), order)


def _table(path: Path) -> Iterator[Text]:
    """The tweets of a table."""
    for where, values in read_rows(path, (), None):
        by_name = {name.lower(): name for name in values}
        user, text, time = (
            next((by_name[name] for name in names if name in by_name), None)
            for names in (_USER_COLUMNS, _TEXT_COLUMNS, _TIME_COLUMNS)
        )
        if user is None or text is None:
            raise DataError(
                f"{path}: expected a column {' or '.join(_USER_COLUMNS)}, and a column {' or '.join(_TEXT_COLUMNS)}; "
                f"it has {named(values)}"
            )
        order = _order(values[time] if time else None, where)
        yield Text(where, check_name(values[user], user, where), check_string(values[text], text, where), order)


def _order(value: Any, where: str) -> tuple[str, float]:
    """What a tweet is ordered by, as `order_key` gives it; None is the place in the file."""
    match = _TIME.fullmatch(value) if isinstance(value, str) else None
    if match is not None and match[1] in _MONTHS:
        month, day, clock, offset, year = match.groups()
        value = f"{year}-{_MONTHS.index(month) + 1:02}-{day}T{clock}{offset}"
    return order_key(value, None if value is None else "created_at", where)
