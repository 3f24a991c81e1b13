"""Arguments that several commands take."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path


def named_folder(text: str) -> tuple[str, Path | None]:
    """``NAME=FOLDER``, or ``NAME`` alone. Raises argparse's error on anything else, and on a name with a slash."""
    name, equals, folder = text.partition("=")
    if not name or "/" in name or bool(equals) != bool(folder):
        raise argparse.ArgumentTypeError(f"'{text}' is not NAME=FOLDER")
    return name, Path(folder) if folder else None


def add_address(parser: argparse.ArgumentParser, port: int) -> None:
    """``--host`` (loopback unless told otherwise) and ``--port``, by default ``port``."""
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on; default 127.0.0.1, which only this machine reaches"
    )
    parser.add_argument("--port", type=_port, default=port, help=f"default {port}; 0 takes a free one")


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"'{text}' is not a port, 0 to 65535")
    return int(text)


def whole(least: int) -> Callable[[str], int]:
    """Reads a whole number from ``least``."""

    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"'{text}' is not a whole number from {least}")
        return int(text)

    return number


natural, positive = whole(0), whole(1)
