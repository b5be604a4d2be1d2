"""What the user sees: sizes, ages, durations, progress, answers.

Everything that moves goes to standard error and only if that is a terminal; standard output
carries answers and nothing else. rich is imported where it is used: most commands do not need it.
"""

from __future__ import annotations

import math
import shutil
import sys
import time
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, nullcontext
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.progress import Progress, ProgressColumn, Task, TaskID

Record = dict[str, Any]

NANOSECOND = 1
MICROSECOND = 1_000
MILLISECOND = 1_000_000
SECOND = 1_000_000_000


# --- numbers as people read them -------------------------------------------------------------


def human_size(size: int) -> str:
    """Decimal units, two digits at most below ten.  Units: bytes.

    Example: 999 → 999 B, 3_825_819_519 → 3.8 GB, 4_000_000_000 → 4 GB, 39_900_000_000 → 39 GB
    """
    for unit, power in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("KB", 10**3)):
        if size >= power:
            value = size / power
            fraction = value < 10 and not value.is_integer()
            return f"{value:.1f} {unit}" if fraction else f"{int(value)} {unit}"
    return f"{size} B"


def human_age(moment: datetime | None, now: datetime | None = None) -> str:
    """How long ago something was, in one unit; `Never` if it has no time."""
    if moment is None or moment.year <= 1:
        return "Never"
    seconds = ((now or datetime.now(timezone.utc)) - moment).total_seconds()
    return f"{_span(abs(seconds))} {'from now' if seconds < 0 else 'ago'}"


def _span(seconds: float) -> str:
    """The steps of Ollama's `list`: each unit takes over where its number says something."""
    hours = math.floor(seconds / 3600 + 0.5)
    steps = (
        (seconds < 1, "Less than a second"),
        (seconds < 2, "1 second"),
        (seconds < 60, f"{int(seconds)} seconds"),
        (seconds < 120, "About a minute"),
        (seconds < 3600, f"{int(seconds / 60)} minutes"),
        (hours == 1, "About an hour"),
        (hours < 48, f"{hours} hours"),
        (hours < 24 * 14, f"{hours // 24} days"),
        (hours < 24 * 60, f"{hours // 24 // 7} weeks"),
        (hours < 24 * 365 * 2, f"{hours // 24 // 30} months"),
        (True, f"{hours // 24 // 365} years"),
    )
    return next(text for reached, text in steps if reached)


def read_time(text: str) -> datetime | None:
    """An RFC 3339 time; None if it is not one.

    Example: 2023-12-15T10:00:00.123456789+01:00, of which Python can hold six digits
    """
    head, dot, tail = text.strip().replace("Z", "+00:00").partition(".")
    digits = len(tail) - len(tail.lstrip("0123456789"))
    fraction = f"{dot}{tail[:digits][:6]:0<6}" if dot else ""
    try:
        moment = datetime.fromisoformat(head + fraction + tail[digits:])
    except ValueError:
        return None
    return moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)


def go_duration(nanoseconds: int) -> str:
    """A duration as Go prints it.

    Example: 3_723_500_000_000 → 1h2m3.5s, 130_079_000 → 130.079ms, 1_500 → 1.5µs, 0 → 0s
    """
    if nanoseconds < 0:
        return "-" + go_duration(-nanoseconds)
    for unit, size in (("ns", NANOSECOND), ("µs", MICROSECOND), ("ms", MILLISECOND)):
        if 0 < nanoseconds < 1000 * size:
            return _decimal(nanoseconds, size) + unit
    minutes, rest = divmod(nanoseconds, 60 * SECOND)
    hours, minutes = divmod(minutes, 60)
    text = f"{hours}h{minutes}m" if hours else f"{minutes}m" if minutes else ""
    return f"{text}{_decimal(rest, SECOND)}s"


def _decimal(amount: int, unit: int) -> str:
    """amount / unit, exactly, without zeros at the end: floats would round long durations."""
    whole, rest = divmod(amount, unit)
    digits = f"{rest:0{len(str(unit)) - 1}d}".rstrip("0") if rest else ""
    return f"{whole}.{digits}" if digits else str(whole)


