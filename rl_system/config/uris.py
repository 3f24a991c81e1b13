"""Settings that may be a URI or a path."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import urlsplit

_URI = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:/")


def is_uri(place: str) -> bool:
    """Whether ``place`` is meant as a URI (``s3://bucket/runs``), not as a path."""
    return _URI.match(place) is not None


def absolute(place: str) -> str:
    """A path made absolute, a URI as it is.

    Raises:
        ValueError: the URI holds a secret, which every file with the settings would show.
    """
    if not is_uri(place):
        return str(Path(place).resolve())
    if "@" in urlsplit(place).netloc and not place.startswith("abfs"):  # abfs://container@account is no secret
        hidden = re.sub(r"//[^@]*@", "//...@", place)
        raise ValueError(f"{hidden} holds credentials: leave them out, and set them in the environment")
    return place


def below(uri: str, name: str) -> str:
    """The URI of ``name`` in the folder ``uri``; the query stays at the end."""
    base, mark, query = uri.partition("?")
    return f"{base.rstrip('/')}/{name}{mark}{query}"
