"""The commands: what the user types, turned into calls to a server, and what comes back shown.

    serve    run the server here
    run      ask a model, or talk with it   ┐ with the server at OLLAMA_HOST; if none listens,
    create   make a model from a Modelfile  ┘ with one of their own that ends with the command
    list     the models there are; without a server, straight from the store

Exit status: 0 done, 1 an error that is told in one sentence, 2 a wrong command line, 130 Ctrl-C.
"""

from __future__ import annotations

import io
import logging
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from refollama import terminal
from refollama.errors import BadRequest, NotFound, RefollamaError
from refollama.host import base_url, listen_address, on_this_machine
from refollama.options import Options, from_text
from refollama.paths import is_path
from refollama.version import __version__

if TYPE_CHECKING:
    from refollama.client import Client, Record

ALIASES = {"ls": "list", "start": "serve"}
INTERRUPTED = 128 + 2  # as shells report a death by SIGINT
TALK_HELP = '''\
  /clear                forget what was said
  /bye, /exit, Ctrl-D   leave
  Ctrl-C                stop the answer
  """                   begin and end a message of several lines
  /?                    this text
'''
ENVIRONMENT = {
    "OLLAMA_HOST": "where the server listens and is looked for: 127.0.0.1:11434",
    "OLLAMA_MODELS": "the folder of the models: ~/.ollama/models",
    "OLLAMA_NOHISTORY": "1 = forget what was typed at the prompt",
    "OLLAMA_ORIGINS": "web pages that may ask the server, separated by commas",
    "OLLAMA_NUM_PARALLEL": "requests that one model answers at once: 1",
    "OLLAMA_MAX_LOADED_MODELS": "models that are kept in memory at once: 1",
    "OLLAMA_MAX_QUEUE": "prompts that may wait before more are refused: 512",
    "OLLAMA_NOPRUNE": "1 = keep blobs that no model names any more",
}
SERVER_ENVIRONMENT = [name for name in ENVIRONMENT if name != "OLLAMA_NOHISTORY"]


