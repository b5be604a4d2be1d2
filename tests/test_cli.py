"""The command line, from outside: exit status, what is said and where, and what is left behind."""

from __future__ import annotations

import hashlib
import json
import os
import pty
import re
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

import pytest
from click.testing import CliRunner, Result

from refollama import private_server, terminal
from refollama.cli import cli
from refollama.client import Client
from refollama.version import __version__
from tests import fake_server
from tests.fake_server import SHOW, FakeServer, many, one
from tests.test_client import refused_port

ROOT = Path(__file__).parent.parent
STORY = "You said: "
NAMED = ["show", "ps", "stop", "cp", "rm"]  # the commands that take a name and little else


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch) -> Path:
    """A home and a working folder of our own."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path / "models"))
    monkeypatch.setenv("PROMPT_TOOLKIT_NO_CPR", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.delenv("OLLAMA_NOHISTORY", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def server(home, monkeypatch) -> Iterator[FakeServer]:
    with FakeServer() as server:
        monkeypatch.setenv("OLLAMA_HOST", server.host)
        yield server


@pytest.fixture
def nobody(home, monkeypatch) -> Iterator[None]:
    """OLLAMA_HOST is of this machine, and nobody listens there."""
    with refused_port() as host:
        monkeypatch.setenv("OLLAMA_HOST", host)
        yield


@pytest.fixture
def far_away(monkeypatch) -> None:
    """OLLAMA_HOST is of another machine, which is not there (RFC 5737: a documentation net)."""
    monkeypatch.setenv("OLLAMA_HOST", "192.0.2.1:1")
    monkeypatch.setattr("refollama.client.CONNECT_TIMEOUT", 0.1)


def refollama(*arguments: str, piped: str | bytes = "") -> Result:
    return CliRunner().invoke(cli, arguments, input=piped, prog_name="refollama")


def failed(result: Result, sentence: str, status: int = 1) -> None:
    assert result.exit_code == status
    assert result.stderr.startswith("Error: " if status == 1 else "Usage: ")
    assert sentence in result.stderr
    assert "Traceback" not in result.output


# --- help, version, mistakes -----------------------------------------------------------------


@pytest.mark.parametrize(
    "command",
    [
        "serve",
        "create",
        "list",
        "run",
        "show",
        "ps",
        "stop",
        "cp",
        "rm",
        "pull",
        "push",
        "login",
        "logout",
    ],
)
def test_every_help_page_teaches(command):
    for page in (refollama(command, "--help"), refollama(command, "-h")):
        assert page.exit_code == 0
        assert "Examples:" in page.stdout
        assert "OLLAMA_HOST" in page.stdout
    assert f"\n  {command} " in refollama("--help").stdout


def test_help_is_a_command_too():
    assert refollama("help").stdout == refollama("--help").stdout
    assert refollama("help", "ls").stdout.startswith("Usage: refollama ls ")
    assert refollama("help", "run").stdout == refollama("run", "--help").stdout


def test_the_first_to_ask_for_help_hears_all_its_options():
    """In a process of its own: click makes a command's help option once, for all who ask later."""
    command = [sys.executable, "-m", "refollama", "help", "run"]
    page = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "-h, --help" in page


@pytest.mark.parametrize("flag", ["--version", "-v"])
@pytest.mark.parametrize(
    ("running", "warning"), [("0.0.7", f"client version is {__version__}"), (__version__, None)]
)
def test_the_version_is_the_servers(server, flag, running, warning):
    server.script["version"] = one({"version": running})
    result = refollama(flag)
    assert (result.exit_code, result.stdout) == (0, f"refollama version is {running}\n")
    assert result.stderr == (f"Warning: {warning}\n" if warning else "")


def test_the_version_is_ours_where_no_server_tells_its_own(nobody, monkeypatch):
    own = f"refollama version is {__version__}\n"
    result = refollama("--version")
    assert (result.exit_code, result.stdout) == (0, own)
    assert result.stderr == "Warning: could not connect to a running refollama instance\n"
    monkeypatch.setenv("OLLAMA_HOST", "localhost:99999x")
    result = refollama("--version")
    assert (result.exit_code, result.stdout) == (0, own)
    assert result.stderr.startswith("Warning: ") and "99999x" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["bogus"], "No such command 'bogus'"),
        (["run"], "Missing argument 'MODEL'"),
        (["create"], "Missing argument 'MODEL'"),
        (["run", "tale", "-o", "seed"], "'seed' is not of the form NAME=VALUE"),
        (["run", "tale", "--format", "{"], "this schema is no JSON"),
        (["show"], "Missing argument 'MODEL'"),
        (["cp", "tale"], "Missing argument 'TARGET'"),
        (["rm"], "Missing argument 'MODELS...'"),
        (["help", "bogus"], "No such command 'bogus'"),
    ],
)
def test_a_wrong_command_line_exits_2(arguments, sentence):
    failed(refollama(*arguments), sentence, status=2)


def test_a_bad_host_is_told(monkeypatch):
    monkeypatch.setenv("OLLAMA_HOST", "ftp://x")
    for arguments in (["list"], ["run", "tale", "hi"], ["serve"]):
        failed(refollama(*arguments), "the scheme must be http or https")


def test_port_0_is_for_servers(monkeypatch):
    monkeypatch.setenv("OLLAMA_HOST", "127.0.0.1:0")
    for arguments in (["list"], ["run", "tale", "hi"]):
        failed(refollama(*arguments), "port 0 is for servers only, a client needs the real one")
    assert "127.0.0.1:0 " in refollama("serve", "--help").stdout


