"""Our key: made once, readable by ssh's own tools, never overwritten."""

import base64
import os
import shutil
import stat
import subprocess
import sys
import threading

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import load_ssh_private_key

from refollama.errors import StoreError
from refollama.store.registry import keys

# RFC 8032, 7.1, the first test: secret key, public key, signature of no bytes.
SECRET = bytes.fromhex("9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60")
PUBLIC = bytes.fromhex("d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a")
SIGNATURE = bytes.fromhex(
    "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e065224901555fb8821590a33bacc61e39701cf9"
    "b46bd25bf5f0595bbe24655141438e7a100b"
)

needs_ssh = pytest.mark.skipif(not shutil.which("ssh-keygen"), reason="ssh-keygen is not here")


def ssh_keygen(*args):
    return subprocess.run(["ssh-keygen", *args], capture_output=True, text=True, check=True).stdout


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def test_a_known_key_signs_as_the_standard_says():
    key = keys.Key(Ed25519PrivateKey.from_private_bytes(SECRET))
    assert base64.b64decode(key.sign(b"")) == SIGNATURE
    # OpenSSH's form of a public key: two byte strings, each after its length.
    name = b"ssh-ed25519"
    blob = len(name).to_bytes(4, "big") + name + len(PUBLIC).to_bytes(4, "big") + PUBLIC
    assert base64.b64decode(key.public) == blob


def test_it_is_made_once_and_for_its_owner_only(tmp_path):
    home = tmp_path / "new" / "home"
    before = os.umask(0)  # the most careless of users
    try:
        first = keys.load(home)
    finally:
        os.umask(before)
    assert mode(home) == 0o700
    assert mode(home / "id_ed25519") == 0o600
    assert mode(home / "id_ed25519.pub") == 0o644
    assert sorted(path.name for path in home.iterdir()) == ["id_ed25519", "id_ed25519.pub"]
    data = (home / "id_ed25519").read_bytes()
    assert keys.load(home).public == first.public
    assert (home / "id_ed25519").read_bytes() == data


def test_a_folder_that_was_there_keeps_its_mode(tmp_path):
    tmp_path.chmod(0o755)
    keys.load(tmp_path)
    assert mode(tmp_path) == 0o755


@needs_ssh
def test_ssh_reads_our_key_and_agrees_on_its_public_half(tmp_path):
    key = keys.load(tmp_path)
    line = (tmp_path / "id_ed25519.pub").read_text()
    assert line == f"ssh-ed25519 {key.public}\n"
    # A comment would stand as a third word.
    assert ssh_keygen("-y", "-f", str(tmp_path / "id_ed25519")).split() == line.split()


@needs_ssh
def test_we_read_a_key_of_ssh(tmp_path):
    path = tmp_path / "id_ed25519"
    ssh_keygen("-q", "-t", "ed25519", "-N", "", "-C", "", "-f", str(path))
    assert (
        f"ssh-ed25519 {keys.load(tmp_path).public}" == path.with_suffix(".pub").read_text().strip()
    )


@needs_ssh
@pytest.mark.parametrize("kind", [["-t", "ed25519", "-N", "secret"], ["-t", "ecdsa", "-N", ""]])
def test_a_key_that_cannot_be_used_is_named_and_kept(tmp_path, kind):
    path = tmp_path / "id_ed25519"
    ssh_keygen("-q", *kind, "-f", str(path))
    data = path.read_bytes()
    with pytest.raises(StoreError, match=str(path)):
        keys.load(tmp_path)
    assert path.read_bytes() == data


@pytest.mark.parametrize("data", [b"", b"\x00" * 100, b"-----BEGIN OPENSSH PRIVATE KEY-----\nAAAA"])
def test_a_broken_key_is_named_and_kept(tmp_path, data):
    path = tmp_path / "id_ed25519"
    path.write_bytes(data)
    with pytest.raises(StoreError, match=str(path)):
        keys.load(tmp_path)
    assert path.read_bytes() == data


def test_half_a_key_is_broken(tmp_path):
    keys.load(tmp_path)
    path = tmp_path / "id_ed25519"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(StoreError, match=str(path)):
        keys.load(tmp_path)


def test_a_home_that_cannot_be_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(StoreError, match="id_ed25519"):
        keys.load(tmp_path / "file")


def test_of_many_at_once_one_key_wins(tmp_path):
    """Threads here, processes below: each gets the key that is on the disk at the end."""
    start, got = threading.Barrier(12), []

    def work():
        start.wait()
        got.append(keys.load(tmp_path).public)

    threads = [threading.Thread(target=work) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == [keys.load(tmp_path).public] * 12
    assert len(list(tmp_path.iterdir())) == 2


def test_of_two_processes_one_key_wins(tmp_path):
    code = (
        "import sys, pathlib; from refollama.store.registry import keys; sys.stdin.read(1);"
        "print(keys.load(pathlib.Path(sys.argv[1])).public)"
    )
    pipe = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    command = [sys.executable, "-c", code, str(tmp_path)]
    both = [subprocess.Popen(command, **pipe) for _ in range(2)]  # type: ignore[call-overload]
    got = {one.communicate("g")[0].strip() for one in both}
    private = load_ssh_private_key((tmp_path / "id_ed25519").read_bytes(), password=None)
    assert isinstance(private, Ed25519PrivateKey)
    assert got == {keys.Key(private).public}
