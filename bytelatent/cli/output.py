"""What the verbs print."""

import json
import math
from typing import Any

from bytelatent.terminal import say


def print_json(values: Any) -> None:
    """Print values as JSON; a number that JSON cannot hold (NaN, infinity) is printed as null."""
    say(json.dumps(_without_nan(values), allow_nan=False))


def _without_nan(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _without_nan(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(inner) for inner in value]
    return value