# --- run -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "piped", "prompt"),
    [
        (["one", "two"], "", "one two"),
        (["B"], "A\n", "A\n B"),
        ([], "A", "A"),
        ([], "\u00e9\u4e2d", "\u00e9\u4e2d"),
    ],
)
def test_the_pipe_comes_before_the_words(server, words, piped, prompt):
    result = refollama("run", "tale", *words, piped=piped)
    assert (result.exit_code, result.stdout) == (0, f"{STORY}{prompt}\n")
    assert result.stderr == ""
    assert server.requests == [("generate", {"model": "tale", "prompt": prompt, "stream": True})]


def test_nothing_to_ask_only_loads(server):
    result = refollama("run", "tale")
    assert (result.exit_code, result.stdout) == (0, "")
    assert server.requests[0][1]["prompt"] == ""


def test_all_options_travel(server):
    settings = ("temperature=0", "seed=1", "seed=7", "stop=a=b", "stop=c", "penalize_newline=false")
    options = [part for setting in settings for part in ("-o", setting)]
    assert refollama("run", "tale", "--raw", "--system", "Be.", *options, "hi").exit_code == 0
    sent = server.requests[0][1]
    assert (sent["raw"], sent["system"]) == (True, "Be.")
    chosen = {"temperature": 0, "seed": 7, "stop": ["a=b", "c"], "penalize_newline": False}
    assert sent["options"] == chosen


@pytest.mark.parametrize(
    ("arguments", "sent"),
    [
        (["--format", "json"], {"format": "json"}),
        (["--format", '{"type": "object"}'], {"format": {"type": "object"}}),
        (["--keepalive", "5m"], {"keep_alive": "5m"}),
        (["--keepalive", "-1"], {"keep_alive": -1}),
        (["--keepalive", "0"], {"keep_alive": 0}),
        (["--think"], {"think": True}),
        (["--nothink"], {"think": False}),
        (["--think=high"], {"think": "high"}),
        (["--think=true"], {"think": True}),
        (["--think=false"], {"think": False}),
    ],
)
def test_flags_become_fields(server, arguments, sent):
    assert refollama("run", "tale", *arguments, "hi").exit_code == 0
    plain = {"model": "tale", "prompt": "hi", "stream": True}
    assert server.requests == [("generate", {**plain, **sent})]


def test_a_level_stands_behind_its_sign_only(server):
    """What follows `--think` is the prompt, and so is all that stands behind `--`."""
    assert refollama("run", "tale", "--think", "high").exit_code == 0
    assert refollama("run", "tale", "--", "--think=high").exit_code == 0
    sent = [(body["prompt"], body.get("think")) for _, body in server.requests]
    assert sent == [("high", True), ("--think=high", None)]


def test_thinking_is_no_part_of_the_answer(server):
    thoughts: list[dict[str, Any]] = [{"thinking": "hm"}, {"thinking": " hm"}]
    told = [*thoughts, {"response": "42"}, {"done": True}]
    server.script["generate"] = many(told)
    result = refollama("run", "tale", "hi")
    assert result.stdout == "42\n"
    assert result.stderr == "Thinking...\nhm hm\n...done thinking.\n\n"
    server.script["generate"] = many(told)
    assert refollama("run", "tale", "--hidethinking", "hi").stderr == ""


def test_a_pipe_gets_the_answer_as_it_is(server):
    text = "\x1b[31m" + "word " * 100
    assert refollama("run", "tale", text).stdout == f"{STORY}{text}\n"


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ("temprature=0", "unknown parameter 'temprature'; known are: "),
        ("seed=x", "'seed' must be an integer, not 'x'"),
        ("top_p=2", "'top_p' must be between 0 and 1"),
        ("num_thread=5000", "'num_thread' must be between 0 and 1024"),
    ],
)
def test_a_bad_option_is_told_before_anything_is_asked(server, setting, sentence):
    failed(refollama("run", "tale", "-o", setting, "hi"), sentence)
    assert server.requests == []


def test_verbose_puts_the_statistics_on_stderr(server):
    result = refollama("run", "tale", "--verbose", "hi")
    assert result.stdout == f"{STORY}hi\n"
    assert "eval rate:            61.19 tokens/s\n" in result.stderr


def test_errors_of_the_server_are_sentences(server):
    server.script["generate"] = one({"error": "top_p must be between 0 and 1"}, 400)
    failed(refollama("run", "x", "hi"), "Error: top_p must be between 0 and 1\n")
    server.script["generate"] = many([{"response": "a"}, {"error": "out of memory"}])
    failed(refollama("run", "x", "hi"), "Error: out of memory\n")


def test_a_pipe_that_is_no_text(server):
    failed(refollama("run", "tale", piped=b"\xff"), "standard input is not UTF-8 text")


@pytest.mark.parametrize(
    "form", ["tale.gguf", "./tale.gguf", "~/tale.gguf", "sub/../", "{home}/tale.gguf"]
)
def test_a_file_is_sent_as_an_absolute_path(server, home, form):
    (home / "tale.gguf").touch()
    (home / "sub").mkdir()
    name = "./sub/../tale.gguf" if form == "sub/../" else form.format(home=home)
    assert refollama("run", name, "hi").exit_code == 0
    assert server.requests[0][1]["model"] == str(home / "tale.gguf")


