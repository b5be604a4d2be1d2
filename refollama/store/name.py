"""Model names: `[scheme://][host/][namespace/]model[:tag]`.

    llama2                  registry.ollama.ai/library/llama2:latest     shown as llama2:latest
    me/x:7b                 registry.ollama.ai/me/x:7b                   shown as me/x:7b
    localhost:5000/ns/m     localhost:5000/ns/m:latest                   shown in full

A name becomes a path, so nothing but this grammar may ever pass: a `Name` that exists is safe.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import PurePosixPath

from refollama.errors import BadName

HOST = "registry.ollama.ai"
NAMESPACE = "library"
TAG = "latest"

_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,79}")
_HOST = re.compile(r"(?=.{1,350}\Z)[A-Za-z0-9_][A-Za-z0-9_.-]*(:[0-9]{1,5})?")
_SCHEMES = ("https", "http")


@dataclass(frozen=True, slots=True, order=True)
class Name:
    """The full name of a model; every part obeys the grammar.

    Raises: BadName (status 400) when a part does not.
    """

    host: str
    namespace: str
    model: str
    tag: str

    def __post_init__(self) -> None:
        _check("host", self.host, _HOST, "up to 350 characters, perhaps a port")
        for kind in ("namespace", "model", "tag"):
            _check(kind, getattr(self, kind), _PART, "up to 80 characters")

    @classmethod
    def parse(cls, text: str) -> Name:
        """The name that a user typed; what is left out is filled in, the scheme is dropped."""
        if not text:
            raise BadName("a model name is required, such as 'llama2' or 'me/llama2:7b'")
        *places, last = _without_scheme(text).split("/")
        if len(places) > 2:
            raise BadName(f"{_shown(text)} has too many parts: [host/][namespace/]model[:tag]")
        host, namespace = ([HOST, NAMESPACE], [HOST, *places], places)[len(places)]
        model, colon, tag = last.partition(":")
        return cls(host, namespace, model, tag if colon else TAG)

    def __str__(self) -> str:
        """As people know it: without the defaults, but always with its tag."""
        if self.host != HOST:
            return self.full
        place = "" if self.namespace == NAMESPACE else f"{self.namespace}/"
        return f"{place}{self.model}:{self.tag}"

    @property
    def full(self) -> str:
        return f"{self.host}/{self.namespace}/{self.model}:{self.tag}"

    @property
    def path(self) -> PurePosixPath:
        """Where its manifest lies, seen from the folder of manifests."""
        return PurePosixPath(self.host, self.namespace, self.model, self.tag)

    def same_as(self, other: Name) -> bool:
        """Equal but for upper and lower case: no two such models live in one store."""
        return self.full.lower() == other.full.lower()


def scheme_of(text: str) -> str:
    """How to speak to the registry of a name as it was typed: `https`, or `http` if it says so.

    Raises: BadName for another scheme.
    """
    return _split_scheme(text)[0]


def _without_scheme(text: str) -> str:
    return _split_scheme(text)[1]


def _split_scheme(text: str) -> tuple[str, str]:
    scheme, mark, rest = text.partition("://")
    if not mark:
        return _SCHEMES[0], text
    if scheme.lower() not in _SCHEMES:
        raise BadName(f"{_shown(text)} is no model name: its scheme must be http or https")
    return scheme.lower(), rest


def _check(kind: str, part: str, grammar: re.Pattern[str], length: str) -> None:
    if grammar.fullmatch(part) and ".." not in part:
        return
    raise BadName(
        f"{_shown(part)} is no {kind} of a model name: it must be {length}, letters, digits and "
        "_ . - only, start with a letter, a digit or _, and not hold '..'"
    )


def _shown(text: str) -> str:
    """A text as a message may repeat it: never pages of it, never raw control characters."""
    return repr(text) if len(text) <= 100 else f"{text[:97]!r}..."