def statistics(record: Mapping[str, Any]) -> str:
    """The counts and durations of a final record, one line each; zeros are left out."""
    rows: list[tuple[str, str]] = []
    for name in ("total", "load"):
        rows += _duration_row(f"{name} duration", record.get(f"{name}_duration"))
    for name in ("prompt eval", "eval"):
        key = name.replace(" ", "_")
        count, duration = record.get(f"{key}_count") or 0, record.get(f"{key}_duration") or 0
        rows += [(f"{name} count", f"{count} token(s)")] if count else []
        rows += _duration_row(f"{name} duration", duration)
        rows += _rate_row(f"{name} rate", count, duration)
    return "\n".join(f"{label + ':':<21} {value}" for label, value in rows)


def _duration_row(label: str, nanoseconds: int | None) -> list[tuple[str, str]]:
    return [(label, go_duration(nanoseconds))] if nanoseconds else []


def _rate_row(label: str, count: int, nanoseconds: int) -> list[tuple[str, str]]:
    if not (count and nanoseconds):
        return []
    return [(label, f"{count / nanoseconds * SECOND:.2f} tokens/s")]


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Left-aligned columns with a tab between them, so that both eyes and `cut` can read it."""
    lines = [header, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = (map(str.ljust, line, widths) for line in lines)
    return "\n".join("\t".join(cells).rstrip() for cells in padded)


# --- things that move ------------------------------------------------------------------------

LONG = 1.0  # seconds; what takes no longer needs no bar
ROOM_FOR_A_BAR = 72  # columns; with fewer, the numbers beside it would be cut


def spinner(text: str) -> AbstractContextManager[object]:
    """Something that turns on standard error, while there is nothing else to show."""
    if not sys.stderr.isatty():
        return nullcontext()
    from rich.console import Console

    return Console(stderr=True).status(text)


def until_first(records: Iterable[Record], text: str) -> Iterator[Record]:
    """The records of an answer, without those that tell how far it is from beginning.

    Until the first one has come there is a spinner, or a bar for what takes long.
    """
    records = iter(records)
    with closing(_Waiting(text)) as waiting:
        first = next((record for record in records if not waiting.shows(record)), None)
    if first is not None:
        yield first
        yield from records


_STAGES = {  # what is shown of each, and what is counted; bytes, if nothing is said
    "load": ("loading", ""),
    "images": ("looking at the pictures", "pictures"),
    "prompt": ("reading the prompt", "tokens"),
}


class _Waiting:
    """A spinner; from what is told of a stage later than LONG after its beginning, a bar instead.

    At the end there is neither.
    """

    def __init__(self, text: str) -> None:
        self._text = text
        self._shown = ExitStack()
        self._stage, self._since = "", 0.0
        self._bar: tuple[Progress, TaskID] | None = None
        self._shown.enter_context(spinner(text))

    def close(self) -> None:
        """Take away what is shown."""
        self._shown.close()
        self._bar = None

    def shows(self, record: Record) -> bool:
        """Does it tell of a stage?  Then it is shown."""
        reached = record.get("progress")
        if not reached:
            return False
        if reached["stage"] != self._stage:
            self._begin(reached["stage"])
        elif self._bar is None and time.monotonic() - self._since >= LONG:
            self._draw(reached)
        if self._bar is not None:
            display, task = self._bar
            display.update(task, completed=reached["completed"])
        return True

    def _begin(self, stage: str) -> None:
        self._stage, self._since = stage, time.monotonic()
        if self._bar is not None:
            self.close()
            self._shown.enter_context(spinner(self._text))

    def _draw(self, reached: Record) -> None:
        """Not for what is done by now."""
        if reached["completed"] >= reached["total"] or not sys.stderr.isatty():
            return
        self.close()
        text, unit = _STAGES.get(self._stage, (self._text, ""))
        display = self._shown.enter_context(_bars(unit))
        task = display.add_task(text, total=reached["total"])
        self._bar = display, task


def show_progress(records: Iterable[Record]) -> None:
    """Show progress records as they come: a bar for each layer that moves, a line for all else.

    At the end the bars go, and the lines stay. What is no terminal gets lines alone: of a layer
    one when it begins and one when it is done.
    """
    with _bars() if sys.stderr.isatty() else nullcontext() as display:
        layers = _Layers(display)
        for record in records:
            layers.show(record)


class _Layers:
    """What each record adds to those before it: a status, or a layer that begins, moves, ends."""

    def __init__(self, display: Progress | None) -> None:
        self._display = display  # None: no terminal
        self._status = ""  # of the last record
        self._bars: dict[str, TaskID | None] = {}  # of the layers that move; None: no terminal
        self._done: set[str] = set()

    def show(self, record: Record) -> None:
        """The next record."""
        status = str(record.get("status", ""))
        if status == "starting upload":  # the next record says of what
            return
        if record.get("total"):
            self._layer(status, record)
        elif status != self._status:
            self._done.clear()  # another piece of work may go by the same name
            self._say(status)
        self._status = status

    def _layer(self, status: str, record: Record) -> None:
        key = str(record.get("digest") or status)
        if key in self._done:
            return
        total = int(record["total"])
        done = min(int(record.get("completed") or 0), total)
        if done < total:
            self._begin(key, status, record)
            self._move(key, done, total)
        else:
            self._end(key, f"{status}: {human_size(total)}")

    def _begin(self, key: str, status: str, record: Record) -> None:
        """The rate of a bar counts from what an earlier try had left."""
        if key in self._bars:
            return
        before = int(record.get("resumed") or 0)
        if before:
            self._say(f"{status}: resumed at {human_size(before)} of {human_size(record['total'])}")
        elif self._display is None and status != self._status:
            self._say(status)
        self._bars[key] = None
        if self._display is not None:
            self._bars[key] = self._display.add_task(printable(status), completed=before)

    def _move(self, key: str, done: int, total: int) -> None:
        bar = self._bars[key]
        if self._display is not None and bar is not None:
            self._display.update(bar, total=total, completed=done)

    def _end(self, key: str, told: str) -> None:
        """The bar becomes a line."""
        bar = self._bars.pop(key, None)
        if self._display is not None and bar is not None:
            self._display.remove_task(bar)
        self._done.add(key)
        self._say(told)

    def _say(self, text: str) -> None:
        if self._display is None:
            print(text, file=sys.stderr, flush=True)
        else:
            console = self._display.console
            console.print(printable(text), markup=False, highlight=False, soft_wrap=True)


def _bars(unit: str = "") -> Progress:
    """Bars that say how much, how fast and how much longer, and go at the end.

    unit: of what is counted, if that is no bytes.

    A narrow terminal gets the numbers without the picture.
    """
    from rich import progress
    from rich.console import Console

    console = Console(stderr=True)
    picture = [progress.BarColumn(bar_width=None)] if console.width >= ROOM_FOR_A_BAR else []
    bytes = [progress.DownloadColumn(), progress.TransferSpeedColumn()]
    counted = [_counted(unit)]
    columns = (
        progress.TextColumn("{task.description}", markup=False),
        _percent(),
        *picture,
        *(counted if unit else bytes),
        progress.TimeRemainingColumn(compact=True),
    )
    return progress.Progress(*columns, console=console, transient=True, expand=True)


def _counted(unit: str) -> ProgressColumn:
    """How many of how many, and how many in a second, as soon as that is known."""
    from rich.progress import ProgressColumn
    from rich.text import Text

    class Counted(ProgressColumn):
        def render(self, task: Task) -> Text:
            if task.total is None:
                return Text()
            speed = task.speed or 0
            rate = f" {speed:,.0f}/s" if speed >= 100 else f" {speed:.3g}/s" if speed else ""
            return Text(f"{task.completed:.0f}/{task.total:.0f} {unit}{rate}")

    return Counted()


def _percent() -> ProgressColumn:
    """Rounded down: who reads 100% has all of it."""
    from rich.progress import ProgressColumn
    from rich.text import Text

    class Percent(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text(f"{math.floor(task.percentage):>3}%")

    return Percent()


@contextmanager
def bar(text: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar for one piece of work: call what it gives with every number of bytes that are done."""
    if not sys.stderr.isatty():
        print(text, file=sys.stderr, flush=True)
        yield lambda _: None
        return
    with _bars() as display:
        task = display.add_task(text, total=total)
        yield lambda done: display.advance(task, done)