def test_a_file_that_is_not_there(server, home):
    failed(refollama("run", "./gone.gguf", "hi"), f"{home}/gone.gguf: there is no such file")


def test_another_machine_cannot_read_our_files(far_away, home):
    (home / "tale.gguf").touch()
    where = "the server at http://192.0.2.1:1 cannot read it"
    failed(refollama("run", "./tale.gguf", "hi"), where)


def test_another_machine_is_not_replaced_by_this_one(far_away, home, monkeypatch):
    """Whoever names a machine wants that machine."""
    monkeypatch.setattr(private_server, "command", lambda: pytest.fail("started"))
    (home / "Modelfile").write_text("FROM tale\n", "utf-8")
    for arguments in (["run", "tale", "hi"], ["create", "tale"], ["list"]):
        failed(refollama(*arguments), "could not connect to refollama at http://192.0.2.1:1")


# --- create ----------------------------------------------------------------------------------


def test_create_sends_the_text_and_its_folder(server, home):
    (home / "sub").mkdir()
    (home / "sub" / "file").write_text("FROM ./x.gguf\nSYSTEM \u00e9\n", "utf-8")
    result = refollama("create", "tale", "-f", "sub/file")
    assert (result.exit_code, result.stdout) == (0, "")
    assert result.stderr.splitlines() == [
        "parsing",
        "writing layer",
        "writing layer: 2 MB",
        "success",
    ]
    route, body = server.requests[0]
    assert (route, body["directory"]) == ("create", str(home / "sub"))
    assert body["modelfile"] == "FROM ./x.gguf\nSYSTEM \u00e9\n"


def test_another_machine_is_sent_the_files(server, home, monkeypatch):
    """As blobs, once; the text that it gets names them, and is the same otherwise."""
    monkeypatch.setattr("refollama.transfer.on_this_machine", lambda url: False)
    (home / "sub").mkdir()
    (home / "sub" / "a b.gguf").write_bytes(b"weights" * 500_000)
    text = 'from "{}"  \nFROM tale\nADAPTER ./gone\nSYSTEM """\nFROM here\n"""\n'
    (home / "sub" / "Modelfile").write_text(text.format("a b.gguf"), "utf-8")
    first = refollama("create", "tale", "-f", "sub/Modelfile")
    steps = ["reading a b.gguf", "sending a b.gguf", "parsing", "writing layer"]
    steps += ["writing layer: 2 MB", "success"]
    assert (first.exit_code, first.stderr.splitlines()) == (0, steps)
    digest = f"sha256:{hashlib.sha256(b'weights' * 500_000).hexdigest()}"
    assert server.blobs == {digest: b"weights" * 500_000}
    sent = {"model": "tale", "stream": True, "modelfile": text.replace('"{}"', f"@{digest}")}
    assert server.requests == [("create", sent)]
    assert "sending a b.gguf" not in refollama("create", "tale", "-f", "sub/Modelfile").stderr


@pytest.mark.parametrize("flag", ["-q", "--quantize"])
def test_a_type_is_sent_along_if_there_is_one(server, home, flag):
    (home / "Modelfile").write_text("FROM tale\n")
    failed(refollama("create", "small", flag, "q9"), "unknown type 'q9'")
    assert server.requests == []
    assert refollama("create", "small", flag, "q4_k").exit_code == 0
    ((_, sent),) = server.requests
    assert (sent["quantize"], sent["modelfile"]) == ("q4_k", "FROM tale\n")


def test_a_blob_that_is_refused_is_told(server, home, monkeypatch):
    monkeypatch.setattr("refollama.transfer.on_this_machine", lambda url: False)
    monkeypatch.setattr("refollama.upload.hashlib", SimpleNamespace(sha256=hashlib.md5))
    (home / "x.gguf").touch()
    (home / "Modelfile").write_text("FROM ./x.gguf", "utf-8")
    result = refollama("create", "tale")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == "reading x.gguf\nsending x.gguf\nError: digest mismatch\n"
    assert server.requests == []


def test_create_without_a_modelfile(server, home):
    failed(refollama("create", "tale"), "Modelfile: No such file or directory")
    (home / "Modelfile").write_bytes(b"FROM \xff")
    failed(refollama("create", "tale"), "Modelfile: not UTF-8 text")


def test_create_repeats_the_servers_error(server, home):
    (home / "Modelfile").write_text("FORM x", "utf-8")
    server.script["create"] = one({"error": "Modelfile: line 1: no such command"}, 400)
    failed(refollama("create", "tale"), "Error: Modelfile: line 1: no such command\n")


# --- list ------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["list", "ls"])
def test_list_asks_the_server(server, command):
    header, row = refollama(command).stdout.splitlines()
    assert header.split() == ["NAME", "ID", "SIZE", "MODIFIED"]
    assert row.split("\t")[:3] == ["tale:latest", "fe938a131f40", "3.8 GB"]
    assert row.endswith(" ago")
    assert header.index("ID") == row.index("fe938")


def test_list_by_prefix(server):
    assert len(refollama("list", "tal").stdout.splitlines()) == 2
    assert len(refollama("list", "other").stdout.splitlines()) == 1


def test_list_without_a_server_reads_the_store(nobody, home):
    assert refollama("list").stdout.split() == ["NAME", "ID", "SIZE", "MODIFIED"]
    stored(home / "models")
    row = refollama("list").stdout.splitlines()[1].split("\t")
    assert [cell.strip() for cell in row[:1] + row[2:]] == [
        "tale:latest",
        "1 KB",
        "Less than a second ago",
    ]


