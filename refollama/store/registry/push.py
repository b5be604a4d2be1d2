"""A model to its registry: its blobs one after another, then its manifest."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import NoReturn

import httpx

from refollama.errors import Passing, RefollamaError, RegistryError, StoreError, Unauthorized
from refollama.messages import Progress
from refollama.store import Store
from refollama.store.draft import Draft
from refollama.store.manifest import MANIFEST, Layer, Manifest
from refollama.store.name import Name, scheme_of
from refollama.store.registry.beside import Gone, beside, waited
from refollama.store.registry.session import Registry, retried
from refollama.store.registry.upload import Upload, refuse

NOT_YET = "MANIFEST_BLOB_UNKNOWN"  # Source: OCI Distribution Specification, error codes


def push(
    store: Store,
    model: str,
    *,
    insecure: bool = False,
    home: Path | None = None,
    gone: Gone = lambda: False,
) -> Generator[Progress, None, None]:
    """Send what the registry of a model lacks.  Closing the generator ends it.

    `insecure`: by http.  `home`: the folder of the key and the logins, else ~/.ollama.
    Raises: BadName, BadRequest, ModelNotFound; StoreError for blobs that are not whole here;
    RegistryError and its kin; Abandoned as soon as `gone` says so.
    """
    name = Name.parse(model)
    yield Progress("retrieving manifest")
    with (
        Registry(name, scheme=scheme_of(model), insecure=insecure, home=home) as registry,
        store.draft() as held,
        _permitted(name),
    ):
        try:
            manifest = _held(store, name, held)
        except RefollamaError:
            yield Progress("couldn't retrieve manifest")
            raise
        _check(store, manifest)
        for layer in (*manifest.layers, manifest.config):
            yield from _blob(registry, Upload(registry, store.blobs, layer), layer, gone)
        yield Progress("pushing manifest")
        _manifest(registry, name.tag, manifest, gone)
    yield Progress("success")


@contextmanager
def _permitted(name: Name) -> Iterator[None]:
    """Says what a push is not permitted to, in Ollama's words, and why if there is more to say."""
    try:
        yield
    except Unauthorized as error:
        reason = "" if str(error) == "unauthorized" else f": {error}"
        raise Unauthorized(
            f"unable to push {name.namespace}/{name.model}, make sure this namespace exists "
            f"and you are authorized to push to it{reason}"
        ) from error


# -------------------------------------------------------------------- what we have


def _held(store: Store, name: Name, held: Draft) -> Manifest:
    """The manifest; its blobs stay on the disk as long as they are held."""
    with store.blobs.lock:
        manifest = store.manifests.read(name).manifest
        for digest in manifest.digests:
            held.use(digest)
    return manifest


def _check(store: Store, manifest: Manifest) -> None:
    """Nothing is sent of a model that is not whole."""
    for layer in (*manifest.layers, manifest.config):
        size = store.blobs.size(layer.digest)
        if size != layer.size:
            raise StoreError(
                f"blob {layer.digest} has {size} bytes, its manifest says {layer.size}: "
                "pull or create its model again"
            )


# -------------------------------------------------------------------- what goes out


def _blob(
    registry: Registry, upload: Upload, layer: Layer, gone: Gone
) -> Generator[Progress, None, None]:
    """One event for a blob that is there already; else one more when it begins to go out, as the
    document of 2023 has it, and as many as its way takes."""
    at = Progress(f"pushing {layer.short}", digest=layer.digest, total=layer.size)

    def leave() -> None:
        upload.cancel()
        registry.close()

    start = iter([replace(at, status="starting upload")])
    for _ in beside(upload.send, leave, gone):
        if upload.sending:
            yield from start
            yield replace(at, completed=upload.completed)
    if upload.sending:
        yield from start
    yield replace(at, completed=layer.size)


def _manifest(registry: Registry, tag: str, manifest: Manifest, gone: Gone) -> None:
    cancelled = Event()

    def put() -> None:
        body, headers = manifest.to_bytes(newline=False), {"Content-Type": MANIFEST}
        with registry.send("PUT", f"manifests/{tag}", headers=headers, content=body) as response:
            if not response.is_success:
                _refuse(registry, response)

    def leave() -> None:
        cancelled.set()
        registry.close()

    waited(lambda: retried(put, cancelled=cancelled), leave, gone)


def _refuse(registry: Registry, response: httpx.Response) -> NoReturn:
    """As `refuse`; but a blob that is said to be missing was there when we looked: whoever sends
    the same one at this moment has not ended yet, and it may be found in a second."""
    try:
        refuse(registry, response)
    except RegistryError as error:
        if NOT_YET in str(error):
            raise Passing(str(error)) from error
        raise
