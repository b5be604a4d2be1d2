"""How long does a model stay in memory after its last use?  `keep_alive`, in all its spellings.

300 · 42.5        seconds
"5m" · "1h30m"    Go's durations: numbers with a unit, one after another
-1 · "-1m"        less than nothing: for ever
0 · "0"           not at all
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from refollama.errors import BadRequest

FOR_EVER = math.inf
DEFAULT = 300.0  # seconds, as in Ollama

_UNITS = {
    "ns": 1e-9,
    "us": 1e-6,
    "µs": 1e-6,
    "μs": 1e-6,  # the sign has two code points
    "ms": 1e-3,
    "s": 1.0,
    "m": 60.0,
    "h": 3600.0,
}
_STEP = re.compile(r"([0-9]{1,30}(?:\.[0-9]{0,30})?|\.[0-9]{1,30})(ns|us|µs|μs|ms|s|m|h)")
_LONGEST = 200  # characters of a duration that anybody means


def seconds(value: Any) -> float | None:
    """What a request's `keep_alive` says; None: nothing, so the server's own time holds.

    Raises: BadRequest, with what is allowed.
    """
    if value is None:
        return None
    if isinstance(value, int | float) and not isinstance(value, bool):
        return FOR_EVER if value < 0 else _float(value)
    found = _duration(value) if isinstance(value, str) else None
    if found is None:
        raise BadRequest(
            f'keep_alive must be a number of seconds or a duration such as "5m", not {value!r:.60}'
        )
    return FOR_EVER if found < 0 else found


def from_environment(environment: Mapping[str, str]) -> float:
    """OLLAMA_KEEP_ALIVE, where a number needs no unit; 5 minutes if it is not set.

    Raises: BadRequest.
    """
    text = environment.get("OLLAMA_KEEP_ALIVE", "").strip().strip("\"'")
    if re.fullmatch(r"[+-]?[0-9]{1,30}", text):
        return FOR_EVER if int(text) < 0 else _float(int(text))
    if not text:
        return DEFAULT
    found = _duration(text)
    if found is None:
        raise BadRequest(f'OLLAMA_KEEP_ALIVE must be seconds or a duration like "5m", not {text!r}')
    return FOR_EVER if found < 0 else found


def _float(number: float) -> float:
    try:
        return float(number)
    except OverflowError:  # an integer with hundreds of digits
        return FOR_EVER


def _duration(text: str) -> float | None:
    """Seconds; None for what Go's ParseDuration refuses."""
    if len(text) > _LONGEST:
        return None
    sign, rest = (-1.0, text[1:]) if text.startswith("-") else (1.0, text.removeprefix("+"))
    if rest == "0":
        return 0.0
    steps = list(_STEP.finditer(rest))
    if not steps or "".join(step[0] for step in steps) != rest:
        return None
    return sign * sum(float(step[1]) * _UNITS[step[2]] for step in steps)