def stored(root: Path) -> None:
    """A model as Ollama would have written it."""
    config = b'{"model_format": "gguf", "model_family": "llama"}'
    digest = hashlib.sha256(config).hexdigest()
    (root / "blobs").mkdir(parents=True)
    (root / "blobs" / f"sha256-{digest}").write_bytes(config)
    kind = "application/vnd.docker.container.image.v1+json"
    layer = {"mediaType": "application/vnd.ollama.image.model", "digest": "sha256:" + "0" * 64}
    manifest = {
        "schemaVersion": 2,
        "mediaType": "application/vnd.docker.distribution.manifest.v2+json",
        "config": {"mediaType": kind, "digest": f"sha256:{digest}", "size": len(config)},
        "layers": [{**layer, "size": 1000 - len(config)}],
    }
    path = root / "manifests" / "registry.ollama.ai" / "library" / "tale" / "latest"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(manifest), "utf-8")


# --- show ------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["license", "modelfile", "parameters", "template", "system"])
def test_one_part_as_it_is(server, part):
    assert refollama("show", "tale", f"--{part}").stdout == f"{SHOW[part]}\n"
    assert server.requests == [("show", {"model": "tale", "verbose": False})]


def test_a_part_that_a_model_lacks_is_empty(server):
    server.script["show"] = one({"details": {}})
    assert refollama("show", "tale", "--license").stdout == "\n"


def test_only_one_part_at_once(server):
    failed(
        refollama("show", "tale", "--license", "--system"),
        "only one of '--license', '--modelfile', '--parameters', '--system', or '--template' can",
        status=2,
    )
    assert server.requests == []


def test_show_at_a_glance(server):
    page = refollama("show", "tale").stdout
    assert "context length      32768" in page
    assert "tokenizer.ggml.tokens" not in page
    page = refollama("show", "tale", "-v").stdout
    assert re.search(r'tokenizer\.ggml\.tokens +\["a", "b", "c", \.\.\.\+2 more\]', page)
    assert "output.weight    Q6_K    [4096, 32000]" in page


def test_a_file_has_nothing_to_show(server):
    failed(
        refollama("show", "./x.gguf"), "./x.gguf has no name: make a model of it with 'refollama"
    )
    assert server.requests == []


def test_show_repeats_the_servers_error(server):
    server.script["show"] = one({"error": "model 'x' not found"}, 404)
    failed(refollama("show", "x"), "Error: model 'x' not found\n")


# --- ps, stop, cp, rm ------------------------------------------------------------------------


def test_ps(server):
    header, row = refollama("ps").stdout.splitlines()
    assert header.split() == ["NAME", "ID", "SIZE", "PROCESSOR", "CONTEXT", "UNTIL"]
    cells = [cell.strip() for cell in row.split("\t")]
    assert cells == ["tale:latest", "fe938a131f40", "5 GB", "30%/70% CPU/GPU", "2048", "Forever"]
    assert len(refollama("ps", "other").stdout.splitlines()) == 1


def test_stop_asks_for_nothing_and_keeps_nothing(server):
    assert refollama("stop", "tale").output == ""
    sent = {"model": "tale", "prompt": "", "stream": True, "keep_alive": 0}
    assert server.requests == [("generate", sent)]


@pytest.mark.parametrize("arguments", [["ps"], ["stop", "tale"]])
def test_no_server_is_started_only_to_hold_nothing(nobody, arguments, monkeypatch):
    monkeypatch.setattr(private_server, "command", lambda: pytest.fail("started"))
    failed(refollama(*arguments), "could not connect to refollama at")


def test_cp(server):
    assert refollama("cp", "tale", "mine").stdout == "copied 'tale' to 'mine'\n"
    assert server.requests == [("copy", {"source": "tale", "destination": "mine"})]


def test_rm_removes_until_one_fails(server):
    assert refollama("rm", "a", "b").stdout == "deleted 'a'\ndeleted 'b'\n"
    assert server.requests == [("delete", {"model": "a"}), ("delete", {"model": "b"})]
    server.script["delete"] = one({"error": "model 'c' not found"}, 404)
    failed(refollama("rm", "c", "d"), "Error: model 'c' not found\n")
    assert len(server.requests) == 3


def test_models_are_copied_and_removed_without_a_server(nobody, home, monkeypatch):
    monkeypatch.setattr(private_server, "command", lambda: pytest.fail("started"))
    stored(home / "models")
    assert refollama("cp", "tale", "mine:x").stdout == "copied 'tale' to 'mine:x'\n"
    names = [row.split()[0] for row in refollama("list").stdout.splitlines()[1:]]
    assert sorted(names) == ["mine:x", "tale:latest"]
    assert refollama("rm", "tale").stdout == "deleted 'tale'\n"
    assert [row.split()[0] for row in refollama("ls").stdout.splitlines()[1:]] == ["mine:x"]
    failed(refollama("rm", "tale"), "model 'tale")
    failed(refollama("cp", "tale", "other"), "model 'tale")
    failed(refollama("cp", "mine:x", "a b"), "a b")


# --- the Tab key -----------------------------------------------------------------------------


