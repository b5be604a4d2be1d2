"""Passwords: for one host each, on the disk for their owner only, and never in a message."""

import stat

import pytest

from refollama.errors import BadRequest, StoreError
from refollama.store.registry import logins
from refollama.store.registry.logins import Login

HOST, USER, PASSWORD = (
    "OLLAMA_REGISTRY_HOST",
    "OLLAMA_REGISTRY_USERNAME",
    "OLLAMA_REGISTRY_PASSWORD",
)


@pytest.fixture(autouse=True)
def no_login_of_the_user(monkeypatch):
    for name in (HOST, USER, PASSWORD):
        monkeypatch.delenv(name, raising=False)


def test_what_is_stored_is_found_for_its_host_only(home):
    logins.store("registry.example:5000", "ann", "pass:word")
    assert logins.find("registry.example:5000") == Login("ann", "pass:word")
    for other in (
        "registry.example",
        "registry.example:5001",
        "example:5000",
        "x.registry.example:5000",
    ):
        assert logins.find(other) is None
    assert (home / ".ollama" / "logins.json").exists()


@pytest.mark.parametrize(
    "spelling", ["Registry.Example", "registry.example:443", " registry.example"]
)
def test_one_host_has_one_login_however_it_is_spelt(spelling):
    logins.store("registry.example", "ann", "old")
    logins.store(spelling, "ann", "new")
    assert logins.find("registry.example") == Login("ann", "new")
    assert logins.forget(spelling)
    assert logins.find("registry.example") is None


def test_forgetting_leaves_the_others_and_says_whether_there_was_one():
    logins.store("a.example", "ann", "1")
    logins.store("b.example", "bob", "2")
    assert logins.forget("a.example")
    assert not logins.forget("a.example")
    assert logins.find("b.example") == Login("bob", "2")


def test_the_file_is_for_its_owner_and_nothing_else_is_left(home):
    folder = home / ".ollama"
    folder.mkdir()
    (folder / "logins.json").write_text("{}")
    (folder / "logins.json").chmod(0o644)
    logins.store("a.example", "ann", "1")
    assert stat.S_IMODE((folder / "logins.json").stat().st_mode) == 0o600
    assert [path.name for path in folder.iterdir()] == ["logins.json"]


def test_the_environment_counts_for_the_host_that_it_names(monkeypatch):
    monkeypatch.setenv(USER, "eve")
    monkeypatch.setenv(PASSWORD, "p")
    assert logins.find("registry.example") is None  # for no host, as none is named
    monkeypatch.setenv(HOST, "registry.example")
    assert logins.find("registry.example") == Login("eve", "p")
    assert logins.find("evil.example") is None


def test_the_environment_goes_before_the_file(monkeypatch):
    logins.store("registry.example", "ann", "1")
    for name, value in ((HOST, "registry.example"), (USER, "eve"), (PASSWORD, "p")):
        monkeypatch.setenv(name, value)
    assert logins.find("registry.example") == Login("eve", "p")


def test_a_user_without_a_host_is_warned_about_without_the_password(monkeypatch, caplog):
    monkeypatch.setenv(USER, "eve")
    monkeypatch.setenv(PASSWORD, "hunter2")
    logins.find("registry.example")
    assert HOST in caplog.text
    assert "hunter2" not in caplog.text


def test_a_login_never_prints_its_password():
    assert "hunter2" not in repr(Login("eve", "hunter2")) + str(Login("eve", "hunter2"))


@pytest.mark.parametrize("user", ["", "ann:x"])
def test_a_user_that_basic_cannot_carry_is_refused(user):
    with pytest.raises(BadRequest, match="user name"):
        logins.store("a.example", user, "1")


@pytest.mark.parametrize("text", ["", "[]", '{"a": ', "[" * 100_000, "\xff"])
def test_a_broken_file_is_named_and_kept(home, text):
    path = home / ".ollama" / "logins.json"
    path.parent.mkdir()
    path.write_bytes(text.encode("latin-1"))
    for work in (
        lambda: logins.find("a.example"),
        lambda: logins.store("a.example", "ann", "1"),
        lambda: logins.forget("a.example"),
    ):
        with pytest.raises(StoreError, match=str(path)):
            work()
    assert path.read_bytes() == text.encode("latin-1")


@pytest.mark.parametrize(
    "record", ["null", "[]", '"ann"', '{"user": "ann"}', '{"user": 1, "password": "x"}']
)
def test_an_odd_record_is_no_login(home, record):
    path = home / ".ollama" / "logins.json"
    path.parent.mkdir()
    path.write_text(f'{{"a.example": {record}}}')
    assert logins.find("a.example") is None
