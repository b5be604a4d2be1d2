"""Files that a Modelfile names go to a server on another machine; nothing else does."""

import hashlib

import pytest

from refollama.client import Client
from refollama.errors import ModelfileError
from refollama.upload import with_blobs


class Remote(Client):
    """A server that remembers what it was sent."""

    def __init__(self, *known):
        super().__init__("127.0.0.1:9")  # nobody is asked
        self.blobs = dict.fromkeys(known, b"")

    def has_blob(self, digest):
        return digest in self.blobs

    def send_blob(self, digest, chunks):
        self.blobs[digest] = b"".join(chunks)


def digest(content):
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"weights")
    (tmp_path / "lora.bin").write_bytes(b"adapter")
    (tmp_path / "notes.txt").write_bytes(b"secret")
    return tmp_path


def test_files_become_digests_that_the_server_has(folder):
    remote = Remote()
    text = "# mine\nFROM ./model.gguf\nadapter  lora.bin \r\nPARAMETER seed 1\n"
    found = with_blobs(remote, text, folder)
    weights, adapter = digest(b"weights"), digest(b"adapter")
    assert found == f"# mine\nFROM @{weights}\nadapter  @{adapter} \r\nPARAMETER seed 1\n"
    assert remote.blobs == {weights: b"weights", adapter: b"adapter"}


def test_an_adapter_of_two_files_becomes_two_digests(folder):
    """Weights first, as a Modelfile says it."""
    (folder / "lora").mkdir()
    (folder / "lora" / "adapter_config.json").write_bytes(b"{}")
    (folder / "lora" / "adapter_model.safetensors").write_bytes(b"thin")
    remote = Remote()
    found = with_blobs(remote, "FROM llama2\nADAPTER ./lora\n", folder)
    assert found == f"FROM llama2\nADAPTER @{digest(b'thin')} @{digest(b'{}')}\n"
    assert remote.blobs == {digest(b"thin"): b"thin", digest(b"{}"): b"{}"}


def test_what_the_server_has_is_not_sent_again(folder):
    remote = Remote(digest(b"weights"))
    with_blobs(remote, "FROM ./model.gguf", folder)
    assert remote.blobs == {digest(b"weights"): b""}


@pytest.mark.parametrize(
    "text",
    [
        "FROM llama2\n",
        "FROM ./gone.gguf\n",
        'FROM llama2\nSYSTEM """\nFROM notes.txt\ntell me\n"""\n',
        "FROM llama2\n# FROM notes.txt\nTEMPLATE FROM notes.txt\n",
        "FROM llama2\nSYSTEM one\u2028FROM notes.txt\n",
    ],
)
def test_names_and_texts_stay_and_no_file_leaves(folder, text):
    remote = Remote()
    assert with_blobs(remote, text, folder) == text
    assert remote.blobs == {}


def test_a_modelfile_that_cannot_be_read_sends_nothing(folder):
    remote = Remote()
    with pytest.raises(ModelfileError, match="line 2"):
        with_blobs(remote, "FROM ./model.gguf\nPARAMETER nonsense 1\n", folder)
    assert remote.blobs == {}
