"""What a server says of its models, as text: the rows of `list` and `ps`, the page of `show`.

Servers of other versions may say less; what they leave out stays empty.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timedelta, timezone
from typing import Any

from refollama import terminal

Record = Mapping[str, Any]
Rows = list[tuple[str, ...]]

LIST = ("NAME", "ID", "SIZE", "MODIFIED")
PS = ("NAME", "ID", "SIZE", "PROCESSOR", "CONTEXT", "UNTIL")

ID_LENGTH = 12  # hexadecimal digits; enough to tell models apart
FIRST_LINES = 2  # of a long text
FIRST_VALUES = 3  # of a long list
FOR_EVER = timedelta(days=365 * 50)  # a server that keeps a model for ever says a date like this

# What `show` prints of a model, and what it says instead where there is none.
PARTS = {
    "license": "No license was specified for this model.",
    "modelfile": "No Modelfile was specified for this model.",
    "parameters": "No parameters were specified for this model.",
    "system": "No system message was specified for this model.",
    "template": "No prompt template was specified for this model.",
}


# --- list and ps -----------------------------------------------------------------------------


def list_row(record: Record) -> tuple[str, ...]:
    """A model of the store, for the columns LIST."""
    modified = terminal.read_time(record.get("modified_at") or "")
    return (
        str(record.get("name", "")),
        short_id(record.get("digest")),
        terminal.human_size(record.get("size") or 0),
        terminal.human_age(modified),
    )


def ps_row(record: Record) -> tuple[str, ...]:
    """A model in memory, for the columns PS."""
    size = record.get("size") or 0
    return (
        str(record.get("name", "")),
        short_id(record.get("digest")),
        terminal.human_size(size),
        processor(size, record.get("size_vram") or 0),
        str(record.get("context_length") or ""),
        until(terminal.read_time(record.get("expires_at") or "")),
    )


def short_id(digest: str | None) -> str:
    """The beginning of a digest."""
    return (digest or "").removeprefix("sha256:")[:ID_LENGTH]


def processor(size: int, on_gpu: int) -> str:
    """Where a model lies.  Units: bytes.

    Example: 10, 0 → 100% CPU;  10, 10 → 100% GPU;  10, 7 → 30%/70% CPU/GPU
    """
    if on_gpu == 0:
        return "100% CPU"
    if on_gpu == size:
        return "100% GPU"
    if on_gpu > size:
        return "Unknown"
    cpu = round(100 * (size - on_gpu) / size)
    return f"{cpu}%/{100 - cpu}% CPU/GPU"


def until(moment: datetime | None, now: datetime | None = None) -> str:
    """How long a model that nobody asks stays in memory."""
    now = now or datetime.now(timezone.utc)
    if moment is None:
        return ""
    if moment <= now:
        return "Stopping..."
    return "Forever" if moment - now > FOR_EVER else terminal.human_age(moment, now)


# --- show ------------------------------------------------------------------------------------


def part(record: Record, name: str) -> str:
    """One of PARTS."""
    return str(record.get(name) or PARTS[name])


def parameters(options: Record) -> str:
    """Options as a server writes `parameters`: one line for each value."""
    lists = {name: v if isinstance(v, list | tuple) else [v] for name, v in options.items()}
    return "\n".join(f"{name:<30} {_plain(v)}" for name, values in lists.items() for v in values)


def _plain(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def overview(record: Record, verbose: bool = False) -> str:
    """The page that `show` prints: one block for each kind of thing that is known."""
    blocks: list[tuple[str, Rows]] = [
        ("Model", _model(record)),
        ("Projector", list(_facts(record.get("projector_info"), _PROJECTOR).items())),
        ("Capabilities", [(str(word),) for word in record.get("capabilities") or []]),
        ("Parameters", [_pair(line) for line in _lines(record.get("parameters"))]),
        ("Metadata", _metadata(record.get("model_info")) if verbose else []),
        ("Tensors", _tensors(record.get("tensors")) if verbose else []),
        ("System", _first_lines(record.get("system"))),
        ("License", _first_lines(record.get("license"))),
    ]
    return "\n\n".join(_block(title, rows) for title, rows in blocks if rows)


_MODEL = {
    "parameters": "general.parameter_count",
    "context length": "{}.context_length",
    "embedding length": "{}.embedding_length",
}
_PROJECTOR = {
    "architecture": "general.architecture",
    "parameters": "general.parameter_count",
    "embedding length": "{}.vision.embedding_length",
    "dimensions": "{}.vision.projection_dim",
}


def _model(record: Record) -> Rows:
    """From the file's metadata; from `details` where a server does not tell them."""
    info, details = record.get("model_info") or {}, record.get("details") or {}
    facts = {
        "architecture": info.get("general.architecture") or details.get("family"),
        "parameters": details.get("parameter_size"),
        **_facts(info, _MODEL),
        "quantization": details.get("quantization_level"),
    }
    return [(name, str(value)) for name, value in facts.items() if value]


def _facts(info: Record | None, wanted: Mapping[str, str]) -> dict[str, str]:
    """The metadata that `wanted` names; `{}` in a name stands for the architecture."""
    info = info or {}
    keys = {fact: key.format(info.get("general.architecture")) for fact, key in wanted.items()}
    return {fact: _fact(fact, info[key]) for fact, key in keys.items() if info.get(key)}


def _fact(name: str, value: Any) -> str:
    return human_count(value) if name == "parameters" else str(value)


def human_count(number: int) -> str:
    """Example: 260_032 → 260.03K, 7_241_732_096 → 7.2B"""
    for unit, power, digits in (("B", 10**9, 1), ("M", 10**6, 2), ("K", 10**3, 2)):
        if number >= power:
            return f"{number / power:.{digits}f}{unit}"
    return str(number)


def _metadata(info: Record | None) -> Rows:
    return [(key, _shortened(value)) for key, value in sorted((info or {}).items())]


def _shortened(value: object) -> str:
    """A list by its beginning: a vocabulary has thousands of entries."""
    if not isinstance(value, list) or len(value) <= FIRST_VALUES:
        return _plain(value)
    first = ", ".join(map(_plain, value[:FIRST_VALUES]))
    return f"[{first}, ...+{len(value) - FIRST_VALUES} more]"


def _tensors(tensors: Sequence[Record] | None) -> Rows:
    return [
        (str(tensor.get("name")), str(tensor.get("type")), str(tensor.get("shape")))
        for tensor in tensors or []
    ]


def _pair(line: str) -> tuple[str, ...]:
    """A line of `parameters`: the name, padded, and its value."""
    return tuple(line.split(None, 1))


def _first_lines(text: str | None) -> Rows:
    lines = _lines(text)
    shown = lines[:FIRST_LINES] + (["..."] if len(lines) > FIRST_LINES else [])
    return [(line,) for line in shown]


def _lines(text: str | None) -> list[str]:
    return [line.strip() for line in (text or "").splitlines() if line.strip()]


def _block(title: str, rows: Rows) -> str:
    return "\n".join([f"  {title}", *_aligned(rows)])


def _aligned(rows: Rows) -> Iterator[str]:
    """Columns as wide as their widest cell; the last one may be ragged."""
    count = max(map(len, rows))
    full = [row + ("",) * (count - len(row)) for row in rows]
    widths = [max(map(len, column)) for column in zip(*full, strict=True)]
    for row in full:
        yield "    " + "    ".join(map(str.ljust, row, widths)).rstrip()