@contextmanager
def counter(text: str, unit: str) -> Iterator[Callable[[int, int], None]]:
    """A bar for work that comes in pieces: call what it gives with those done, and those in all."""
    if not sys.stderr.isatty():
        print(text, file=sys.stderr, flush=True)
        yield lambda done, total: None
        return
    with _bars(unit) as display:
        task = display.add_task(text, total=None)
        yield lambda done, total: display.update(task, completed=done, total=total)


# --- answers ---------------------------------------------------------------------------------

MARGIN = 5  # columns at the right that stay free, as in Ollama
NARROWEST = 10  # columns; a smaller terminal is not wrapped for
TAB = 8  # columns between a terminal's tab stops
GREY, NORMAL = "\x1b[90m", "\x1b[39m"


def show_answer(pieces: Iterable[str], wordwrap: bool) -> str:
    """Write an answer to standard output as it comes; gives back the whole of it.

    A pipe gets every character as it is. A terminal gets no control characters, which could do
    more than show text, and no word that is cut by the end of a line if `wordwrap`.
    """
    shown = _for_a_terminal(wordwrap) if sys.stdout.isatty() else str
    whole = []
    for piece in pieces:
        whole.append(piece)
        sys.stdout.write(shown(piece))
        sys.stdout.flush()
    return "".join(whole)


