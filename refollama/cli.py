"""The commands: what the user types, turned into calls to a server, and what comes back shown.

    serve    run the server here
    run      ask a model, or talk with it   ┐
    create   make a model from a Modelfile  │ with the server at OLLAMA_HOST; if none listens,
    show     what is known of a model       ┘ with one of their own that ends with the command
    list     the models there are           ┐ through the server;
    cp, rm   copy a model, remove models    ┘ if none listens, straight in the store
    ps       the models in memory           ┐ through the server only
    stop     let go of one of them          ┘

Exit status: 0 done, 1 an error that is told in one sentence, 2 a wrong command line, 130 Ctrl-C.
"""

from __future__ import annotations

import io
import json
import logging
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from refollama import overview, terminal
from refollama.errors import BadRequest, NotFound, RefollamaError
from refollama.host import base_url, listen_address, on_this_machine
from refollama.options import Options, from_text
from refollama.paths import is_path
from refollama.version import __version__

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    from refollama.client import Client, Record
    from refollama.promptline import PromptLine
    from refollama.talk import Ask

Row = tuple[str, ...]

ALIASES = {"ls": "list", "start": "serve"}
COMPLETING = "_REFOLLAMA_COMPLETE"  # set by a shell that wants to know what Tab could mean
INTERRUPTED = 128 + 2  # as shells report a death by SIGINT
ENVIRONMENT = {
    "OLLAMA_HOST": "where the server listens and is looked for: 127.0.0.1:11434",
    "OLLAMA_MODELS": "the folder of the models: ~/.ollama/models",
    "OLLAMA_NOHISTORY": "1 = forget what was typed at the prompt",
    "OLLAMA_ORIGINS": "web pages that may ask the server, separated by commas",
    "OLLAMA_KEEP_ALIVE": "how long a model stays in memory after an answer: 5m; -1 = for ever",
    "OLLAMA_NUM_PARALLEL": "requests that one model answers at once: 1",
    "OLLAMA_MAX_LOADED_MODELS": "models that are kept in memory at once: 1",
    "OLLAMA_MAX_QUEUE": "prompts that may wait before more are refused: 512",
    "OLLAMA_NOPRUNE": "1 = keep blobs that no model names any more",
    "REFOLLAMA_MAX_BODY": "the largest request that the server reads, in MiB: 64",
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


def _complete_models(
    ctx: click.Context, param: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """What the Tab key offers: the models whose names begin so, and the files of a path."""
    from click.shell_completion import CompletionItem

    if is_path(incomplete):
        return [CompletionItem(incomplete, type="file")]
    try:
        names = [row[0] for row in _starting_with(incomplete, _models())]
    except (RefollamaError, OSError):  # a shell that completes is no place for errors
        return []
    short = [name.removesuffix(":latest") for name in names]
    return [
        CompletionItem(brief if brief.startswith(incomplete) else name)
        for name, brief in zip(names, short, strict=True)
    ]


# --- the commands ----------------------------------------------------------------------------


@click.group(
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog=_more(
        'refollama run ./story.gguf "Once upon a time"',
        "refollama create tale -f Modelfile",
        "refollama run tale",
        'eval "$(_REFOLLAMA_COMPLETE=bash_source refollama)"   # in ~/.bashrc: Tab completes',
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
    """Make a model from a Modelfile.

    A server on another machine is sent the files that the Modelfile names.
    """
    from refollama.upload import with_blobs

    text = _read_text(path)
    directory = path.absolute().parent
    with _server() as client:
        here = str(directory) if on_this_machine(client.url) else None
        if here is None:
            text = with_blobs(client, text, directory)
        with closing(client.create(model, text, here)) as records:
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
    click.echo(terminal.table(overview.LIST, _starting_with(prefix, _models())))


@cli.command(
    epilog=_more(
        "refollama run tale                      # talk; /bye ends it",
        'refollama run tale "Why is the sky blue?"',
        'refollama run tale "Sum this up." < notes.txt',
        "refollama run ./story.gguf -o temperature=0 -o num_predict=50 Once upon a time",
        environment=["OLLAMA_HOST", "OLLAMA_MODELS", "OLLAMA_NOHISTORY"],
    )
)
@click.argument("model", shell_complete=_complete_models)
@click.argument("words", nargs=-1, metavar="[PROMPT]...")
@click.option("--verbose", is_flag=True, help="Show counts and durations after each answer.")
@click.option("--raw", is_flag=True, help="Give the model the prompt as it is, without template.")
@click.option("--system", metavar="TEXT", help="Replace the model's system message.")
@click.option(
    "--format",
    metavar="FORMAT",
    callback=lambda ctx, param, given: _format(given),
    help="json, or a JSON schema: the answer is JSON of that form.",
)
@click.option(
    "--keepalive",
    metavar="DURATION",
    help="How long the server keeps the model afterwards: 5m, or seconds; -1 = for ever.",
)
@click.option("--nowordwrap", is_flag=True, help="Do not break long lines between words.")
@click.option("--think/--nothink", default=None, help="Let a model that can think do so first.")
@click.option("--hidethinking", is_flag=True, help="Do not show what it thinks.")
@click.option(
    "-o",
    "--option",
    "settings",
    multiple=True,
    metavar="NAME=VALUE",
    callback=lambda ctx, param, given: _options(given),
    help="Set an option, such as temperature=0; may be repeated.",
)
def run(model: str, words: Sequence[str], **given: Any) -> None:
    """Ask a model, or talk with it.

    MODEL is a name from 'refollama list', or the path of a .gguf file, which is run where it
    lies. What comes through a pipe is put before PROMPT. With neither, you talk at a prompt line.
    """
    from refollama import talk

    ask = _ask(_model(model), given)
    prompt = _prompt(words)
    with _server() as client:
        if prompt is None:
            talk.Talk(client, ask, _prompt_line(), _model).run()
        else:
            talk.complete(client, ask, prompt)


@cli.command(
    epilog=_more(
        "refollama show tale                     # at a glance",
        "refollama show tale --modelfile > Modelfile",
        environment=["OLLAMA_HOST", "OLLAMA_MODELS"],
    )
)
@click.argument("model", shell_complete=_complete_models)
@click.option("--license", is_flag=True, help="Show only its license.")
@click.option("--modelfile", is_flag=True, help="Show only a Modelfile that makes it again.")
@click.option("--parameters", is_flag=True, help="Show only its options.")
@click.option("--template", is_flag=True, help="Show only its prompt template.")
@click.option("--system", is_flag=True, help="Show only its system message.")
@click.option("-v", "--verbose", is_flag=True, help="Show metadata and tensors, too.")
def show(model: str, verbose: bool, **parts: bool) -> None:
    """Show what is known of a model."""
    from refollama.talk import look

    wanted = [name for name, given in parts.items() if given]
    if len(wanted) > 1:
        raise click.UsageError(f"only one of {_either(parts)} can be specified")
    with _server() as client:
        record = look(client, model, verbose)
    _print(record.get(wanted[0]) or "" if wanted else overview.overview(record, verbose))


@cli.command(
    epilog=_more(
        "refollama ps",
        "refollama ps tale                       # names that begin so",
        environment=["OLLAMA_HOST"],
    )
)
@click.argument("prefix", default="")
def ps(prefix: str) -> None:
    """List the models that the server holds in memory."""
    from refollama.client import Client

    with Client() as client:
        rows = [overview.ps_row(record) for record in client.ps()]
    click.echo(terminal.table(overview.PS, _starting_with(prefix, rows)))


@cli.command(epilog=_more("refollama stop tale", environment=["OLLAMA_HOST"]))
@click.argument("model", shell_complete=_complete_models)
def stop(model: str) -> None:
    """Make the server let go of a model that it holds in memory."""
    from refollama.client import Client

    with Client() as client, closing(client.generate(_model(model), keep_alive=0)) as records:
        for _ in records:
            pass


@cli.command(
    epilog=_more("refollama cp tale tale:mine", environment=["OLLAMA_HOST", "OLLAMA_MODELS"])
)
@click.argument("source", shell_complete=_complete_models)
@click.argument("target")
def cp(source: str, target: str) -> None:
    """Give a model a second name."""
    with _keeper() as keeper:
        keeper.copy(source, target)
    click.echo(f"copied '{source}' to '{target}'")


@cli.command(
    epilog=_more(
        "refollama rm tale",
        "refollama rm tale tale:mine             # one after another, until one fails",
        environment=["OLLAMA_HOST", "OLLAMA_MODELS"],
    )
)
@click.argument("models", nargs=-1, required=True, shell_complete=_complete_models)
def rm(models: Sequence[str]) -> None:
    """Remove models."""
    with _keeper() as keeper:
        for model in models:
            keeper.delete(model)
            click.echo(f"deleted '{model}'")


@cli.command("help", context_settings={"ignore_unknown_options": True})
@click.argument("command", default="")
@click.pass_context
def help_(ctx: click.Context, command: str) -> None:
    """Explain a command."""
    assert ctx.parent is not None
    found = cli.get_command(ctx.parent, command) if command else cli
    if found is None:
        raise click.UsageError(f"No such command '{command}'.", ctx.parent)
    name = f"refollama {command}".strip()
    click.echo(found.get_help(click.Context(found, info_name=name)))


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


@contextmanager
def _keeper() -> Iterator[Client | Here]:
    """Who copies and removes models: the server, or the store if none listens on this machine."""
    from refollama.client import Client

    with Client() as client:
        listens = not on_this_machine(client.url) or client.is_running()
        yield client if listens else Here()


class Here:
    """The store of this machine, in the words of a client."""

    def copy(self, source: str, destination: str) -> None:
        """Give a model a second name."""
        from refollama.store import Name, Store

        Store.default().copy(Name.parse(source), Name.parse(destination))

    def delete(self, model: str) -> None:
        """Remove a model, and the blobs that no other one needs."""
        from refollama.store import Name, Store

        Store.default().remove(Name.parse(model))


# --- create ----------------------------------------------------------------------------------


def _read_text(path: Path) -> str:
    try:
        return path.read_text("utf-8-sig")
    except UnicodeDecodeError:
        raise BadRequest(f"{path}: not UTF-8 text") from None


# --- list and show ---------------------------------------------------------------------------


def _models() -> list[Row]:
    """Rows for the table: from the server, or from the store if none listens on this machine."""
    from refollama.client import Client

    with Client() as client:
        if not on_this_machine(client.url) or client.is_running():
            return [overview.list_row(record) for record in client.tags()]
    from refollama.store import Store

    return [
        (
            str(model.name),
            overview.short_id(model.digest),
            terminal.human_size(model.size),
            terminal.human_age(model.modified_at),
        )
        for model in Store.default().list()
    ]


def _starting_with(prefix: str, rows: Iterable[Row]) -> list[Row]:
    return [row for row in rows if row[0].startswith(prefix)]


def _either(parts: Iterable[str]) -> str:
    *names, last = (f"'--{name}'" for name in sorted(parts))
    return f"{', '.join(names)}, or {last}"


def _print(text: str) -> None:
    """What others wrote into a model; a terminal gets no control characters of theirs."""
    click.echo(terminal.printable(text) if sys.stdout.isatty() else text)


# --- run -------------------------------------------------------------------------------------


def _ask(model: str, given: Record) -> Ask:
    """The flags of `run` as one record."""
    from refollama.talk import Ask

    return Ask(
        model,
        system=given["system"],
        options=given["settings"],
        format=given["format"],
        keep_alive=_seconds_or_duration(given["keepalive"]),
        think=given["think"],
        raw=given["raw"] or None,  # None: not sent
        wordwrap=not given["nowordwrap"],
        verbose=given["verbose"],
        hides_thinking=given["hidethinking"],
    )


def _seconds_or_duration(text: str | None) -> str | int | None:
    """A bare number is one of seconds, and goes as a number."""
    return int(text) if text and re.fullmatch(r"[+-]?[0-9]+", text) else text


def _format(text: str | None) -> Any:
    """`json` as it is, a schema as the object that it spells; the server judges both."""
    if not text or not text.lstrip().startswith("{"):
        return text or None
    try:
        return json.loads(text)
    except ValueError as problem:
        raise click.BadParameter(f"this schema is no JSON: {problem}") from None


def _prompt_line() -> PromptLine:
    from refollama.promptline import PromptLine

    return PromptLine(_history_file())


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


def _history_file() -> Path | None:
    if os.environ.get("OLLAMA_NOHISTORY", "").lower() not in ("", "0", "false"):
        return None
    return Path("~/.ollama/history").expanduser()


def _complete_in_bash() -> None:
    """Teach click names with a colon: bash takes one for a word, and replaces what is behind it.

    Example: for `rm tale:s`, bash tells the words `rm tale : s` and wants `small`
    """
    from click.shell_completion import BashComplete, add_completion_class

    class Bash(BashComplete):
        def get_completion_args(self) -> tuple[list[str], str]:
            args, word = super().get_completion_args()
            count = len(args)
            while args and (word.startswith(":") or args[-1] == ":"):
                word = args.pop() + word
            was_cut = len(args) < count
            self._before = word[: word.rfind(":") + 1] if was_cut else ""
            return args, word

        def format_completion(self, item: CompletionItem[Any]) -> str:
            item.value = item.value.removeprefix(self._before)
            return super().format_completion(item)

    add_completion_class(Bash)


def main() -> None:
    """The console script."""
    if COMPLETING in os.environ:
        _complete_in_bash()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal that cannot show é still gets a ?
            stream.reconfigure(errors="replace")
    cli(prog_name="refollama")
