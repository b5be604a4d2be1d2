"""One blob on its way to a registry.

    HEAD   blobs/<digest>                  200: it is there already
    POST   blobs/uploads/?mount=…&from=…   201: taken over from another repository
                                           202: wanted, and where its bytes shall go
    PATCH  <location>                      a part: taken, and the next one follows; or redirected
                                           (307): it goes to another place, beside the next ones
    GET    <location>                      after a break: how much has arrived?
    PUT    <location>?digest=…&etag=…      the end; or all of it, where PATCH is not known

What breaks is tried again, and an upload that is lost begins anew: a few times, not for ever.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Container, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import suppress
from itertools import chain, islice
from typing import NoReturn
from urllib.parse import urlencode, urlsplit, urlunsplit

import httpx

from refollama.errors import (
    Abandoned,
    BadName,
    Passing,
    RegistryError,
    StoreError,
    Unauthorized,
)
from refollama.store.blobs import Blobs
from refollama.store.manifest import Layer
from refollama.store.name import Name
from refollama.store.parts import Part
from refollama.store.registry.beside import in_thread
from refollama.store.registry.outgoing import Outgoing
from refollama.store.registry.session import Registry, retried

AT_ONCE = 4  # parts that go to another place at the same time
LITTLE = 1 << 16  # bytes; a try that moves fewer of a part has moved nothing

_OCTETS = {"Content-Type": "application/octet-stream"}
_NOT_FOUND = (httpx.codes.NOT_FOUND, httpx.codes.GONE)
_RANGE = re.compile(r"(?:bytes[= ])?\d{1,20}-(\d{1,20})")


class _Lost(Exception):
    """The registry does not know the upload any more."""


class _Doubtful(Exception):
    """The registry says what cannot be: once is forgiven."""


class _InOnePiece(Exception):
    """The registry knows no PATCH."""


class Upload:
    """The upload of one blob: `send` does it, `cancel` ends it from another thread."""

    def __init__(self, registry: Registry, blobs: Blobs, layer: Layer) -> None:
        self._registry = registry
        self._blobs = blobs
        self._layer = layer
        self._cancelled = threading.Event()
        self._attempt: _Attempt | None = None
        self._in_parts = True
        self._doubted = False

    @property
    def sending(self) -> bool:
        """Does the registry want its bytes?"""
        return self._attempt is not None and self._attempt.location != ""

    @property
    def completed(self) -> int:
        """Bytes that are out; fewer again after a break that took some of them."""
        return 0 if self._attempt is None else self._attempt.bytes.completed

    def cancel(self) -> None:
        self._cancelled.set()
        if self._attempt is not None:
            self._attempt.ended.set()

    def send(self) -> None:
        """Returns when the registry has the blob, wherever it has it from.

        Raises: RegistryError and its kin if it does not take it; StoreError if the blob is
        damaged on our disk; Abandoned once it is cancelled.
        """
        there = retried(self._is_there, cancelled=self._cancelled)
        if not there:
            retried(self._anew, cancelled=self._cancelled)

    def _is_there(self) -> bool:
        return is_there(self._registry, self._layer)

    def _anew(self) -> None:
        """One upload from its beginning.  Raises: Passing if the next one may go better."""
        attempt = self._attempt = _Attempt(self._registry, self._blobs, self._layer)
        try:
            if self._cancelled.is_set():
                raise Abandoned("the upload was cancelled")
            attempt.run(in_parts=self._in_parts)
        except _Lost as error:
            raise Passing(f"the registry lost the upload: {error}") from error
        except _Doubtful as error:
            if self._doubted:
                raise RegistryError(str(error)) from error
            self._doubted = True
            raise Passing(str(error), retry_after=0) from error
        except _InOnePiece as error:
            self._in_parts = False
            raise Passing(str(error), retry_after=0) from error


def is_there(registry: Registry, layer: Layer) -> bool:
    """Does the registry have a blob?  Raises: RegistryError if it is of another size."""
    with registry.send("HEAD", f"blobs/{layer.digest}") as response:
        if response.status_code == httpx.codes.NOT_FOUND:
            return False
        if not response.is_success:
            refuse(registry, response)
        size = response.headers.get("Content-Length", str(layer.size))
    if size != str(layer.size):
        raise RegistryError(
            f"the registry has blob {layer.digest[:19]}… with {size[:20]} bytes, "
            f"it must be {layer.size}"
        )
    return True


# -------------------------------------------------------------------- from POST to PUT


class _Attempt:
    """One upload, as the registry knows it.  Setting `ended` ends it."""

    def __init__(self, registry: Registry, blobs: Blobs, layer: Layer) -> None:
        self.location = ""  # where it goes on; empty before the registry wants it
        self.ended = threading.Event()
        self.bytes = Outgoing(blobs.path(layer.digest), layer.size, self._wanted)
        self._registry = registry
        self._blobs = blobs
        self._layer = layer
        self._have = 0  # bytes that are there, or have a place to go to
        self._elsewhere: list[Future[None]] = []

    def run(self, *, in_parts: bool) -> None:
        """Raises: _Lost, _Doubtful, _InOnePiece, RegistryError, StoreError, Abandoned."""
        try:
            if self._begin(_repository(self._layer.from_)):
                return
            if in_parts:
                self._send_parts()
            self._commit(whole=not in_parts)
        finally:
            self.ended.set()
            wait(self._elsewhere)

    def _begin(self, source: str) -> bool:
        """Ask for an upload; True if the blob was taken over from another repository."""
        mount = {"mount": self._layer.digest, "from": source} if source else {}
        try:
            return self._post(mount)
        except Unauthorized:
            if not mount:
                raise
        return self._post({})  # we may write here, yet not read there

    def _post(self, mount: dict[str, str]) -> bool:
        with self._registry.send("POST", _with_query("blobs/uploads/", mount)) as response:
            if mount and response.status_code == httpx.codes.CREATED:
                return True
            if response.status_code != httpx.codes.ACCEPTED:
                refuse(self._registry, response)
            self.location = self._registry.location(response)
            _finish(response)
        return False

    def _wanted(self) -> None:
        if self.ended.is_set():
            raise Abandoned("the upload was cancelled")

    # ---------------------------------------------------------------- parts

    def _send_parts(self) -> None:
        while self._have < self._layer.size:
            self._leave_running(AT_ONCE - 1)
            retried(self._send_some, cancelled=self.ended)
        self._leave_running(0)

    def _send_some(self) -> None:
        """What is missing of a part.  Raises: Passing if that did not bring us on."""
        before, part = self._have, self.bytes.part_at(self._have)
        problem = Passing("the registry took nothing of a part")
        try:
            self._patch(part)
        except Passing as error:
            if self._elsewhere:  # what a registry sends on, it has nothing of
                raise
            problem = error
            self._ask_how_far()
        if self._have < min(part.end, before + LITTLE):
            raise problem

    def _patch(self, part: Part) -> None:
        """Send the rest of a part, in the hope that the registry takes it, or says who does."""
        first = self._have
        headers = _OCTETS | {
            "Content-Length": str(part.end - first),
            "Content-Range": f"{first}-{part.end - 1}",
            "X-Redirect-Uploads": "1",
        }
        counted = not self._elsewhere  # else it counts when it goes where it belongs

        def body() -> Iterable[bytes]:
            return self.bytes.body(part, first, counted=counted)

        with self._registry.send(
            "PATCH", self.location, headers=headers, content=body, follow=False
        ) as response:
            if response.status_code == httpx.codes.TEMPORARY_REDIRECT:
                self._send_elsewhere(part, response)
            elif response.is_success:
                self.location = self._registry.location(response)
                self._believe(_arrived(response, otherwise=part.end))
            else:
                self._patch_refused(response)
            _finish(response)

    def _patch_refused(self, response: httpx.Response) -> NoReturn:
        status = response.status_code
        if status in (httpx.codes.METHOD_NOT_ALLOWED, httpx.codes.NOT_IMPLEMENTED):
            raise _InOnePiece("the registry takes no parts")
        try:
            self._refused(response, lost=_NOT_FOUND)
        except RegistryError as error:
            if status == httpx.codes.REQUESTED_RANGE_NOT_SATISFIABLE:
                raise Passing(str(error)) from error  # it has more, or less, than we know of
            if "UNSUPPORTED" in str(error):
                raise _InOnePiece(str(error)) from error
            raise

    def _ask_how_far(self) -> None:
        """After a break.  Some registries cannot say, and then the upload is lost."""
        with self._registry.send("GET", self.location, follow=False) as response:
            if not response.is_success:
                self._refused(response, lost=range(400, 500))
            if "Range" not in response.headers:
                raise _Lost("it does not say how much has arrived")
            self._believe(_arrived(response, otherwise=0))
            if "Location" in response.headers:
                self.location = self._registry.location(response)
            _finish(response)
        self.bytes.rewind(self._have)

    def _believe(self, arrived: int) -> None:
        if not self._have <= arrived <= self.bytes.reached:
            raise _Doubtful(
                f"the registry claims to have {arrived} bytes of blob "
                f"{self._layer.digest[:19]}…, which cannot be"
            )
        self._have = arrived

    # ---------------------------------------------------------------- parts to another place

    def _send_elsewhere(self, part: Part, response: httpx.Response) -> None:
        """Begin to send a part where it was redirected to; the next one need not wait for it."""
        target = self._registry.location(response, redirect=True)
        if "Docker-Upload-Location" in response.headers:
            self.location = self._registry.location(response)
        part.completed = 0  # the registry took none of it
        self._have = part.end

        def put() -> None:
            retried(lambda: self._put(part, target), cancelled=self.ended)

        self._elsewhere.append(in_thread(put))

    def _put(self, part: Part, target: str) -> None:
        """One part, to somebody who must not learn who we are."""
        with self._registry.send(
            "PUT",
            target,
            headers=_OCTETS | {"Content-Length": str(part.size)},
            content=lambda: self.bytes.body(part, part.offset),
            follow=False,
            authorised=False,
        ) as response:
            if not response.is_success:
                self._refused_elsewhere(response)
            _finish(response)

    def _refused_elsewhere(self, response: httpx.Response) -> NoReturn:
        """The address may have expired: only an upload from its beginning brings new ones."""
        try:
            refuse(self._registry, response)
        except Passing:
            raise
        except RegistryError as error:
            raise _Doubtful(f"a part of the blob was refused by its storage: {error}") from error

    def _leave_running(self, number: int) -> None:
        """Wait until no more than so many parts are on their way.  Raises: what broke them."""
        running = set(self._elsewhere)
        while len(running) > number:
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                future.result()

    # ---------------------------------------------------------------- the end

    def _commit(self, *, whole: bool) -> None:
        """All bytes are there, or come now.  Half of a whole cannot be gone on from."""
        if whole:
            self._end(whole=True)
        else:
            retried(lambda: self._end(whole=False), cancelled=self.ended)

    def _end(self, *, whole: bool) -> None:
        try:
            self._put_end(whole=whole)
        except (Passing, _Lost):
            # Perhaps only the answer was lost: registries hash large blobs for a long time.
            if not is_there(self._registry, self._layer):
                raise

    def _put_end(self, *, whole: bool) -> None:
        query = {"digest": self._layer.digest}
        if self.bytes.parts and not whole:
            query["etag"] = self.bytes.etag()
        size = self._layer.size if whole else 0
        with self._registry.send(
            "PUT",
            _with_query(self.location, query),
            headers=_OCTETS | {"Content-Length": str(size)},
            content=self._all if size else b"",
            follow=False,
        ) as response:
            if not response.is_success:
                self._end_refused(response)
            _finish(response)

    def _all(self) -> Iterable[bytes]:
        bodies = (self.bytes.body(part, part.offset) for part in self.bytes.parts)
        return chain.from_iterable(bodies)

    def _end_refused(self, response: httpx.Response) -> NoReturn:
        """A digest that is not accepted: whose fault is it?"""
        try:
            self._refused(response, lost=(*_NOT_FOUND, 416))
        except RegistryError as error:
            if "DIGEST_INVALID" not in str(error):
                raise
            if not self._blobs.verify(self._layer.digest):
                short = f"blob {self._layer.digest[:19]}…"
                raise StoreError(
                    f"{short} is damaged on this disk: pull or create its model again"
                ) from error
            raise _Doubtful(f"the registry received other bytes than were sent: {error}") from error

    def _refused(self, response: httpx.Response, *, lost: Container[int]) -> NoReturn:
        """Raises: _Lost for these statuses, if it is no matter of who we are; else the refusal."""
        try:
            refuse(self._registry, response)
        except (Passing, Unauthorized):
            raise
        except RegistryError as error:
            if response.status_code in lost or "BLOB_UPLOAD_" in str(error):
                raise _Lost(str(error)) from error
            raise


# -------------------------------------------------------------------- small things


def _arrived(response: httpx.Response, *, otherwise: int) -> int:
    """How many bytes an upload has, or `otherwise` if its answer does not say.

    `0-0` is one byte, and also how registries say that they have none.
    """
    match = _RANGE.fullmatch(response.headers.get("Range", ""))
    if match is None:
        return otherwise
    arrived = int(match[1]) + 1
    return 0 if arrived == 1 != otherwise else arrived


def _repository(source: str) -> str:
    """Where the parent of a layer lives, as registries know it; empty if that is no name."""
    try:
        name = Name.parse(source)
    except BadName:
        return ""
    return f"{name.namespace}/{name.model}"


def _with_query(url: str, query: dict[str, str]) -> str:
    """The same address with more to say; what it says already (`_state`) stays to the byte."""
    parts = urlsplit(url)
    joined = "&".join(filter(None, [parts.query, urlencode(query)]))
    return urlunsplit(parts._replace(query=joined, fragment=""))


def _finish(response: httpx.Response) -> None:
    """Read the little that is left of an answer, so that its connection can be used again."""
    with suppress(httpx.TransportError, Passing):
        for _ in islice(response.iter_raw(), 4):
            pass


def refuse(registry: Registry, response: httpx.Response) -> NoReturn:
    """A refusal as the error that it is; one without words gets those that belong to its number."""
    status = response.status_code
    try:
        registry.refuse(response)
    except RegistryError as error:
        if str(error) == str(status):
            words = httpx.codes.get_reason_phrase(status)
            method = response.request.method
            error.args = (f"the registry answers {method} with {status} {words}".rstrip(),)
        raise
