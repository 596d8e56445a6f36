"""The contract's tags as Compute Engine's labels, and back, without loss.

Both have the same alphabet, but that the key of a label begins with a letter. A key that does not is put behind a
prefix, and so is one that looks as if it had been.
"""

from __future__ import annotations

import re

from dstack_core.plugin import InvalidRequestError

_PREFIX = "x-"
_KEY = re.compile(r"^[a-z][a-z0-9_-]{0,62}$")
_VALUE = re.compile(r"^[a-z0-9_-]{0,63}$")
MOST = 64
"""Labels on one thing."""


def labels_of(tags: dict[str, str]) -> dict[str, str]:
    """Tags as labels.

    Raises:
        InvalidRequestError: one does not fit.
    """
    found = {_escaped(key): value for key, value in tags.items()}
    for key, value in found.items():
        if not _KEY.match(key) or not _VALUE.match(value):
            raise InvalidRequestError(
                f"The tag {key!r} with the value {value!r} is no label of Compute Engine: both have up to 63 "
                "of these: a-z, 0-9, - and _. Shorten it."
            )
    if len(found) > MOST:
        raise InvalidRequestError(f"{len(found)} labels are more than the {MOST} that Compute Engine takes")
    return found


def tags_of(labels: dict[str, str]) -> dict[str, str]:
    """Labels as the tags that they were made of."""
    return {key.removeprefix(_PREFIX): value for key, value in labels.items()}


def _escaped(key: str) -> str:
    return key if key[:1].isalpha() and not key.startswith(_PREFIX) else _PREFIX + key
