"""Pull, push, login, and what `run` fetches by itself: sentences, bars, exit status."""

from __future__ import annotations

import base64
import os
import signal
import stat
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from refollama import private_server, transfer
from refollama.errors import BadRequest, NotFound
from tests.fake_server import LAYER, FakeServer, many, one
from tests.registry.fake import FakeRegistry
from tests.registry.tokens import TokenService
from tests.test_cli import (
    ROOT,
    STORY,
    Terminal,
    child,
    failed,
    is_gone,
    private,
    refollama,
    stand_in,
)
from tests.test_client import refused_port

MB = 1_000_000
LINES = [
    "pulling manifest",
    "pulling abababababab: resumed at 1 MB of 4 MB",
    "pulling abababababab: 4 MB",
    "pulling cdcdcdcdcdcd: 500 B",
    "verifying sha256 digest",
    "success",
]
MISSING = {"error": "model 'tale' not found, try pulling it first"}


@pytest.fixture(autouse=True)
def folder(home, monkeypatch, tmp_path) -> Path:
    """A working folder of our own."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("PROMPT_TOOLKIT_NO_CPR", "1")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def server(monkeypatch) -> Iterator[FakeServer]:
    with FakeServer() as server:
        monkeypatch.setenv("OLLAMA_HOST", server.host)
        yield server


@pytest.fixture
def nobody(monkeypatch) -> Iterator[None]:
    with refused_port() as host:
        monkeypatch.setenv("OLLAMA_HOST", host)
        yield


@pytest.fixture
def elsewhere(monkeypatch) -> None:
    """OLLAMA_HOST is of another machine (RFC 5737: a documentation net)."""
    monkeypatch.setenv("OLLAMA_HOST", "192.0.2.1:1")


# --- pull and push ---------------------------------------------------------------------------


def test_a_log_has_a_line_for_the_begin_and_the_end_of_a_layer(server):
    result = refollama("pull", "tale")
    assert (result.exit_code, result.stdout) == (0, "")
    assert result.stderr.splitlines() == LINES
    result = refollama("push", "tale")
    assert (result.exit_code, result.stdout) == (0, "")
    assert result.stderr.splitlines() == [
        "retrieving manifest",
        "pushing abababababab",
        "pushing abababababab: 4 MB",
        "pushing manifest",
        "success",
    ]


@pytest.mark.parametrize("command", ["pull", "push"])
@pytest.mark.parametrize("insecure", [True, False])
def test_name_and_flag_travel(server, command, insecure):
    flags = ["--insecure"] if insecure else []
    assert refollama(command, *flags, "localhost:5000/me/tale:1").exit_code == 0
    sent = {"model": "localhost:5000/me/tale:1", "insecure": insecure, "stream": True}
    assert server.requests == [(command, sent)]


@pytest.mark.parametrize("command", ["pull", "push"])
def test_an_error_in_the_middle_is_told(server, command):
    begin: dict[str, Any] = {"status": "working"}
    server.script[command] = many([begin, {"error": "max retries exceeded: it is raining"}])
    result = refollama(command, "tale")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == "working\nError: max retries exceeded: it is raining\n"


@pytest.mark.parametrize("command", ["pull", "push"])
def test_an_answer_without_success_is_an_error(server, command):
    server.script[command] = many([{"status": "working"}])
    result = refollama(command, "tale")
    assert result.exit_code == 1
    assert "the server's answer ended before it was complete" in result.stderr


@pytest.mark.parametrize("command", ["pull", "push"])
def test_without_a_server_one_is_started_and_stopped(nobody, folder, monkeypatch, command):
    pid_file = folder / "pid"
    monkeypatch.setattr(private_server, "command", lambda: stand_in(pid_file))
    assert refollama(command, "tale").stderr.endswith("success\n")
    assert is_gone(int(pid_file.read_text()))


def layer(done: int, **more: Any) -> dict[str, Any]:
    status = "pulling " + LAYER[7:19]
    return {"status": status, "digest": LAYER, "total": 4 * MB, "completed": done, **more}


class Held:
    """A pull that stands still in the middle until it is let go, or until who asked is gone."""

    def __init__(self, server: FakeServer) -> None:
        self.go, self.left = threading.Event(), threading.Event()
        server.script["pull"] = many(self._records())

    def _records(self) -> Iterator[dict[str, Any]]:
        try:
            yield {"status": "pulling manifest"}
            for done in (1 * MB, 2 * MB, 2_400_000):
                yield layer(done, resumed=1 * MB)
                time.sleep(0.02)  # a rate takes time
            while not self.go.wait(0.05):
                yield layer(2_500_000, resumed=1 * MB)
            yield layer(4 * MB)
            yield {"status": "success"}
        finally:
            self.left.set()


def test_a_terminal_has_a_bar_while_a_layer_moves(server, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    held = Held(server)
    with Terminal("pull", "tale") as screen:
        screen.sees("pulling manifest\r\n")
        screen.sees("pulling abababababab: resumed at 1 MB of 4 MB\r\n")
        screen.sees("62%")
        assert "━" in screen.sees("2.5/4.0 MB")
        screen.sees("B/s")
        held.go.set()
        screen.sees("pulling abababababab: 4 MB\r\n")
        screen.sees("success\r\n")
        assert screen.status() == 0


def test_a_narrow_terminal_has_the_numbers_whole(server, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    held = Held(server)
    with Terminal("pull", "tale") as screen:
        screen.sees("62%")
        assert "━" not in screen.sees("2.5/4.0 MB")
        held.go.set()
        screen.sees("success\r\n")


def test_ctrl_c_at_a_bar_says_how_to_go_on(server):
    held = Held(server)
    with Terminal("pull", "--insecure", "tale") as screen:
        screen.sees("2.5/4.0 MB")
        screen.type("\x03")
        screen.sees("what was fetched stays: 'refollama pull --insecure tale' goes on from there")
        assert screen.status() == 130
    assert held.left.wait(5)


def test_ctrl_c_without_a_terminal(server):
    held = Held(server)
    with child("pull", "tale") as process:
        assert process.stderr is not None
        assert process.stderr.readline() == LINES[0] + "\n"
        assert process.stderr.readline() == LINES[1] + "\n"
        process.send_signal(signal.SIGINT)
        error = process.communicate(timeout=10)[1]
    assert process.returncode == 130
    assert error.strip().endswith("'refollama pull tale' goes on from there")
    assert held.left.wait(5)


def test_ctrl_c_ends_the_private_server_too(nobody, folder):
    """As `run` does: no way of ending leaves it behind."""
    pid_file = folder / "pid"
    prepare = f"{private(pid_file)}\nimport refollama.terminal as t\n" + (
        "import os, signal\n"
        "t.show_progress = lambda records: (next(records), os.kill(os.getpid(), signal.SIGINT))"
    )
    with child("pull", "tale", prepare=prepare) as process:
        error = process.communicate(timeout=20)[1]
    assert process.returncode == 130
    assert "goes on from there" in error
    assert is_gone(int(pid_file.read_text()))


# --- run -------------------------------------------------------------------------------------


def missing_until_pulled(server: FakeServer) -> None:
    """A server that has a model only after it was asked to fetch it."""

    def fetch() -> Iterator[dict[str, Any]]:
        yield {"status": "pulling manifest"}
        server.script.clear()
        yield {"status": "success"}

    for route in ("generate", "chat"):
        server.script[route] = one(MISSING, 404)
    server.script["pull"] = many(fetch())


def routes(server: FakeServer) -> list[str]:
    return [route for route, _ in server.requests]


@pytest.mark.parametrize("insecure", [True, False])
def test_run_pulls_what_is_missing_and_then_answers(server, insecure):
    missing_until_pulled(server)
    flags = ["--insecure"] if insecure else []
    result = refollama("run", *flags, "tale", "hi")
    assert (result.exit_code, result.stdout) == (0, f"{STORY}hi\n")
    assert result.stderr.splitlines() == ["pulling manifest", "success"]
    assert routes(server) == ["generate", "pull", "generate"]
    assert server.requests[1][1]["insecure"] is insecure


def test_a_conversation_pulls_what_is_missing(server):
    missing_until_pulled(server)
    with Terminal("run", "tale") as screen:
        screen.sees("pulling manifest")
        screen.sees(">>> ")
        screen.type("four\r")
        screen.sees(STORY + "four")
        screen.type("/bye\r")
        assert screen.status() == 0
    assert routes(server) == ["chat", "generate", "pull", "chat", "chat"]


def test_what_cannot_be_pulled_is_not_found_and_why(server):
    server.script["generate"] = one(MISSING, 404)
    why = "cannot reach registry.ollama.ai: no address"
    server.script["pull"] = many([{"status": "pulling manifest"}, {"error": why}])
    result = refollama("run", "tale", "hi")
    assert (result.exit_code, result.stdout) == (1, "")
    told = f"Error: model 'tale' not found, and pulling it failed: {why}\n"
    assert result.stderr == f"pulling manifest\n{told}"
    assert routes(server) == ["generate", "pull"]


def test_it_is_tried_once_only(server):
    server.script["generate"] = one(MISSING, 404)
    result = refollama("run", "tale", "hi")
    assert result.exit_code == 1
    assert result.stderr.endswith(f"success\nError: {MISSING['error']}\n")
    assert routes(server) == ["generate", "pull", "generate"]


def test_no_registry_is_asked_for_a_path_nor_for_other_mistakes(server, folder):
    (folder / "tale.gguf").touch()
    server.script["generate"] = one({"error": "no GGUF file that can be read"}, 404)
    failed(refollama("run", "./tale.gguf", "hi"), "Error: no GGUF file that can be read\n")
    server.script["generate"] = one({"error": "prompt is too long"}, 400)
    failed(refollama("run", "tale", "hi"), "Error: prompt is too long\n")
    assert "pull" not in routes(server)


def test_show_pulls_nothing(server):
    server.script["show"] = one(MISSING, 404)
    failed(refollama("show", "tale"), MISSING["error"])
    assert routes(server) == ["show"]


# --- from disk -------------------------------------------------------------------------------


@pytest.fixture
def files(folder) -> Path:
    for name in ("tale.gguf", "one/My Tale (v1.5).GGUF", "two/a.gguf", "two/b.gguf", "made/x.gguf"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()
    (folder / "made" / "Modelfile").write_text("\ufeffFROM ./x.gguf\nSYSTEM é\n", "utf-8")
    (folder / "none").mkdir()
    return folder


@pytest.mark.parametrize(
    ("arguments", "name", "text", "where"),
    [
        (["tale.gguf"], "tale", "FROM ./tale.gguf", "."),
        (["./tale.gguf", "me/other:1"], "me/other:1", "FROM ./tale.gguf", "."),
        (["{folder}/tale.gguf"], "tale", "FROM ./tale.gguf", "."),
        (["./one"], "one", "FROM ./My Tale (v1.5).GGUF", "one"),
        (["one/"], "one", "FROM ./My Tale (v1.5).GGUF", "one"),
        (["./one/My Tale (v1.5).GGUF"], "My-Tale-v1.5", "FROM ./My Tale (v1.5).GGUF", "one"),
        (["./made"], "made", "FROM ./x.gguf\nSYSTEM é\n", "made"),
        (["./made", "other"], "other", "FROM ./x.gguf\nSYSTEM é\n", "made"),
        (["./two/a.gguf"], "a", "FROM ./a.gguf", "two"),
    ],
)
def test_a_file_or_folder_becomes_a_model(server, files, arguments, name, text, where):
    result = refollama("pull", *(one.format(folder=files) for one in arguments))
    assert (result.exit_code, result.stderr.splitlines()[-1]) == (0, "success")
    assert routes(server) == ["create"]
    sent = server.requests[0][1]
    assert (sent["model"], sent["modelfile"]) == (name, text)
    assert Path(sent["directory"]).resolve() == (files / where).resolve()


def test_the_folder_in_which_one_stands_has_a_name_too(server, files, monkeypatch):
    monkeypatch.chdir(files / "made")
    assert refollama("pull", ".").exit_code == 0
    assert server.requests[0][1]["model"] == "made"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["./gone"], "/gone: there is no such file or folder"),
        (["./none"], "/none: there is neither a Modelfile nor a GGUF file in it"),
        (["./two"], "/two has 2 GGUF files (a.gguf, b.gguf): name one of them"),
    ],
)
def test_what_is_not_on_disk_is_told(server, files, arguments, sentence):
    failed(refollama("pull", *arguments), sentence)
    assert server.requests == []


def test_a_second_name_is_for_files(server):
    failed(refollama("pull", "tale", "other"), "a second name is for a model from disk", status=2)
    assert server.requests == []


def test_another_machine_is_sent_the_file(server, files, monkeypatch):
    monkeypatch.setattr("refollama.transfer.on_this_machine", lambda url: False)
    (files / "one" / "My Tale (v1.5).GGUF").write_bytes(b"weights")
    assert refollama("pull", "./one").exit_code == 0
    ((digest, content),) = server.blobs.items()
    assert content == b"weights"
    sent = {"model": "one", "modelfile": f"FROM @{digest}", "stream": True}
    assert server.requests == [("create", sent)]


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("llama-2-7b.Q4_K_M.gguf", "llama-2-7b.Q4_K_M"),
        ("..hidden..gguf", "hidden"),
        ("a..b.gguf", "a.b"),
        ("Über 100% gut.gguf", "ber-100-gut"),
        (f"{'x' * 200}.gguf", "x" * 80),
    ],
)
def test_names_after_files_are_names(folder, file, name):
    from refollama.store import Name

    (folder / file).touch()
    found = transfer.on_disk(folder / file).name
    assert found == name == Name.parse(found).model


def test_a_file_after_which_nothing_can_be_named(folder):
    (folder / "物語.gguf").touch()
    with pytest.raises(BadRequest, match="say one behind it"):
        transfer.on_disk(folder / "物語.gguf")
    assert transfer.on_disk(folder / "物語.gguf", "tale").name == "tale"
    with pytest.raises(NotFound):
        transfer.on_disk(folder / "gone.gguf", "tale")


# --- logins ----------------------------------------------------------------------------------

Find = Callable[[str], Any]


@pytest.fixture
def find() -> Find:
    from refollama.store.registry import logins

    return logins.find


def log_in(host: str, password: str, *flags: str) -> Result:
    return refollama("login", host, "-u", "me", "--password-stdin", *flags, piped=f"{password}\n")


class Password:
    """Lets in who has it: by Basic, as small private registries do."""

    def challenge(self, authorization: str, repository: str, action: str) -> str | None:
        good = authorization == f"Basic {base64.b64encode(b'me:pass word').decode()}"
        return None if good else 'Basic realm="here"'


@pytest.fixture(params=["basic", "token"])
def guarded(request) -> Iterator[FakeRegistry]:
    """A registry that knows one user."""
    with (
        FakeRegistry() as registry,
        TokenService(only_keys=set(), users={"me": "pass word"}) as tokens,
    ):
        registry.guard = tokens if request.param == "token" else Password()
        yield registry


@pytest.fixture
def registry() -> Iterator[FakeRegistry]:
    """One that asks nobody who he is."""
    with FakeRegistry() as registry:
        yield registry


def test_a_login_is_kept_and_forgotten(home, find, guarded):
    result = log_in(guarded.host, "pass word", "--insecure")
    assert (result.exit_code, result.stderr) == (0, "")
    assert "pass" not in result.output and f"'{guarded.host}' is kept" in result.stdout
    kept = find(guarded.host)
    assert (kept.user, kept.password) == ("me", "pass word")
    (file,) = (home / ".ollama").iterdir()
    assert stat.S_IMODE(os.stat(file).st_mode) == 0o600
    assert refollama("logout", guarded.host).stdout.endswith("is forgotten\n")
    assert find(guarded.host) is None
    failed(refollama("logout", guarded.host), f"there is no login for '{guarded.host}'")


def test_a_login_that_the_registry_refuses_is_not_kept(find, guarded):
    """Nor does it take the place of one that is good."""
    assert log_in(guarded.host, "pass word", "--insecure").exit_code == 0
    result = log_in(guarded.host, "wrong word", "--insecure")
    failed(result, "this login is not kept: ")
    assert "wrong word" not in result.output
    assert find(guarded.host).password == "pass word"


def test_a_login_that_cannot_be_tried_is_kept_all_the_same(find):
    with refused_port() as host:
        result = log_in(host, "secret")
        assert result.exit_code == 0
        assert f"Note: this login could not be tried: cannot reach {host}" in result.stderr
        assert find(host).password == "secret"


def test_a_registry_that_is_none_does_not_decide(find, registry):
    registry.hook = lambda exchange: exchange.answer(404, b"no such page") or True
    result = log_in(registry.host, "secret", "--insecure")
    assert result.exit_code == 0 and "404: no such page" in result.stderr
    assert find(registry.host).password == "secret"


@pytest.mark.parametrize("written", ["https://{}", "{}/"])
def test_a_host_is_kept_as_names_have_it(find, written):
    with refused_port() as host:
        log_in(written.format(host), "secret")
        assert find(host).password == "secret"


def test_a_password_is_typed_without_echo(home, find, registry):
    with Terminal("login", "--insecure", registry.host) as screen:
        screen.sees("Username: ")
        screen.type("me\r")
        screen.sees("Password: ")
        screen.type("secret\r")
        assert "secret" not in screen.sees("is kept")
        assert screen.status() == 0
    kept = find(registry.host)
    assert (kept.user, kept.password) == ("me", "secret")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "no terminal to ask at: use --username and --password-stdin"),
        (["--password-stdin"], "--password-stdin needs --username"),
    ],
)
def test_nothing_is_asked_where_nobody_can_answer(arguments, sentence):
    failed(refollama("login", "registry.example", *arguments), sentence, status=2)


@pytest.mark.parametrize("command", ["login", "logout"])
def test_a_server_elsewhere_has_logins_of_its_own(elsewhere, command):
    failed(refollama(command, "registry.example"), "http://192.0.2.1:1 would not see this")


@pytest.mark.parametrize("command", ["login", "logout"])
def test_a_host_is_a_host(command):
    failed(refollama(command, "a b"), "is no host of a model name")