def completed(words: str, incomplete: str) -> list[str]:
    """What bash would offer, as click tells it."""
    cword = len(words.split())
    line = f"refollama {words} {incomplete}".strip()
    environment = {
        **os.environ,
        "_REFOLLAMA_COMPLETE": "bash_complete",
        "COMP_WORDS": line,
        "COMP_CWORD": str(cword + 1),
    }
    done = subprocess.run(
        [sys.executable, "-m", "refollama"],
        env=environment,
        check=True,
        capture_output=True,
        text=True,
    )
    assert done.stderr == ""
    return done.stdout.split()


BASH = """
eval "$(_REFOLLAMA_COMPLETE=bash_source refollama)"
COMP_WORDS=({words}) COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)) COMPREPLY=()
_refollama_completion refollama
echo "${{COMPREPLY[@]}}"
"""


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("rm ta", ["tale", "tale:small"]),
        ("rm tale:", ["tale:latest", "tale:small"]),
        ("rm tale:s", ["tale:small"]),
        ("rm tale : s", ["small"]),
        ("rm tale :", ["latest", "small"]),
        ("rm tale tale : s", ["small"]),
        ("show tale : s", ["small"]),
        ("rm other : s", []),
        ("rm host : 5000/ta", ["5000/tale", "5000/tale:small"]),
        ("rm host : 5000/tale : s", ["small"]),
    ],
)
def test_bash_cuts_names_at_colons_or_not(server, home, monkeypatch, words, offered):
    """The judge is bash itself, which gets the words as it would cut them, or as one."""
    names = ["tale:latest", "tale:small", "host:5000/tale:latest", "host:5000/tale:small"]
    server.script["tags"] = one({"models": [{"name": name} for name in names]})
    script = home / "refollama"
    script.write_text(f'#!/bin/sh\nexec {sys.executable} -m refollama "$@"\n', "utf-8")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(home), prepend=os.pathsep)
    code = BASH.format(words=f"refollama {words}")
    done = subprocess.run(["bash", "-c", code], check=True, capture_output=True, text=True)
    assert done.stderr == ""
    assert done.stdout.split() == offered


FILE_COMMANDS = ["perplexity", "imatrix", "export"]


@pytest.mark.parametrize("command", ["run", "show", "stop", "cp", "rm", *FILE_COMMANDS])
def test_names_of_models_are_completed(server, command):
    assert completed(command, "ta") == ["plain,tale"]
    assert completed(command, "x") == []


def test_commands_and_files_are_completed(nobody):
    assert completed("", "s") == ["plain,serve", "plain,show", "plain,stop"]
    assert completed("run", "./st") == ["file,./st"]


def test_completion_is_silent_about_what_is_wrong(home, monkeypatch):
    monkeypatch.setenv("OLLAMA_HOST", "ftp://x")
    assert completed("run", "ta") == []


# --- serve -----------------------------------------------------------------------------------

SERVE = """
import sys, time, types
def serve(host, port):
    print(host, port, flush=True)
    {then}
sys.modules["refollama.server"] = types.SimpleNamespace(serve=serve)
from refollama.cli import main
main()
"""


