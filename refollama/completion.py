"""What the Tab key offers in a shell: names of models, files of a path.

eval "$(_REFOLLAMA_COMPLETE=bash_source refollama)"   # in ~/.bashrc
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from refollama import reach
from refollama.errors import RefollamaError
from refollama.paths import is_path

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

COMPLETING = "_REFOLLAMA_COMPLETE"  # set by a shell that wants to know what Tab could mean


def complete_models(
    ctx: click.Context, param: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """The models whose names begin so, and the files of a path."""
    from click.shell_completion import CompletionItem

    if is_path(incomplete):
        return [CompletionItem(incomplete, type="file")]
    try:
        with reach.keeper() as kept:
            names = [str(record.get("name", "")) for record in kept.tags()]
    except (RefollamaError, OSError):  # a shell that completes is no place for errors
        return []
    found = []
    for name in names:
        brief = name.removesuffix(":latest")
        if name.startswith(incomplete):
            found.append(CompletionItem(brief if brief.startswith(incomplete) else name))
    return found


def complete_in_bash() -> None:
    """Teach click names with a colon: bash takes one for a word, and replaces what is behind it.

    Example: for `rm tale:s`, bash tells the words `rm tale : s` and wants `small`
    """
    from click.shell_completion import BashComplete, add_completion_class

    class Bash(BashComplete):
        def get_completion_args(self) -> tuple[list[str], str]:
            args, word = super().get_completion_args()
            count = len(args)
            while args and (word.startswith(":") or args[-1] == ":"):
                word = args.pop() + word
            was_cut = len(args) < count
            self._before = word[: word.rfind(":") + 1] if was_cut else ""
            return args, word

        def format_completion(self, item: CompletionItem[Any]) -> str:
            item.value = item.value.removeprefix(self._before)
            return super().format_completion(item)

    add_completion_class(Bash)
