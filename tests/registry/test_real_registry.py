"""There and back: a model goes to Debian's registry and returns as it was, to the byte."""

import re
import threading

import pytest

from refollama.errors import RefollamaError, RegistryError
from refollama.store import Store
from refollama.store.name import Name
from refollama.store.registry import Downloads, logins, pull, push
from tests.registry.certificates import Certificate
from tests.registry.debian import PASSWORD, USER, debian
from tests.registry.models import contents, fill, is_sound, some_bytes
from tests.registry.tokens import TokenService

pytestmark = pytest.mark.slow
WEIGHTS = some_bytes(30_000_000)


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "models")


@pytest.fixture
def tokens():
    with TokenService() as service:
        yield service


def pulled(store, name, *, insecure=True):
    downloads = Downloads(store.blobs)
    return [p.status for p in pull(store, name, insecure=insecure, downloads=downloads)]


def pushed(store, name, *, insecure=True):
    return [p.status for p in push(store, name, insecure=insecure)]


def there_and_back(store, host, *, insecure=True):
    """Push, delete, pull; the store is what it was."""
    name = f"{host}/library/tale:latest"
    fill(store, name, WEIGHTS, b"")
    before = contents(store.root)
    sent = pushed(store, name, insecure=insecure)
    assert (sent[0], sent[-2:]) == ("retrieving manifest", ["pushing manifest", "success"])
    store.remove(Name.parse(name))
    assert not [path for path in store.root.rglob("*") if path.is_file()]
    got = pulled(store, name, insecure=insecure)
    assert got[0] == "pulling manifest"
    end = ["verifying sha256 digest", "writing manifest", "removing any unused layers", "success"]
    assert got[-4:] == end
    assert contents(store.root) == before


def test_there_and_back(store, tmp_path):
    with debian(tmp_path / "registry") as registry:
        there_and_back(store, registry.host)
        assert len(registry.blobs()) >= 6


def test_a_second_push_sends_nothing_and_a_second_pull_fetches_nothing(store, tmp_path):
    with debian(tmp_path / "registry") as registry:
        there_and_back(store, registry.host)
        times = {path: path.stat().st_mtime_ns for path in (tmp_path / "registry").rglob("data")}
        before = contents(store.root)
        pushed(store, f"{registry.host}/library/tale")
        pulled(store, f"{registry.host}/library/tale")
        assert contents(store.root) == before
        after = {path: path.stat().st_mtime_ns for path in (tmp_path / "registry").rglob("data")}
        assert {path: after[path] for path in times} == times


def test_a_new_version_takes_the_old_ones_blobs_away(store, tmp_path):
    """Those that nobody else names; what both versions share is neither sent nor fetched again."""
    other = Store(tmp_path / "other")
    with debian(tmp_path / "registry") as registry:
        name = f"{registry.host}/library/tale:latest"
        fill(store, name, WEIGHTS, b"old")
        pushed(store, name)
        pulled(other, name)
        fill(store, name, WEIGHTS, b"new")
        pushed(store, name)
        pulled(other, name)
        assert is_sound(other.root)
        held = set(contents(other.root).values())
        assert {WEIGHTS, b"new"} <= held and b"old" not in held


def test_weights_of_a_parent_are_mounted_not_sent(store, tmp_path):
    """A layer `from` another model of the registry is taken over there."""
    with debian(tmp_path / "registry") as registry:
        there_and_back(store, registry.host)
        child = f"{registry.host}/me/child:latest"
        fill(store, child, WEIGHTS, texts=[], parent=f"{registry.host}/library/tale:latest")
        before = contents(store.root)
        pushed(store, child)
        log = registry.log.read_text()
        assert re.search(r'POST /v2/me/child/blobs/uploads/\?\S*mount=\S+ HTTP/1.1" 201', log)
        assert len(re.findall(r'PATCH /v2/me/child/\S+ HTTP/1.1" 202', log)) == 1  # the config
        store.remove(Name.parse(child))
        pulled(store, child)
        assert contents(store.root) == before


@pytest.mark.parametrize("given", ["environment", "login"])
def test_user_and_password(store, tmp_path, monkeypatch, given):
    with debian(tmp_path / "registry", basic=True) as registry:
        name = f"{registry.host}/library/tale:latest"
        with pytest.raises(RegistryError, match="unauthorized"):
            pulled(store, name)
        if given == "environment":
            monkeypatch.setenv("OLLAMA_REGISTRY_HOST", registry.host)
            monkeypatch.setenv("OLLAMA_REGISTRY_USERNAME", USER)
            monkeypatch.setenv("OLLAMA_REGISTRY_PASSWORD", PASSWORD)
        else:
            logins.store(registry.host, USER, PASSWORD)
        there_and_back(store, registry.host)
        if given == "login":
            logins.store(registry.host, USER, "shut sesame")
            with pytest.raises(RegistryError, match="unauthorized") as caught:
                pulled(store, name)
            assert "shut sesame" not in str(caught.value)


def test_tokens_for_our_key(store, tmp_path, tokens, home):
    """The service checks each request for a token to the byte; the registry, its signature."""
    with debian(tmp_path / "registry", tokens=tokens) as registry:
        there_and_back(store, registry.host)
    assert tokens.refused == []
    public = (home / ".ollama" / "id_ed25519.pub").read_text().split()[1]
    assert set(tokens.keys) == {public}


def test_a_token_is_shared_by_the_threads_of_a_pull(store, tmp_path, tokens):
    with debian(tmp_path / "registry", tokens=tokens) as registry:
        there_and_back(store, registry.host)
        asked = len(tokens.asked)
        store.remove(Name.parse(f"{registry.host}/library/tale"))
        pulled(store, f"{registry.host}/library/tale")
        assert len(tokens.asked) == asked + 1


def test_an_unknown_key_gets_a_sentence(store, tmp_path, tokens):
    tokens.only_keys = set()
    with debian(tmp_path / "registry", tokens=tokens) as registry:
        fill(store, f"{registry.host}/library/tale", b"weights")
        for go in (pushed, pulled):
            with pytest.raises(RefollamaError) as caught:
                go(store, f"{registry.host}/library/tale")
            assert "\n" not in str(caught.value)
        assert registry.blobs() == set()


def test_a_password_at_the_token_service(store, tmp_path, tokens):
    tokens.users = {USER: PASSWORD}
    with debian(tmp_path / "registry", tokens=tokens) as registry:
        logins.store(registry.host, USER, PASSWORD)
        there_and_back(store, registry.host)
    assert tokens.refused == []


def test_https_with_a_certificate_that_is_trusted(store, tmp_path, monkeypatch):
    """And a sentence, before anything is sent, for one that is not."""
    tls = Certificate.new()
    with debian(tmp_path / "registry", tls=tls) as registry:
        fill(store, f"{registry.host}/library/tale", b"weights")
        monkeypatch.delenv("SSL_CERT_FILE", raising=False)
        with pytest.raises(RegistryError, match="certificate"):
            pushed(store, f"{registry.host}/library/tale", insecure=False)
        monkeypatch.setenv("SSL_CERT_FILE", str(tls.write(tmp_path)))
        there_and_back(store, registry.host, insecure=False)


def test_two_push_the_same_model_at_once(store, tmp_path):
    with debian(tmp_path / "registry") as registry:
        name = f"{registry.host}/library/tale:latest"
        fill(store, name, WEIGHTS)
        ends = []
        threads = [
            threading.Thread(target=lambda: ends.append(pushed(store, name)[-1])) for _ in "ab"
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert ends == ["success", "success"]
        other = Store(tmp_path / "other")
        pulled(other, name)
        assert contents(other.root) == contents(store.root)
