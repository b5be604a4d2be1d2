"""Options: every knob that a request or a Modelfile may turn, by Ollama's own names.

One frozen record with a default and a range for each name, checked once, here. A different choice
is a new record: `defaults.updated(model_parameters).updated(request_options)`.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from refollama.errors import BadOption

log = logging.getLogger(__name__)

Value = bool | int | float | tuple[str, ...] | tuple[float, ...]

MOST = 2**31 - 1  # no count of tokens is larger
MOST_STOPS, LONGEST_STOP = 64, 1000  # each character of a stop string costs memory while it runs

MOST_ADAPTERS, LARGEST_SCALE = 64, 1000

_KINDS = {bool: "true or false", int: "an integer", float: "a number", tuple: "a list of strings"}


def _knob(
    default: Value,
    allowed: str = "",
    ok: Callable[[Any], bool] | None = None,
    *,
    idle: str = "",
) -> Any:
    """A field with its range, as a test and in words; `idle`: why turning it does nothing here."""
    return dataclasses.field(default=default, metadata={"allowed": allowed, "ok": ok, "idle": idle})


def _few_and_short(stops: Sequence[str]) -> bool:
    return len(stops) <= MOST_STOPS and all(len(stop) <= LONGEST_STOP for stop in stops)


def _few_and_small(scales: Sequence[float]) -> bool:
    return len(scales) <= MOST_ADAPTERS and all(abs(scale) <= LARGEST_SCALE for scale in scales)


def _between(low: float, high: float) -> dict[str, Any]:
    return {"allowed": f"between {low} and {high}", "ok": lambda value: low <= value <= high}


def _zero_or(low: float, high: float) -> dict[str, Any]:
    return {
        "allowed": f"0, or between {low} and {high}",
        "ok": lambda value: value == 0 or low <= value <= high,
    }


@dataclass(frozen=True, slots=True)
class Options:
    """How one answer is to be made.

    Raises: BadOption (status 400), with the option's name and what is allowed.
    Source: Ollama's Modelfile and API documents; defaults are those of December 2023.
    """

    # the context
    num_ctx: int = _knob(
        2048, **_between(0, MOST)
    )  # tokens; 0 = as long as the model was trained for
    num_keep: int = _knob(0, **_between(-1, MOST))  # of the prompt, when full; -1 = all of it
    num_batch: int = _knob(512, **_between(1, MOST))  # tokens of the prompt read in one step

    # length
    num_predict: int = _knob(
        -1, **_between(-2, MOST)
    )  # -1 = until it ends, -2 = until num_ctx is full
    stop: tuple[str, ...] = _knob(  # the answer ends before any of these
        (), f"at most {MOST_STOPS} strings of {LONGEST_STOP} characters", _few_and_short
    )

    # chance
    seed: int = _knob(-1, **_between(-1, 2**63 - 1))  # -1 = a new one each time
    temperature: float = _knob(0.8)  # 0 or less = always the likeliest token
    top_k: int = _knob(40)  # 0 or less = all
    top_p: float = _knob(0.9, **_between(0, 1))
    min_p: float = _knob(0.0, **_between(0, 1))
    typical_p: float = _knob(1.0, **_between(0, 1))  # 1 = off
    tfs_z: float = _knob(1.0, **_between(0, 1))  # 1 = off
    mirostat: int = _knob(0, **_between(0, 2))  # 0 = off, else its version
    mirostat_tau: float = _knob(5.0, **_between(0, 100))  # bits of surprise aimed at
    mirostat_eta: float = _knob(0.1, **_between(0, 1))  # how fast it learns

    # repetition
    repeat_last_n: int = _knob(
        64, **_between(-1, MOST)
    )  # tokens looked back at; -1 = num_ctx, 0 = off
    repeat_penalty: float = _knob(1.1, **_between(0.001, 1000))  # below 1 = reward
    presence_penalty: float = _knob(0.0, **_between(-1000, 1000))
    frequency_penalty: float = _knob(0.0, **_between(-1000, 1000))
    penalize_newline: bool = _knob(True)

    # the model's adapters (LoRA)
    adapters: tuple[float, ...] = _knob(  # how much of each, in the Modelfile's order; () = all
        (),
        f"at most {MOST_ADAPTERS} numbers between -{LARGEST_SCALE} and {LARGEST_SCALE}",
        _few_and_small,
    )

    # how the model is loaded
    num_gpu: int = _knob(-1, **_between(-1, MOST))  # layers on the GPU; -1 = all that fit
    main_gpu: int = _knob(0, **_between(0, 1023))  # which GPU
    low_vram: bool = _knob(False)  # the cache in main memory, though layers are on the GPU
    f16_kv: bool = _knob(True)  # the cache in float16; false = float32
    use_mmap: bool = _knob(True)  # weights are mapped; false = read into memory
    use_mlock: bool = _knob(False)  # weights are never swapped out
    numa: bool = _knob(False)  # weights are spread over the memory of all processors
    fast: bool = _knob(True)  # parts that answer sooner; false = every product as models/ has it
    prompt_bits: int = _knob(  # of the numbers in which prompts are multiplied; 32 = exactly
        32, "8, 16 or 32", lambda value: value in (8, 16, 32)
    )
    num_thread: int = _knob(0, **_between(0, 1024))  # 0 = as many as torch chooses
    num_gqa: int = _knob(0, **_between(0, MOST))  # query heads for each key head; 0, 1 = the file's
    rope_frequency_base: float = _knob(0.0, **_zero_or(1.001, 1e12))  # 0 = the file's
    rope_frequency_scale: float = _knob(0.0, **_zero_or(0.001, 1000))  # 0 = the file's

    # accepted, and without effect
    logits_all: bool = _knob(False, idle="an answer needs the last token's logits only")
    vocab_only: bool = _knob(False, idle="weights are mapped, so leaving them out saves nothing")
    embedding_only: bool = _knob(False, idle="every model gives answers and embeddings")

    def updated(self, given: Mapping[str, Any], *, strict: bool = False) -> Options:
        """A new record in which the given values win; `None` means not given.

        `given` comes from JSON. Unknown names are warned about and ignored, or refused if strict.
        """
        known = {f.name: f for f in dataclasses.fields(self)}
        changes: dict[str, Any] = {}
        for name, value in given.items():
            if name in known:
                if value is not None:
                    changes[name] = _checked(known[name], value)
            else:
                _unknown(name, strict)
        return dataclasses.replace(self, **changes)


KNOWN = frozenset(f.name for f in dataclasses.fields(Options))
LISTS = frozenset(f.name for f in dataclasses.fields(Options) if type(f.default) is tuple)


def from_text(name: str, values: Sequence[str]) -> Any:
    """The value of `PARAMETER name value…` of a Modelfile, checked, ready for JSON.

    A scalar that is given several times keeps its first value; `stop` and `adapters` keep all.
    Raises: BadOption for an unknown name or a value that does not fit.
    """
    if name not in KNOWN:
        raise BadOption(f"unknown parameter '{name}'; known are: {', '.join(sorted(KNOWN))}")
    value: Any = list(values)
    if name == "adapters":
        value = [_read(name, float, text) for text in values]
    elif name not in LISTS:
        value = _read(name, type(getattr(Options(), name)), values[0])
    Options().updated({name: value})
    return value


def _read(name: str, kind: type, text: str) -> bool | int | float:
    """A scalar out of a Modelfile's text."""
    booleans = {"true": True, "1": True, "t": True, "false": False, "0": False, "f": False}
    try:
        if kind is bool:
            return booleans[text.lower()]
        if kind is int:
            return int(text)
        return _finite(float(text))
    except (KeyError, ValueError):
        raise BadOption(f"parameter '{name}' must be {_KINDS[kind]}, not '{text}'") from None


