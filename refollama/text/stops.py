"""Where does an answer end? Cut a stream of text before the first stop string.

    stops   "###"
    pieces  "one #"  "# two ##"  "# three"
    shown   "one "   "## two "   ""           ← the cut; a tail that may become a stop is held back

The law: the joined output is the text before the leftmost place at which any stop string starts,
however the text was split into pieces. *Leftmost start* decides, not first completion: of "abcd"
and "bc" in "abcd" the first wins, so after "abc" one more character is waited for.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field


class StopStrings:
    """Text goes in, text that is safe to show comes out, `hit` says when it is over.

    Empty stop strings are ignored. Time is linear in the text, whatever the stop strings are.
    Source: Aho and Corasick 1975, "Efficient string matching".
    """

    def __init__(self, stops: Iterable[str]) -> None:
        self.hit = False
        self._node = self._root = _automaton(stops)
        self._read = 0  # characters seen so far
        self._match: int | None = None  # where the leftmost whole stop string starts, if any

    def feed(self, piece: str) -> str:
        """The part of the text that can be shown now. After a hit: nothing more."""
        if self.hit:
            return ""
        before, start = self._node, self._alive()
        for char in piece:
            self._step(char)
            if self.hit:
                break
        return before.held_then(piece, self._safe() - start)

    def finish(self) -> str:
        """No more text comes: what was held back, up to a stop string if it holds one."""
        if self.hit:
            return ""
        before, start = self._node, self._alive()
        self.hit = self._match is not None
        self._node = self._root  # nothing can become a stop string any more
        return before.held_then("", self._safe() - start)

    def _step(self, char: str) -> None:
        """Read one character; a match counts once nothing that starts before it can match."""
        self._node = self._node.after(char)
        self._read += 1
        if self._node.longest:
            start = self._read - self._node.longest
            self._match = start if self._match is None else min(self._match, start)
        self.hit = self._match is not None and self._match <= self._alive()

    def _alive(self) -> int:
        """Where the tail starts that may become a stop string: no later match starts left of it."""
        return self._read - self._node.depth

    def _safe(self) -> int:
        """Where the text ends that is no part of a stop string."""
        return self._match if self.hit and self._match is not None else self._alive()


# -------------------------------------------------------------------------------- the automaton


@dataclass(slots=True, eq=False)
class _Node:
    """The longest tail of the text that some stop string begins with: what is held back."""

    stop: str  # the tail is stop[:depth]; a reference, so that nodes stay small
    depth: int
    longest: int = 0  # length of the longest stop string that ends here; 0 = none does
    next: dict[str, _Node] = field(default_factory=dict)
    fallback: _Node | None = None  # the next shorter such tail

    def after(self, char: str) -> _Node:
        node = self
        while char not in node.next:
            if node.fallback is None:
                return node
            node = node.fallback
        return node.next[char]

    def held_then(self, piece: str, length: int) -> str:
        """The first `length` characters of what is held and the piece that follows."""
        return self.stop[: min(length, self.depth)] + piece[: max(0, length - self.depth)]


def _automaton(stops: Iterable[str]) -> _Node:
    """A node for each beginning of each stop string, with fallbacks laid from short to long."""
    root = _Node("", 0)
    for stop in stops:
        _plant(root, stop)
    level = list(root.next.values())
    for node in level:
        node.fallback = root
    while level:
        level = [child for node in level for child in _link_children(node)]
    return root


def _plant(root: _Node, stop: str) -> None:
    node = root
    for depth, char in enumerate(stop, start=1):
        node = node.next.setdefault(char, _Node(stop, depth))
    node.longest = len(stop)


def _link_children(node: _Node) -> Iterator[_Node]:
    assert node.fallback is not None
    for char, child in node.next.items():
        child.fallback = node.fallback.after(char)
        child.longest = max(child.longest, child.fallback.longest)
        yield child