def _for_a_terminal(wordwrap: bool) -> Callable[[str], str]:
    width = shutil.get_terminal_size().columns
    if not wordwrap or width < NARROWEST:
        return printable
    wrap = Wrap(width - MARGIN)
    return lambda piece: wrap.add(printable(piece))


def printable(text: str) -> str:
    """Without control characters, but with line feeds and tabs."""
    return "".join(c for c in text if c in "\n\t" or unicodedata.category(c) != "Cc")


class Wrap:
    """Breaks lines between words while a text streams in, for a terminal.

    Nothing is held back: a word that turns out too long for its line is erased where it stands
    and written again on the next.  Units: `limit` and all lengths are columns, of which a wide
    character takes two.
    """

    def __init__(self, limit: int) -> None:
        from rich.cells import cell_len

        self._cells = cell_len
        self._limit = limit
        self._column = 0
        self._word = ""  # what stands since the last space

    def add(self, text: str) -> str:
        """What to write for the next piece of the text."""
        return "".join(map(self._one, text))

    def _one(self, character: str) -> str:
        if character == "\n":
            return self._break()
        width = self._width(character)
        if self._column + width <= self._limit:
            self._column += width
            self._word = "" if character.isspace() else self._word + character
            return character
        return self._break() if character.isspace() else self._move(character)

    def _width(self, character: str) -> int:
        return TAB - self._column % TAB if character == "\t" else self._cells(character)

    def _break(self) -> str:
        self._column, self._word = 0, ""
        return "\n"

    def _move(self, character: str) -> str:
        """The word, with this character behind it, at the start of the next line."""
        word, before = self._word, self._cells(self._word)
        if before == self._column or before + self._cells(character) > self._limit:
            word, before = "", 0  # no line is long enough for it: it goes on in the next
        erase = f"\x1b[{before}D\x1b[K" if before else ""
        self._word = word + character
        self._column = self._cells(self._word)
        return f"{erase}\n{self._word}"


class Thinking:
    """What a model thinks before it answers, on standard error: it is no part of the answer."""

    def __init__(self, hidden: bool) -> None:
        self._hidden = hidden
        self._open = False
        grey = sys.stderr.isatty()
        self._before, self._after = (GREY, NORMAL) if grey else ("", "")

    def show(self, text: str) -> None:
        """The next piece of it."""
        if self._hidden or not text:
            return
        if not self._open:
            self._write("Thinking...\n")
        self._open = True
        self._write(text)

    def end(self) -> None:
        """The answer begins."""
        if self._open:
            self._write("\n...done thinking.\n\n")
        self._open = False

    def _write(self, text: str) -> None:
        sys.stderr.write(f"{self._before}{printable(text)}{self._after}")
        sys.stderr.flush()


def note(sentence: str) -> None:
    """Something that the user should know, beside the answer."""
    print(f"Note: {sentence}", file=sys.stderr, flush=True)