def serving(then: str, *arguments: str) -> subprocess.Popen[str]:
    """`refollama serve` with a server that does `then`."""
    code = SERVE.format(then=then)
    line = [sys.executable, "-c", code, "serve", *arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen(line, stdin=pipe, stdout=pipe, stderr=pipe, text=True)


def test_serve_listens_where_it_is_told(monkeypatch):
    monkeypatch.setenv("OLLAMA_HOST", "0.0.0.0:5")
    assert serving("pass").communicate(timeout=10)[0] == "0.0.0.0 5\n"
    assert serving("pass", "--host", ":6").communicate(timeout=10)[0] == "0.0.0.0 6\n"
    assert serving("pass", "--host", ":0").communicate(timeout=10)[0] == "0.0.0.0 0\n"


def test_serve_where_it_cannot_listen():
    process = serving("raise OSError(13, 'Permission denied')", "--host", "[::1]:7")
    error = process.communicate(timeout=10)[1]
    assert (process.returncode, error) == (1, "Error: Permission denied\n")


def test_serve_on_a_port_that_is_taken(server):
    """By the real server: whoever starts a second one learns which port is taken."""
    process = subprocess.run(
        [sys.executable, "-m", "refollama", "serve"], capture_output=True, text=True, timeout=60
    )
    assert process.returncode == 1
    assert process.stderr.startswith("Error: ")
    assert server.host.partition(":")[2] in process.stderr
    assert "taken" in process.stderr


def test_serve_until_stdin_closes():
    with serving("time.sleep(60)", "--until-stdin-closes") as process:
        assert process.stdout is not None
        assert process.stdout.readline()
        assert process.poll() is None
        process.communicate(timeout=5)  # closes its standard input
    assert process.returncode == -signal.SIGTERM


# --- the private server ----------------------------------------------------------------------


@pytest.fixture
def pid_file(nobody, home, monkeypatch) -> Path:
    """Where the private server, here the fake one, writes its process id."""
    path = home / "pid"
    monkeypatch.setattr(private_server, "command", lambda: stand_in(path))
    return path


def stand_in(pid_file: Path) -> list[str]:
    return [sys.executable, fake_server.__file__, str(pid_file)]


def is_gone(pid: int) -> bool:
    """Whether the process has ended; an orphan may stay as a zombie where nobody collects it."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text("utf-8").rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return True
    return state == "Z"


def wait_for(condition) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def test_run_starts_a_server_and_stops_it(pid_file):
    result = refollama("run", "tale", "hi")
    assert (result.exit_code, result.stdout) == (0, f"{STORY}hi\n")
    assert is_gone(int(pid_file.read_text()))


def test_create_starts_a_server_and_stops_it(pid_file, home):
    (home / "Modelfile").write_text("FROM ./x.gguf", "utf-8")
    assert refollama("create", "tale").stderr.endswith("success\n")
    assert is_gone(int(pid_file.read_text()))


def test_a_server_that_does_not_start_says_why(nobody, monkeypatch):
    code = "import sys; sys.exit('no room for torch')"
    monkeypatch.setattr(private_server, "command", lambda: [sys.executable, "-c", code])
    failed(refollama("run", "tale", "hi"), "the server did not start:\nno room for torch")


def test_a_server_that_never_answers_is_given_up(nobody, monkeypatch):
    code = "print('thinking', flush=True); import time; time.sleep(60)"
    monkeypatch.setattr(private_server, "command", lambda: [sys.executable, "-c", code])
    monkeypatch.setattr(private_server, "START_TIMEOUT", 0.5)
    began = time.monotonic()
    failed(refollama("run", "tale", "hi"), "did not answer within")
    assert time.monotonic() - began < 10


def test_a_server_that_dies_says_why(pid_file):
    result = refollama("run", "tale", "die")
    failed(result, "the server ended unexpectedly:\n")
    assert "out of memory" in result.stderr


def test_the_real_command_line_is_one_that_serve_takes():
    python, dash_m, module, command, *arguments = private_server.command()
    assert [python, dash_m, module, command] == [sys.executable, "-m", "refollama", "serve"]
    with serving("time.sleep(60)", *arguments) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "127.0.0.1 0\n"
        process.communicate(timeout=5)


def test_the_real_server_takes_any_free_port_and_says_which(nobody):
    with private_server.private_server() as url, Client(url) as client:
        assert client.version()
        assert int(url.rpartition(":")[2]) > 0
    with Client(url) as client:
        assert not client.is_running()


# --- and nobody else -------------------------------------------------------------------------

TELL = "import os, time; os.write(1, {said!r}.encode()); {then}"


@pytest.fixture
def reached(monkeypatch) -> list[str]:
    """Every address that this process connects to, in order: the command's side of the story."""
    addresses: list[str] = []
    connect = socket.socket.connect

    def noted(self: socket.socket, address: tuple[str, int]) -> None:
        addresses.append(f"{address[0]}:{address[1]}")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", noted)
    return addresses


@pytest.fixture
def stranger() -> Iterator[FakeServer]:
    """Another program, which would answer just as a server of ours does."""
    with FakeServer() as server:
        yield server


def says(monkeypatch, said: str, then: str) -> None:
    """A private server that writes this into its log, and does `then`."""
    code = TELL.format(said=said, then=then)
    monkeypatch.setattr(private_server, "command", lambda: [sys.executable, "-c", code])


def test_nobody_is_asked_before_the_server_listens(pid_file, stranger, reached, monkeypatch):
    """One that binds late: until it has told its port, no port at all is tried."""
    late = f"time.sleep(0.5); os.execv({sys.executable!r}, {stand_in(pid_file)!r})"
    says(monkeypatch, "importing torch\n", late)
    result = refollama("run", "tale", "hi")
    assert (result.exit_code, result.stdout) == (0, f"{STORY}hi\n")
    nobody, *others = reached
    assert nobody == os.environ["OLLAMA_HOST"]
    assert len(set(others)) == 1
    assert others[0] not in (nobody, stranger.host)
    assert stranger.requests == []


@pytest.mark.parametrize(
    "said",
    [
        "",
        "listens on http://{stranger}",  # the rest of the number may still come
        "listens on http://127.0.0.1:0\n",
        "listens on http://0.0.0.0:{port}\n",
        "cannot listen on {stranger}\n",
    ],
)
def test_nobody_is_asked_where_the_server_has_not_said(
    nobody, stranger, reached, monkeypatch, said
):
    port = stranger.host.partition(":")[2]
    says(monkeypatch, said.format(stranger=stranger.host, port=port), "time.sleep(60)")
    monkeypatch.setattr(private_server, "START_TIMEOUT", 0.5)
    failed(refollama("run", "tale", "hi"), "did not answer within")
    assert reached == [os.environ["OLLAMA_HOST"]]


def test_the_port_of_a_dead_server_may_be_a_strangers(nobody, stranger, reached, monkeypatch):
    says(monkeypatch, f"listens on http://{stranger.host}\n", "os._exit(9)")
    start = private_server._start

    def dead(log: IO[bytes]) -> subprocess.Popen[bytes]:
        process = start(log)
        process.wait(10)
        return process

    monkeypatch.setattr(private_server, "_start", dead)
    failed(refollama("run", "tale", "hi"), "the server did not start:\nlistens on")
    assert reached == [os.environ["OLLAMA_HOST"]]


def test_an_answer_counts_only_if_the_server_outlives_it(nobody, stranger, reached, monkeypatch):
    """The server dies after it was seen alive, and a stranger answers: no prompt goes there."""
    says(monkeypatch, f"listens on http://{stranger.host}\n", "time.sleep(60)")
    start, answers = private_server._start, private_server._answers
    started: list[subprocess.Popen[bytes]] = []

    def noted(log: IO[bytes]) -> subprocess.Popen[bytes]:
        started.append(start(log))
        return started[0]

    def dying(url: str) -> bool:
        started[0].kill()
        started[0].wait(10)
        return answers(url)

    monkeypatch.setattr(private_server, "_start", noted)
    monkeypatch.setattr(private_server, "_answers", dying)
    failed(refollama("run", "tale", "hi"), "the server did not start:\nlistens on")
    assert reached == [os.environ["OLLAMA_HOST"], stranger.host]
    assert stranger.requests == []


# --- as processes ----------------------------------------------------------------------------

MAIN = """
import os, sys
{prepare}
from refollama.cli import main
main()
"""
# A session leader that opens a terminal gets it as its own: now Ctrl-C means something.
OWN_TERMINAL = "os.open(os.ttyname(0), os.O_RDWR)"


def private(pid_file: Path) -> str:
    """Code that lets the fake stand in for the private server."""
    return f"import refollama.private_server as p\np.command = lambda: {stand_in(pid_file)!r}"


def child(*arguments: str, prepare: str = "") -> subprocess.Popen[str]:
    line = [sys.executable, "-c", MAIN.format(prepare=prepare), *arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen(
        line, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, text=True, start_new_session=True
    )


def test_ctrl_c_ends_with_130_and_cancels(server):
    with child("run", "tale", "forever") as process:
        assert process.stdout is not None
        assert process.stdout.read(4) == "tick"
        process.send_signal(signal.SIGINT)
        error = process.communicate(timeout=10)[1]
    assert process.returncode == 130
    assert error == "\n"
    assert server.hung_up.wait(5)


def test_a_reader_that_has_seen_enough(server):
    with child("run", "tale", "forever") as process:
        assert process.stdout is not None
        assert process.stdout.read(4) == "tick"
        process.stdout.close()
        process.wait(10)
        assert process.stderr is not None
        assert process.stderr.read() == ""
    assert server.hung_up.wait(5)


@pytest.mark.parametrize(
    ("signum", "status"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -signal.SIGKILL)],
)
def test_no_way_of_dying_leaves_a_server_behind(nobody, home, signum, status):
    pid_file = home / "pid"
    with child("run", "tale", "forever", prepare=private(pid_file)) as process:
        assert process.stdout is not None
        assert process.stdout.read(4) == "tick"
        process.send_signal(signum)
        error = process.communicate(timeout=10)[1]
    assert process.returncode == status
    assert "Traceback" not in error
    wait_for(lambda: is_gone(int(pid_file.read_text())))


class Terminal:
    """A program in a terminal, and the hands and eyes before it."""

    def __init__(self, *arguments: str, prepare: str = "") -> None:
        self._keys, screen = pty.openpty()
        code = MAIN.format(prepare=f"{OWN_TERMINAL}\n{prepare}")
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, *arguments],
            stdin=screen,
            stdout=screen,
            stderr=screen,
            start_new_session=True,
            env={**os.environ, "TERM": "xterm"},
        )
        os.close(screen)
        self._seen = ""

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._keys)

    def type(self, text: str) -> None:
        os.write(self._keys, text.encode())

    def sees(self, text: str) -> str:
        """Wait for a text; gives what came before it, and forgets both."""
        deadline = time.monotonic() + 15
        while text not in self._seen:
            left = deadline - time.monotonic()
            assert left > 0, f"{text!r} did not come; on the screen: {self._seen!r}"
            if select.select([self._keys], [], [], left)[0]:
                self._seen += os.read(self._keys, 65536).decode("utf-8", "replace")
        before, _, self._seen = self._seen.partition(text)
        return before

    def rest(self) -> str:
        """What has been seen since."""
        return self._seen

    def status(self) -> int:
        """How the program ended."""
        deadline = time.monotonic() + 10
        while self.process.poll() is None:
            assert time.monotonic() < deadline, f"still running: {self._seen!r}"
            if select.select([self._keys], [], [], 0.05)[0]:
                try:
                    self._seen += os.read(self._keys, 65536).decode("utf-8", "replace")
                except OSError:  # the other side is closed
                    break
        return self.process.wait(10)