def _finite(number: float) -> float:
    if not math.isfinite(number):
        raise ValueError("not finite")
    return number


def _checked(field: dataclasses.Field[Any], value: object) -> Value:
    """The value in the field's own type, or BadOption."""
    kind = type(field.default)
    fitted = _fit(field.name, kind, value)
    ok = field.metadata["ok"]
    if ok is not None and not ok(fitted):
        allowed = field.metadata["allowed"]
        raise BadOption(f"option '{field.name}' must be {allowed}, not {_shown(value)}")
    if field.metadata["idle"] and fitted != field.default:
        log.warning("option '%s' has no effect: %s", field.name, field.metadata["idle"])
    return fitted


def _fit(name: str, kind: type, value: object) -> Value:
    """JSON's types to ours: ints pass as floats, fractions are cut off, bools are no numbers."""
    if name == "adapters":
        return _fit_numbers(value)
    wrong = BadOption(f"option '{name}' must be {_KINDS[kind]}, not {_shown(value)}")
    if kind is tuple:
        if isinstance(value, list | tuple) and all(isinstance(item, str) for item in value):
            return tuple(value)
        raise wrong
    if kind is bool:
        if isinstance(value, bool):
            return value
        raise wrong
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise wrong
    try:
        return int(value) if kind is int else _finite(float(value))
    except (ValueError, OverflowError):  # NaN, infinity, or an integer that no float can hold
        raise wrong from None


def _fit_numbers(value: object) -> tuple[float, ...]:
    wrong = BadOption(f"option 'adapters' must be a list of numbers, not {_shown(value)}")
    if not isinstance(value, list | tuple):
        raise wrong
    kinds = {type(item) for item in value}
    try:
        fitted = tuple(_finite(float(item)) for item in value if kinds <= {int, float})
    except (ValueError, OverflowError):
        raise wrong from None
    if len(fitted) < len(value):
        raise wrong
    return fitted


def _shown(value: object) -> str:
    """A value as a message may repeat it: never pages of it."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _unknown(name: str, strict: bool) -> None:
    if strict:
        raise BadOption(f"unknown option {_shown(name)}; known are: {', '.join(sorted(KNOWN))}")
    log.warning("unknown option %s ignored", _shown(name))