class Commands(click.Group):
    """The group of commands, and the one place where errors become sentences."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """In the order in which they are written: the order in which a newcomer needs them."""
        return list(self.commands)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """A command by its name or its alias."""
        return super().get_command(ctx, ALIASES.get(cmd_name, cmd_name))

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command; what a user can cause is told without a traceback."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise  # `| head` has seen enough: click ends in silence
        except KeyboardInterrupt:
            click.echo(err=True)
            raise click.exceptions.Exit(INTERRUPTED) from None
        except (RefollamaError, OSError, UnicodeError) as problem:
            raise click.ClickException(_sentence(problem)) from None


def _sentence(problem: Exception) -> str:
    if isinstance(problem, OSError) and problem.strerror:
        return f"{problem.filename}: {problem.strerror}" if problem.filename else problem.strerror
    return str(problem)


def _more(*examples: str, environment: Sequence[str]) -> str:
    """The end of a help page."""
    shown = "\n".join(f"  {example}" for example in examples)
    names = "\n".join(f"  {name:<25} {ENVIRONMENT[name]}" for name in environment)
    return f"\b\nExamples:\n{shown}\n\n\b\nEnvironment:\n{names}"


# --- the commands ----------------------------------------------------------------------------


@click.group(
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog=_more(
        'refollama run ./story.gguf "Once upon a time"',
        "refollama create tale -f Modelfile",
        "refollama run tale",
        environment=list(ENVIRONMENT),
    ),
)
@click.version_option(__version__, "-v", "--version", message="refollama version is %(version)s")
def cli() -> None:
    """Run large language models on this machine: Ollama, rebuilt in readable Python."""


@cli.command(
    epilog=_more(
        "refollama serve",
        "refollama serve --host 127.0.0.1:8080",
        "refollama serve --host 127.0.0.1:0      # any free port; the log says which",
        "OLLAMA_HOST=0.0.0.0 refollama serve     # reachable from other machines",
        environment=SERVER_ENVIRONMENT,
    )
)
@click.option(
    "--host", envvar="OLLAMA_HOST", default="", help="Listen on host:port; port 0 = any free."
)
@click.option("--until-stdin-closes", is_flag=True, hidden=True)
def serve(host: str, until_stdin_closes: bool) -> None:
    """Answer HTTP requests until Ctrl-C.  (alias: start)"""
    address, port = listen_address({"OLLAMA_HOST": host})
    if until_stdin_closes:
        from refollama.private_server import stop_when_stdin_closes

        stop_when_stdin_closes()
    from refollama.server import serve as serve_forever

    serve_forever(address, port)
    _leave_at_once()


def _leave_at_once() -> None:
    """End this process without waiting for threads that are still in the middle of a step.

    One that comes out of torch into an interpreter that has ended would abort the process.
    """
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


@cli.command(
    epilog=_more(
        "refollama create tale                   # from ./Modelfile",
        "refollama create tale:small -f models/tale.modelfile",
        environment=["OLLAMA_HOST", "OLLAMA_MODELS"],
    )
)
@click.argument("model")
@click.option(
    "-f",
    "--file",
    "path",
    default="Modelfile",
    show_default=True,
    type=click.Path(path_type=Path),
    help="The Modelfile; relative paths in it start at its folder.",
)
def create(model: str, path: Path) -> None:
    """Make a model from a Modelfile."""
    text = _read_text(path)
    directory = path.absolute().parent
    if not _near():
        _refuse_files(text, directory)
    with _server() as client, closing(client.create(model, text, str(directory))) as records:
        terminal.show_progress(records)


@cli.command(
    "list",
    epilog=_more(
        "refollama list",
        "refollama ls tale                       # names that begin so",
        environment=["OLLAMA_HOST", "OLLAMA_MODELS"],
    ),
)
@click.argument("prefix", default="")
def list_models(prefix: str) -> None:
    """List the models, with their sizes and ages.  (alias: ls)"""
    rows = [row for row in _models() if row[0].startswith(prefix)]
    click.echo(terminal.table(("NAME", "ID", "SIZE", "MODIFIED"), rows))


@cli.command(
    epilog=_more(
        "refollama run tale                      # talk; /bye ends it",
        'refollama run tale "Why is the sky blue?"',
        'refollama run tale "Sum this up." < notes.txt',
        "refollama run ./story.gguf -o temperature=0 -o num_predict=50 Once upon a time",
        environment=["OLLAMA_HOST", "OLLAMA_MODELS", "OLLAMA_NOHISTORY"],
    )
)
@click.argument("model")
@click.argument("words", nargs=-1, metavar="[PROMPT]...")
@click.option("--verbose", is_flag=True, help="Show counts and durations after each answer.")
@click.option("--raw", is_flag=True, help="Give the model the prompt as it is, without template.")
@click.option("--system", metavar="TEXT", help="Replace the model's system message.")
@click.option(
    "-o",
    "--option",
    "settings",
    multiple=True,
    metavar="NAME=VALUE",
    callback=lambda ctx, param, given: _options(given),
    help="Set an option, such as temperature=0; may be repeated.",
)
def run(
    model: str,
    words: Sequence[str],
    verbose: bool,
    raw: bool,
    system: str | None,
    settings: Record | None,
) -> None:
    """Ask a model, or talk with it.

    MODEL is a name from 'refollama list', or the path of a .gguf file, which is run where it
    lies. What comes through a pipe is put before PROMPT. With neither, you talk at a prompt line.
    """
    ask: Record = {"model": _model(model), "system": system, "options": settings}
    ask["raw"] = raw or None  # None: not sent
    prompt = _prompt(words)
    with _server() as client:
        if prompt is None:
            _talk(client, ask, verbose)
        else:
            _show_statistics(_answer(client, prompt, ask), verbose)


# --- which server ----------------------------------------------------------------------------


def _near() -> bool:
    return on_this_machine(base_url(os.environ))


@contextmanager
def _server() -> Iterator[Client]:
    """A client of the server at OLLAMA_HOST; if none listens on this machine, of a private one."""
    from refollama.client import Client
    from refollama.private_server import private_server

    with Client() as client:
        if not on_this_machine(client.url) or client.is_running():
            yield client
            return
    with ExitStack() as stack:
        with terminal.spinner("starting"):
            url = stack.enter_context(private_server())
        yield stack.enter_context(Client(url))


# --- create ----------------------------------------------------------------------------------

_FILE_LINE = re.compile(
    r"^[ \t]*(?:FROM|ADAPTER)[ \t]+(\S.*?)[ \t\r]*$", re.IGNORECASE | re.MULTILINE
)


def _read_text(path: Path) -> str:
    try:
        return path.read_text("utf-8-sig")
    except UnicodeDecodeError:
        raise BadRequest(f"{path}: not UTF-8 text") from None


def _refuse_files(modelfile: str, directory: Path) -> None:
    """A server on another machine cannot read this one's files."""
    for name in _FILE_LINE.findall(modelfile):
        if (directory / Path(name.strip('"')).expanduser()).is_file():
            raise BadRequest(
                f"{name} lies on this machine, and the server at {base_url(os.environ)} cannot "
                "read it: run 'refollama create' on the server's machine"
            )


# --- list ------------------------------------------------------------------------------------


Row = tuple[str, str, str, str]  # name, id, size, age