def test_a_bar_while_a_long_prompt_is_read(server):
    def slowly():
        for completed in (0, 512, 1024):
            yield {"response": "", "progress": {**stage, "completed": completed}}
            time.sleep(terminal.LONG + 0.1 if completed == 0 else 0.3)
        yield from ({"response": "a tale"}, {"response": "", "done": True})

    stage = {"stage": "prompt", "total": 2000}
    server.script["generate"] = many(slowly())
    with Terminal("run", "tale", "tell") as screen:
        screen.sees("reading the prompt")
        screen.sees("1024/2000 tokens")
        screen.sees("a tale")
        assert screen.status() == 0
    assert server.requests[-1][1]["progress"] is True
    del server.script["generate"]
    assert refollama("run", "tale", "tell").exit_code == 0
    assert "progress" not in server.requests[-1][1]  # no terminal: nothing would be shown


def test_a_conversation(server):
    """What was said goes along; an answer that was stopped leaves no trace in it."""
    with Terminal("run", "tale", "-o", "seed=1") as screen:
        screen.sees(">>> ")
        screen.type("four\r")
        screen.sees(STORY + "four")
        screen.sees(">>> ")
        screen.type("forever\r")
        screen.sees("tick tick")
        screen.type("\x03")
        screen.sees(">>> ")
        assert server.hung_up.wait(5)
        screen.type('"""a\rb"""\r')
        screen.sees(STORY + "a\r\nb")
        screen.sees(">>> ")
        screen.type("/?\r")
        screen.sees("/bye, /exit, Ctrl-D")
        screen.type("/nonsense\r")
        screen.sees("Unknown command '/nonsense'")
        screen.sees(">>> ")
        screen.type("\x03")
        screen.sees("Use Ctrl-D or /bye to exit.")
        screen.sees(">>> ")
        screen.type("/clear\r")
        screen.sees("begins anew")
        screen.sees(">>> ")
        screen.type("fresh\r")
        screen.sees(STORY + "fresh")
        screen.sees(">>> ")
        screen.type("/bye\r")
        assert screen.status() == 0
    assert {route for route, _ in server.requests} == {"chat"}
    asked = [[m["content"] for m in body["messages"]] for _, body in server.requests]
    before = ["four", STORY + "four"]
    assert asked == [[], ["four"], [*before, "forever"], [*before, "a\nb"], ["fresh"]]
    assert all(body["options"] == {"seed": 1} for _, body in server.requests)


