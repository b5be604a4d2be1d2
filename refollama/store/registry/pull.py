"""A model from its registry: its manifest, then the blobs that we lack, then our manifest."""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import httpx

from refollama.errors import FormatError, RegistryError, StoreError, Unauthorized
from refollama.messages import Progress
from refollama.store import TEXT_LIMIT, Store
from refollama.store.blobs import free_space
from refollama.store.manifest import MANIFEST, READ_LIMIT, Layer, Manifest
from refollama.store.name import Name, scheme_of
from refollama.store.parts import left_over
from refollama.store.registry.beside import PROGRESS_EVERY, Gone, check_gone, waited
from refollama.store.registry.download import Download, Downloads, Line, is_here
from refollama.store.registry.failures import refusal
from refollama.store.registry.session import Registry, retried

MOST_LAYERS = 1000  # of one model; real ones have about six
SPARE = 64 << 20  # bytes that are left free on the disk


def pull(
    store: Store,
    model: str,
    *,
    insecure: bool = False,
    downloads: Downloads,
    home: Path | None = None,
    gone: Gone = lambda: False,
) -> Generator[Progress, None, None]:
    """Fetch what is missing of a model.  Closing the generator leaves it; what has come stays.

    `insecure`: by http.  `home`: the folder of the key and the logins, else ~/.ollama.
    Raises: BadName, BadRequest; RegistryError and its kin; StoreError when the disk says no, or
    is too small; Abandoned as soon as `gone` says so.
    """
    name = Name.parse(model)
    registry = Registry(name, scheme=scheme_of(model), insecure=insecure, home=home)
    with Line(registry, name.full) as line, store.draft() as draft:
        yield Progress("pulling manifest")
        manifest = _manifest(registry, name.tag, gone)
        for digest in manifest.digests:
            draft.use(digest)
        _check_space(store, manifest)
        for layer in (*manifest.layers, manifest.config):
            yield from _blob(downloads, line, layer, gone)
        # Each blob was hashed before it got its name. That they are here, commit looks once more.
        yield Progress("verifying sha256 digest")
        yield Progress("writing manifest")
        draft.commit(name, manifest, newline=False)
        if store.prunes:
            yield Progress("removing any unused layers")
    yield Progress("success")


# -------------------------------------------------------------------- the manifest


def _manifest(registry: Registry, tag: str, gone: Gone) -> Manifest:
    """What the registry says that the model is made of."""
    cancelled = threading.Event()

    def leave() -> None:
        cancelled.set()
        registry.close()

    def read() -> bytes:
        return retried(lambda: _read(registry, tag), cancelled=cancelled)

    with _about_the_manifest():
        manifest = Manifest.parse(waited(read, leave, gone))
        _check_shape(manifest)
    return manifest


@contextmanager
def _about_the_manifest() -> Iterator[None]:
    """Says what was asked for when it went wrong, as Ollama does."""
    try:
        yield
    except Unauthorized as error:
        raise Unauthorized(f"pull model manifest: {error}") from error
    except (RegistryError, FormatError) as error:
        raise RegistryError(f"pull model manifest: {error}") from error


def _read(registry: Registry, tag: str) -> bytes:
    status, headers, data = registry.read(
        "GET", f"manifests/{tag}", limit=READ_LIMIT, headers={"Accept": MANIFEST}
    )
    if status == httpx.codes.NOT_FOUND:
        raise RegistryError("file does not exist")
    if status != httpx.codes.OK:
        raise refusal(status, headers, data)
    return data


def _check_shape(manifest: Manifest) -> None:
    """Of a manifest from outside.  Raises: FormatError for what no model has."""
    if len(manifest.layers) > MOST_LAYERS:
        raise FormatError(f"{len(manifest.layers)} layers; at most {MOST_LAYERS} are taken")
    if not all(layer.media_type for layer in manifest.layers):
        raise FormatError("a layer without mediaType")
    if manifest.config.size > TEXT_LIMIT:
        raise FormatError(f"a config of {manifest.config.size} bytes; {TEXT_LIMIT} are taken")
    sizes = {(layer.digest, layer.size) for layer in (*manifest.layers, manifest.config)}
    if len(sizes) > len(manifest.digests):
        raise FormatError("one blob with two sizes")


def _check_space(store: Store, manifest: Manifest) -> None:
    """Before the first byte: is there room for what is missing?  Raises: StoreError."""
    blobs = store.blobs
    missing = {
        layer.digest: layer.size - left_over(blobs, layer.digest, layer.size)
        for layer in (*manifest.layers, manifest.config)
        if not is_here(blobs, layer)
    }
    needed, free = sum(missing.values()) + SPARE, free_space(blobs.folder)
    if missing and needed > free:
        raise StoreError(
            f"{_shown(needed)} are needed, but only {_shown(free)} are free where the "
            "models are: free some space or set OLLAMA_MODELS to another disk"
        )


def _shown(size: int) -> str:
    return f"{size / 1e6:.0f} MB" if size < 1e9 else f"{size / 1e9:.1f} GB"


# -------------------------------------------------------------------- the blobs


def _blob(
    downloads: Downloads, line: Line, layer: Layer, gone: Gone
) -> Generator[Progress, None, None]:
    """One event for a blob that is here already; else as many as its way takes."""
    at = Progress(f"pulling {layer.short}", digest=layer.digest, total=layer.size)
    while not is_here(downloads.blobs, layer):
        with downloads.joined(line, layer) as download:
            yield from _begun(download, layer, gone)
            at = replace(at, resumed=download.resumed)
            if download.resumed or not download.ended.is_set():
                yield replace(at, completed=download.resumed)
            while not _ended(download, gone):
                at = replace(at, completed=download.completed, resumed=download.resumed)
                yield at
        _check_failure(download, line)
    yield replace(at, completed=layer.size)


def _begun(download: Download, layer: Layer, gone: Gone) -> Generator[Progress, None, None]:
    """Until it is known where a download goes on. Another process may fetch the same blob: then
    we wait, and see in its records how far it comes."""
    while not download.begun.wait(PROGRESS_EVERY):
        check_gone(gone)
        if download.waits:
            yield Progress(f"waiting for another process that pulls {layer.short}")


def _ended(download: Download, gone: Gone) -> bool:
    if download.ended.wait(PROGRESS_EVERY):
        return True
    check_gone(gone)
    return False


def _check_failure(download: Download, line: Line) -> None:
    """Raises: why it failed.  What another model's registry did not have, ours may have."""
    foreign = download.source != line.source and isinstance(download.failure, RegistryError)
    if download.failure is not None and not foreign:
        raise download.failure
