"""What every JSON answer of a language model has in common: one object that holds one list."""

from __future__ import annotations

import json
from typing import Any

from reward_servers.contract import RewardServerError


def list_schema(key: str, item: dict[str, Any], least: int, most: int) -> dict[str, Any]:
    """JSON schema of ``{key: [item, ...]}`` with ``least`` to ``most`` items and nothing else."""
    return {
        "type": "object",
        "properties": {key: {"type": "array", "items": item, "minItems": least, "maxItems": most}},
        "required": [key],
        "additionalProperties": False,
    }


def read_list(text: str, key: str, who: str) -> list[Any]:
    """The list ``key`` of the JSON object ``text``.

    Raises:
        RewardServerError: ``who``'s answer is no such object.
    """
    try:
        answer = json.loads(text)
    # Besides JSONDecodeError: numbers of thousands of digits, thousands of open brackets.
    except (ValueError, RecursionError) as error:
        raise RewardServerError(f"the {who}'s answer is not JSON ({error}): {excerpt(text)}") from error
    items = answer.get(key) if isinstance(answer, dict) else None
    if not isinstance(items, list):
        raise RewardServerError(f"the {who}'s answer has no list '{key}': {excerpt(text)}")
    return items


def excerpt(text: str, length: int = 200) -> str:
    """The text's beginning, quoted, for an error message."""
    return repr(text if len(text) <= length else text[:length] + "...")