def _models() -> list[Row]:
    """Rows for the table: from the server, or from the store if none listens on this machine."""
    from refollama.client import Client

    with Client() as client:
        if not on_this_machine(client.url) or client.is_running():
            return [_told(record) for record in client.tags()]
    from refollama.store import Store

    return [_row(m.name, m.digest, m.size, m.modified_at) for m in Store.default().list()]


def _told(record: Record) -> Row:
    """A row out of what a server says; servers of other versions may say less."""
    modified = terminal.read_time(record.get("modified_at") or "")
    return _row(
        record.get("name", ""), record.get("digest") or "", record.get("size") or 0, modified
    )


def _row(name: object, digest: str, size: int, modified: datetime | None) -> Row:
    short = digest.removeprefix("sha256:")[:12]
    return str(name), short, terminal.human_size(size), terminal.human_age(modified)


# --- run -------------------------------------------------------------------------------------


def _model(name: str) -> str:
    """A name as it is; a path made absolute, since the server stands in another folder."""
    found_here = name.endswith(".gguf") and os.path.isfile(name)
    if not found_here and not is_path(name):
        return name
    path = os.path.abspath(os.path.expanduser(name))
    if not os.path.isfile(path):
        raise NotFound(f"{path}: there is no such file")
    if not _near():
        where = base_url(os.environ)
        raise BadRequest(f"{path} lies on this machine, and the server at {where} cannot read it")
    return path


def _options(settings: Sequence[str]) -> Record | None:
    """`NAME=VALUE` texts, read as a Modelfile's parameters are; the last one of a name wins."""
    given: dict[str, list[str]] = {}
    for setting in settings:
        name, found, text = setting.partition("=")
        if not found:
            raise click.BadParameter(f"'{setting}' is not of the form NAME=VALUE")
        given.setdefault(name, []).append(text)
    options = {
        name: from_text(name, texts if name == "stop" else texts[-1:])
        for name, texts in given.items()
    }
    Options().updated(options, strict=True)  # a private server's warnings would go unread
    return options or None


def _prompt(words: Sequence[str]) -> str | None:
    """What to ask: the pipe, then the arguments. None: nothing was given, so talk."""
    if sys.stdin.isatty():
        return " ".join(words) if words else None
    piped = sys.stdin.buffer.read()
    try:
        return " ".join([piped.decode("utf-8"), *words] if piped else words)
    except UnicodeDecodeError:
        raise BadRequest("standard input is not UTF-8 text") from None


def _answer(client: Client, prompt: str, ask: Record) -> Record:
    """Print an answer as it comes; give back the final record."""
    record: Record = {}
    with closing(client.generate(prompt=prompt, **ask)) as records:
        for record in terminal.until_first(records, "thinking" if prompt else "loading"):
            sys.stdout.write(record.get("response", ""))
            sys.stdout.flush()
    if prompt:
        click.echo()
    return record


def _show_statistics(record: Record, verbose: bool) -> None:
    if verbose:
        click.echo(terminal.statistics(record), err=True)


def _talk(client: Client, ask: Record, verbose: bool) -> None:
    """Ask for a line, answer it, and so on; the context carries what was said before."""
    _answer(client, "", {"model": ask["model"], "options": ask["options"]})
    for text in terminal.PromptLine(_history_file()).messages():
        if text.strip() in ("/bye", "/exit"):
            return
        if text.strip() == "/clear":
            ask = {**ask, "context": None}
            click.echo("Forgotten: the conversation begins anew.")
        elif text.startswith("/"):
            _explain(text.strip())
        elif text.strip():
            ask = _turn(client, text, ask, verbose)


def _turn(client: Client, text: str, ask: Record, verbose: bool) -> Record:
    """One answer; the request for the next one, unchanged if this one failed or was stopped."""
    try:
        final = _answer(client, text, ask)
    except KeyboardInterrupt:
        click.echo("\n")
        return ask
    except RefollamaError as problem:
        click.echo(f"Error: {problem}\n", err=True)
        return ask
    click.echo()
    _show_statistics(final, verbose)
    return {**ask, "context": final.get("context")}


def _explain(command: str) -> None:
    known = command in ("/?", "/help")
    click.echo(TALK_HELP if known else f"Unknown command '{command}'. Type /? for help")


def _history_file() -> Path | None:
    if os.environ.get("OLLAMA_NOHISTORY", "").lower() not in ("", "0", "false"):
        return None
    # Beside Ollama's own, not in it: the forms differ.
    return Path("~/.ollama/refollama_history").expanduser()


def main() -> None:
    """The console script."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal that cannot show é still gets a ?
            stream.reconfigure(errors="replace")
    cli(prog_name="refollama")
