"""The line at which the user types: editing keys, messages of several lines, a history.

The history file is Ollama's own, `~/.ollama/history`: one line for each line that was typed, the
oldest first.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Generator, Iterable
from contextlib import suppress
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.formatted_text import FormattedText
from prompt_toolkit.history import History

QUOTES = '"""'
PLACEHOLDER = "Send a message (/? for help)"
PLACEHOLDER_IN_QUOTES = f"Use {QUOTES} to end multi-line input"
REMEMBERED = 100  # lines, as in Ollama

# Where a message of several lines may begin: at once, or as the value of a setting.
_OPENING = re.compile(rf"(\s*/set\s+system\s+)?{QUOTES}")


class PromptLine:
    """Asks for one message after another; remembers them for the arrow keys."""

    def __init__(self, history: Path | None) -> None:
        self._history = LineHistory(history)
        self._session: PromptSession[str] = PromptSession(
            history=self._history, enable_suspend=True
        )

    def messages(self) -> Generator[str, None, None]:
        """What the user types, until Ctrl-D. Ctrl-C drops what stands there."""
        while True:
            try:
                yield self._message()
            except EOFError:
                return
            except KeyboardInterrupt:
                if not self._session.default_buffer.text:
                    print("\nUse Ctrl-D or /bye to exit.\n")

    def remember(self, wanted: bool) -> None:
        """Whether what is typed from now on comes back by the arrow keys."""
        self._history.remembers = wanted

    def _message(self) -> str:
        text = self._line(">>> ", PLACEHOLDER)
        opening = _OPENING.match(text)
        if not opening:
            return text
        before, text = opening[1] or "", text[opening.end() :]
        while not text.rstrip().endswith(QUOTES):
            text += "\n" + self._line("... ", PLACEHOLDER_IN_QUOTES)
        return before + text.rstrip().removesuffix(QUOTES)

    def _line(self, prompt: str, placeholder: str) -> str:
        hint = FormattedText([("fg:ansibrightblack", placeholder)])
        return self._session.prompt(prompt, placeholder=hint)


class LineHistory(History):
    """What was typed, in a file that only its owner reads; in memory if the disk says no."""

    def __init__(self, path: Path | None) -> None:
        super().__init__()
        self._path = path
        self.remembers = True

    def load_history_strings(self) -> Iterable[str]:
        """The lines of earlier conversations, the youngest first."""
        return reversed(self._lines())

    def append_string(self, string: str) -> None:
        """Remember one message, unless told not to."""
        if self.remembers:
            super().append_string(string)

    def store_string(self, string: str) -> None:
        """Write it down; the oldest lines make room."""
        typed = [line for line in string.split("\n") if line.strip()]
        if self._path is None or not typed:
            return
        with suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            _replace(self._path, [*self._lines(), *typed][-REMEMBERED:])

    def _lines(self) -> list[str]:
        if self._path is None:
            return []
        try:
            text = self._path.read_text("utf-8", "replace")
        except OSError:
            return []
        return [line for line in text.split("\n") if line]


def _replace(path: Path, lines: Iterable[str]) -> None:
    """Through a file of mode 600 beside it: two conversations at once never leave half a line."""
    handle, name = tempfile.mkstemp(prefix=".history-", dir=path.parent)
    try:
        with open(handle, "w", encoding="utf-8", errors="replace") as file:
            file.writelines(f"{line}\n" for line in lines)
        os.replace(name, path)
    except OSError:
        os.unlink(name)
        raise