def test_an_error_does_not_end_a_conversation(server):
    with Terminal("run", "tale") as screen:
        screen.sees(">>> ")
        server.script["chat"] = one({"error": "the prompt has 9 tokens too many"}, 400)
        screen.type("long\r")
        screen.sees("Error: the prompt has 9 tokens too many")
        screen.sees(">>> ")
        server.script.clear()
        screen.type("short\r")
        screen.sees(STORY + "short")
        screen.sees(">>> ")
        screen.type("\x04")
        assert screen.status() == 0


def test_a_model_that_is_missing_ends_it_at_once(server):
    for route in ("chat", "generate"):
        server.script[route] = one({"error": "model 'tale' not found"}, 404)
    with Terminal("run", "tale") as screen:
        screen.sees("Error: model 'tale' not found")
        assert screen.status() == 1


def test_long_lines_are_broken_between_words(server, monkeypatch):
    monkeypatch.setenv("COLUMNS", "25")
    with Terminal("run", "tale", "one two three four five six") as screen:
        screen.sees("one two")
        assert screen.status() == 0
        assert screen.rest() == " th\x1b[2D\x1b[K\r\nthree four five six\r\n"
    with Terminal("run", "tale", "--nowordwrap", "one two three four five six") as screen:
        screen.sees("You said: one two three four five six\r\n")


def test_the_history_is_ollamas_file(server, home):
    (home / ".ollama").mkdir()
    (home / ".ollama" / "history").write_text("typed before\n", "utf-8")
    with Terminal("run", "tale") as screen:
        screen.sees(">>> ")
        screen.type("typed now\r")
        screen.sees(STORY + "typed now")
        screen.sees(">>> ")
        screen.type("\x1b[A\x1b[A\r")
        screen.sees(STORY + "typed before")
        screen.sees(">>> ")
        screen.type("\x04")
        assert screen.status() == 0
    lines = (home / ".ollama" / "history").read_text("utf-8").splitlines()
    assert lines == ["typed before", "typed now", "typed before"]


def test_no_history_is_kept_against_the_users_will(server, home, monkeypatch):
    monkeypatch.setenv("OLLAMA_NOHISTORY", "1")
    with Terminal("run", "tale") as screen:
        screen.sees(">>> ")
        screen.type("secret\r")
        screen.sees(STORY + "secret")
        screen.sees(">>> ")
        screen.type("/bye\r")
        assert screen.status() == 0
    assert not (home / ".ollama").exists()


def test_ctrl_c_stops_the_answer_and_not_the_private_server(nobody, home):
    pid_file = home / "pid"
    with Terminal("run", "tale", prepare=private(pid_file)) as screen:
        screen.sees(">>> ")
        screen.type("forever\r")
        screen.sees("tick tick")
        screen.type("\x03")
        screen.sees(">>> ")
        screen.type("again\r")
        screen.sees(STORY + "again")
        screen.sees(">>> ")
        screen.type("\x04")
        assert screen.status() == 0
    assert is_gone(int(pid_file.read_text()))


def test_sigterm_at_the_prompt(nobody, home):
    pid_file = home / "pid"
    with Terminal("run", "tale", prepare=private(pid_file)) as screen:
        screen.sees(">>> ")
        screen.process.terminate()
        assert screen.status() == 143
    assert is_gone(int(pid_file.read_text()))


def test_create_in_a_terminal_says_what_is_done(server, home):
    (home / "Modelfile").write_text("FROM ./x.gguf", "utf-8")
    with Terminal("create", "tale") as screen:
        screen.sees("parsing")
        screen.sees("writing layer: 2 MB")
        assert screen.status() == 0


# --- quick to answer -------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [["--help"], ["list"]])
def test_the_answer_comes_at_once(server, arguments):
    """In time of the processor: a machine that is busy otherwise makes no difference."""

    def once() -> float:
        before = os.times()
        subprocess.run(
            [sys.executable, "-m", "refollama", *arguments], check=True, stdout=subprocess.DEVNULL
        )
        after = os.times()
        user = after.children_user - before.children_user
        return user + after.children_system - before.children_system

    assert min(once() for _ in range(3)) < 0.5


@pytest.mark.parametrize("listening", [True, False])
def test_no_torch_without_a_model(request, listening):
    request.getfixturevalue("server" if listening else "nobody")
    code = "import sys; from refollama.cli import cli; cli(['list'], standalone_mode=False);"
    code += "print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    loaded = set(done.stdout.split())
    assert "refollama.client" in loaded
    assert not loaded & {"torch", "flask", "prompt_toolkit", "numpy"}
