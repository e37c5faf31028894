"""Users' texts from Reddit dumps: comments and submissions in the JSON Lines of the Pushshift archives."""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dsa_gym.data.tables import DataError, check_name, check_string, named, order_key, read_objects
from dsa_gym.data.texts import Text

__all__ = ["read_reddit"]

_GONE = ("[deleted]", "[removed]")
_EXPECTED = "a comment (author, body, created_utc) or a submission (author, title, selftext, created_utc)"


def read_reddit(path: Path, skipped: Counter[str]) -> Iterator[Text]:
    """The comments and submissions of a dump, in the order of `created_utc`, seconds since 1970.

    A submission's text is its title, an empty line and its `selftext`. Left out and counted are those that are
    deleted or removed, by whomever, and those of AutoModerator. HTML entities are resolved.

    Args:
        path: JSON Lines of any name, plain or with `.zst`, `.gz`, `.bz2` or `.xz` behind it.
        skipped: where the rows left out are counted.

    Raises:
        DataError: the file is not such a dump.
    """
    for where, record in read_objects(path):
        if not {"author", "created_utc"} <= record.keys() or not record.keys() & {"body", "title"}:
            raise DataError(f"{where}: expected {_EXPECTED}, it has {named(record)}")
        parts = _parts(record, where)
        # A deleted account's name is null in some dumps.
        if record["author"] in (None, *_GONE) or any(part.strip() in _GONE for part in parts):
            skipped["they are deleted or removed"] += 1
            continue
        author = check_name(record["author"], "author", where)
        if author == "AutoModerator":
            skipped["they are by AutoModerator"] += 1
            continue
        text = html.unescape("\n\n".join(part for part in parts if part.strip()))
        yield Text(where, author, text, order_key(record["created_utc"], "created_utc", where))


def _parts(record: dict[str, Any], where: str) -> list[str]:
    """The pieces of text: a comment's body, or a submission's title and text."""
    if "body" in record:
        return [check_string(record["body"], "body", where)]
    # Submissions that are links have no text.
    selftext = record.get("selftext")
    return [check_string(record["title"], "title", where), check_string(selftext or "", "selftext", where)]
