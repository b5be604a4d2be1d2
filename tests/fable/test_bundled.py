"""Models that come with the package: there by name, and from then on like any other."""

import threading
from configparser import ConfigParser
from pathlib import Path

import pytest

import refollama
from refollama.errors import ModelNotFound, NotFound
from refollama.fable import bundled
from refollama.messages import Create, Embed, Show
from refollama.reach import Here
from refollama.service import Service
from refollama.shelf import LoadedModels
from refollama.store import Name, Store

MODELFILE = "FROM ./weights.gguf\nSYSTEM be kind\nPARAMETER num_predict 3\n"


@pytest.fixture
def folder(tmp_path, monkeypatch, tiny):
    """A package with two models, `fable` and `fable-two`."""
    for name in ("fable", "fable-two"):
        place = tmp_path / "package" / name
        place.mkdir(parents=True)
        (place / "Modelfile").write_text(MODELFILE)
        (place / "weights.gguf").write_bytes(tiny.read_bytes())
    monkeypatch.setattr(bundled, "FOLDER", tmp_path / "package")
    return tmp_path / "package"


@pytest.fixture
def service(folder):
    one = Service(Store.default(), LoadedModels(), local_files=False)
    yield one
    one.close()


def names(service):
    return [str(entry.name) for entry in service.tags()]


def system(service):
    return service.store.resolve(Name.parse("fable")).system


def test_nothing_is_stored_before_it_is_used(service):
    assert names(service) == []
    assert list(bundled.bundled()) == ["fable", "fable-two"]


@pytest.mark.parametrize("name", ["fable", "FABLE:latest", "library/fable"])
def test_a_name_that_is_used_is_in_the_store_from_then_on(service, name):
    found = service.find(name)
    assert found.parameters == {"num_predict": 3}
    assert names(service) == ["fable:latest"]
    assert system(service) == "be kind"


USES = {
    "answer": lambda service: service.embed(Embed("fable", ("a",))),
    "show": lambda service: service.show(Show("fable")),
    "copy": lambda service: service.copy("fable", "mine"),
    "create": lambda service: list(service.create(Create("mine", "FROM fable\nSYSTEM x\n"))),
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_whatever_uses_it_finds_it(service, use):
    use(service)
    assert "fable:latest" in names(service)


def test_a_model_built_upon_it_stays_when_it_goes(service):
    list(service.create(Create("mine", "FROM fable\nSYSTEM x\n")))
    service.delete("fable")
    assert names(service) == ["mine:latest"]
    assert service.find("mine").weights.is_file()


def test_removed_it_is_gone_until_it_is_used_again(service):
    service.show(Show("fable"))
    service.delete("fable")
    assert names(service) == []
    with pytest.raises(ModelNotFound):
        service.delete("fable")
    service.show(Show("fable"))
    assert names(service) == ["fable:latest"]


def test_a_model_of_the_user_with_this_name_is_left_alone(service, tiny):
    own = Service(service.store, service.loaded, local_files=True)
    list(own.create(Create("fable", f"FROM {tiny}\nSYSTEM mine\n")))
    assert not bundled.stock(service.store, "fable")
    assert system(service) == "mine"


@pytest.mark.parametrize("name", ["fable:7b", "me/fable", "fable2", "localhost:5000/library/fable"])
def test_other_names_are_other_models(service, name):
    with pytest.raises(ModelNotFound):
        service.find(name)
    assert names(service) == []


@pytest.mark.parametrize("name", ["", "../fable", "a/b/c/d", "x" * 1000])
def test_what_is_no_name_is_left_to_others(service, name):
    assert not bundled.stock(service.store, name)


def test_many_may_be_the_first(service):
    """All find it, and it is there once."""
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(service.find("fable"))) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({one.weights for one in found}) == 1
    assert len(found) == 8
    assert names(service) == ["fable:latest"]


def test_a_package_without_models_has_no_such_names(service, folder, monkeypatch):
    monkeypatch.setattr(bundled, "FOLDER", folder / "nowhere")
    assert list(bundled.bundled()) == []
    with pytest.raises(NotFound, match="'fable' not found"):
        service.find("fable")


def test_without_a_server_it_is_there_too(folder):
    Here().copy("fable", "mine")
    assert Store.default().resolve(Name.parse("mine")).system == "be kind"
    assert refollama.load("fable-two").defaults.num_predict == 3


def test_the_files_are_part_of_the_package():
    root = Path(__file__).parents[2]
    setup = ConfigParser()
    setup.read(root / "setup.cfg")
    packed = setup["options.package_data"]["refollama.fable"]
    assert packed == "models/*/Modelfile, models/*/*.gguf, models/*/*.json"
    assert root / "refollama" / "fable" / "models" == bundled.FOLDER
