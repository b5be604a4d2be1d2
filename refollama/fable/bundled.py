"""Which models come with the package?  Those that lie in its folder, each in one of its own.

    models/fable/Modelfile                          FROM ./fable.gguf, template, parameters
    models/fable/fable.gguf
    models/fable-vision/Modelfile …                 FROM twice: a language model and its eyes

They are in nobody's store at first. Whoever uses one by its name finds it there from then on: a
model like any other, to be listed, copied, shown, built upon. Removed, it is gone until its name is
used again. Nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from refollama.create import create
from refollama.errors import BadName
from refollama.messages import Create
from refollama.store import Name, Store

FOLDER = Path(__file__).with_name("models")


def bundled() -> Sequence[str]:
    """The names of the models that come with the package."""
    return sorted(found.parent.name for found in FOLDER.glob("*/Modelfile"))


def stock(store: Store, model: str) -> bool:
    """Put the bundled model of this name into the store, unless it is there; was it put there now?

    Any other name, and what is none, is left to whoever looks for it.
    Raises: StoreError if the store takes no files.
    """
    try:
        name = Name.parse(model)
    except BadName:
        return False
    found = next((one for one in bundled() if Name.parse(one).same_as(name)), None)
    if found is None or store.manifests.match(name) in store.manifests.names():
        return False
    recipe = FOLDER / found / "Modelfile"
    for _ in create(store, Create(found, path=str(recipe)), local_files=True):
        pass
    return True
