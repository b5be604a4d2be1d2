"""The commands: what the user types, turned into calls to a server, and what comes back shown.

    serve    run the server here
    run      ask a model, or talk with it   ┐
    create   make a model from a Modelfile  │ with the server at OLLAMA_HOST; if none listens,
    show     what is known of a model       │ with one of their own that ends with the command
    pull     fetch a model from a registry  │
    push     send a model to a registry     ┘
    list     the models there are           ┐ through the server;
    cp, rm   copy a model, remove models    ┘ if none listens, straight in the store
    ps       the models in memory           ┐ through the server only
    stop     let go of one of them          ┘
    login    keep a password for a registry ┐ on this machine
    logout   forget it                      ┘

Those that work on files, without a server, are in `workshop.py`.

Exit status: 0 done, 1 an error that is told in one sentence, 2 a wrong command line, 130 Ctrl-C.
"""

from __future__ import annotations

import io
import json
import logging
import os
import re
import sys
from collections.abc import Iterable, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from refollama import overview, reach, terminal, workshop
from refollama.completion import COMPLETING, complete_in_bash, complete_models
from refollama.errors import BadRequest, NotFound, RefollamaError
from refollama.host import base_url, listen_address, on_this_machine
from refollama.options import LISTS, Options, from_text
from refollama.paths import is_path, lies_here

if TYPE_CHECKING:
    from refollama.client import Record
    from refollama.promptline import PromptLine
    from refollama.talk import Ask

Row = tuple[str, ...]

ALIASES = {"ls": "list", "start": "serve"}
INTERRUPTED = 128 + 2  # as shells report a death by SIGINT
ENVIRONMENT = {
    "OLLAMA_HOST": "where the server listens and is looked for: 127.0.0.1:11434",
    "OLLAMA_MODELS": "the folder of the models: ~/.ollama/models",
    "OLLAMA_NOHISTORY": "1 = forget what was typed at the prompt",
    "OLLAMA_ORIGINS": "web pages that may ask the server, separated by commas",
    "OLLAMA_API_KEY": "a key that the server asks for, if it has one, and that clients send",
    "OLLAMA_KEEP_ALIVE": "how long a model stays in memory after an answer: 5m; -1 = for ever",
    "OLLAMA_NUM_PARALLEL": "requests that one model answers at once: 1",
    "OLLAMA_MAX_LOADED_MODELS": "models that are kept in memory at once: 1",
    "OLLAMA_MAX_QUEUE": "prompts that may wait before more are refused: 512",
    "OLLAMA_CONTEXT_LENGTH": "num_ctx, where neither model nor request says it: 2048",
    "OLLAMA_NOPRUNE": "1 = keep blobs that no model names any more",
    "OLLAMA_REGISTRY_HOST": "the registry that the next two are for",
    "OLLAMA_REGISTRY_USERNAME": "who the server is to that registry",
    "OLLAMA_REGISTRY_PASSWORD": "and the password",
    "REFOLLAMA_MAX_BODY": "the largest request that the server reads, in MiB: 64",
    "REFOLLAMA_VISION": "llama.cpp = run a block less of a vision model's tower, as that does",
}
LOGIN_ENVIRONMENT = [name for name in ENVIRONMENT if name.startswith("OLLAMA_REGISTRY_")]
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


class Run(click.Command):
    """`run`, whose `--think` may have a level: only behind the `=`, as a prompt may follow it."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Take the arguments as they were typed."""
        end = args.index("--") if "--" in args else len(args)
        flags = [re.sub("^--think=", "--think-level=", arg) for arg in args[:end]]
        return super().parse_args(ctx, flags + args[end:])


def _sentence(problem: Exception) -> str:
    if isinstance(problem, OSError) and problem.strerror:
        return f"{problem.filename}: {problem.strerror}" if problem.filename else problem.strerror
    return str(problem)


def _more(*examples: str, environment: Sequence[str]) -> str:
    """The end of a help page."""
    names = "\n".join(f"  {name:<25} {ENVIRONMENT[name]}" for name in environment)
    return f"{workshop.shown(*examples)}\n\n\b\nEnvironment:\n{names}"


def _tell_version(ctx: click.Context, _: click.Parameter, wanted: bool) -> None:
    if not wanted or ctx.resilient_parsing:
        return
    version, warning = reach.version()
    click.echo(f"refollama version is {version}")
    if warning:
        click.echo(f"Warning: {warning}", err=True)
    ctx.exit()


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
@click.option(
    "-v",
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_tell_version,
    help="Show the server's version, and whether ours is another one.",
)
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
        "refollama create tale ./checkpoint      # config.json, *.safetensors, a tokenizer",
        environment=["OLLAMA_HOST", "OLLAMA_MODELS"],
    )
)
@click.argument("model")
@click.argument("source", required=False, type=click.Path(path_type=Path))
@click.option(
    "-f",
    "--file",
    "path",
    default="Modelfile",
    show_default=True,
    type=click.Path(path_type=Path),
    help="The Modelfile; relative paths in it start at its folder.",
)
@click.option("-q", "--quantize", metavar="TYPE", help="Pack the weights, as Q4_K_M for one.")
def create(model: str, source: Path | None, path: Path, quantize: str | None) -> None:
    """Make a model from a Modelfile, or from SOURCE: a folder of safetensors or a .gguf file.

    A server on another machine is sent the files that the Modelfile names.
    """
    from refollama import transfer
    from refollama.weights.mixes import file_type

    if quantize:
        file_type(quantize)  # before anything is sent
    found = transfer.to_create(model, path, source)
    with reach.server() as client:
        transfer.make(client, found, quantize)


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
    with reach.keeper() as kept:
        rows = [overview.list_row(record) for record in kept.tags()]
    click.echo(terminal.table(overview.LIST, _starting_with(prefix, rows)))


@cli.command(
    cls=Run,
    epilog=_more(
        "refollama run tale                      # talk; /bye ends it",
        'refollama run tale "Why is the sky blue?"',
        'refollama run tale "Sum this up." < notes.txt',
        "refollama run ./story.gguf -o temperature=0 -o num_predict=50 Once upon a time",
        environment=["OLLAMA_HOST", "OLLAMA_MODELS", "OLLAMA_NOHISTORY"],
    ),
)
@click.argument("model", shell_complete=complete_models)
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
@click.option("--insecure", is_flag=True, help="If it has to be pulled: by http.")
@click.option("--nowordwrap", is_flag=True, help="Do not break long lines between words.")
@click.option(
    "--think/--nothink",
    default=None,
    help="Let a model that can think do so first; --think=high, medium or low: how much.",
)
@click.option("--think-level", hidden=True)
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
    lies; any other name is pulled first. What comes through a pipe is put before PROMPT. With
    neither, you talk at a prompt line.
    """
    from refollama import talk
    from refollama.transfer import with_pull

    ask = _ask(_model(model), given)
    prompt = _prompt(words)
    with reach.server() as client:
        begin = partial(with_pull, client, ask.model, given["insecure"])
        if prompt is None:
            begin(lambda: talk.Talk(client, ask, _prompt_line(), _model)).run()
        else:
            begin(lambda: talk.complete(client, ask, prompt))


@cli.command(
    epilog=_more(
        "refollama show tale                     # at a glance",
        "refollama show tale --modelfile > Modelfile",
        environment=["OLLAMA_HOST", "OLLAMA_MODELS"],
    )
)
@click.argument("model", shell_complete=complete_models)
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
    with reach.server() as client:
        record = look(client, model, verbose)
    _print(record.get(wanted[0]) or "" if wanted else overview.overview(record, verbose))


@cli.command(
    epilog=_more(
        "refollama pull llama2",
        "refollama pull hf.co/someone/some-model:Q4_K_M",
        "refollama pull --insecure localhost:5000/me/tale    # by http",
        "refollama pull ./tale.gguf tale                     # from disk",
        environment=["OLLAMA_HOST", "OLLAMA_MODELS", *LOGIN_ENVIRONMENT],
    )
)
@click.argument("model", shell_complete=complete_models)
@click.argument("name", required=False)
@click.option("--insecure", is_flag=True, help="Speak http to the registry, without encryption.")
def pull(model: str, name: str | None, insecure: bool) -> None:
    """Fetch a model from its registry, or from disk.

    MODEL is a name, which may begin with the host of a registry; what an earlier try has fetched
    is not fetched again. Or it is the path of a .gguf file, or of a folder with a Modelfile or one
    .gguf file: a model of that name is made of it, or of the NAME behind it.
    """
    from refollama import transfer

    is_file = is_path(model) or model.endswith("/") or lies_here(model)
    found = transfer.on_disk(Path(model).expanduser(), name) if is_file else None
    if found is None and name is not None:
        raise click.UsageError("a second name is for a model from disk only")
    with reach.server() as client:
        if found:
            transfer.make(client, found)
        else:
            transfer.pull(client, model, insecure)


@cli.command(
    epilog=_more(
        "refollama cp tale registry.example/me/tale          # the name says where it goes",
        "refollama push registry.example/me/tale",
        environment=["OLLAMA_HOST", "OLLAMA_MODELS", *LOGIN_ENVIRONMENT],
    )
)
@click.argument("model", shell_complete=complete_models)
@click.option("--insecure", is_flag=True, help="Speak http to the registry, without encryption.")
def push(model: str, insecure: bool) -> None:
    """Send a model to the registry that its name begins with.

    What the registry has already is not sent.
    """
    from refollama import transfer

    with reach.server() as client:
        transfer.push(client, model, insecure)


@cli.command(
    epilog=_more(
        "refollama login registry.example",
        "refollama login registry.example -u me --password-stdin < secret",
        environment=["OLLAMA_HOST", *LOGIN_ENVIRONMENT],
    )
)
@click.argument("host")
@click.option("-u", "--username", help="Who you are there; else you are asked.")
@click.option("--password-stdin", is_flag=True, help="Read the password from standard input.")
@click.option("--insecure", is_flag=True, help="Try them by http, without encryption.")
def login(host: str, username: str | None, password_stdin: bool, insecure: bool) -> None:
    """Try user and password at a registry, and keep them.

    They are kept in ~/.ollama, for the server of this user; also if the registry cannot be reached
    now, but not if it refuses them.
    """
    from refollama import transfer

    host = transfer.login_host(host)
    transfer.login(host, *_credentials(username, password_stdin), insecure)
    click.echo(f"the login for '{host}' is kept; the next pull or push uses it")


@cli.command(epilog=_more("refollama logout registry.example", environment=["OLLAMA_HOST"]))
@click.argument("host")
def logout(host: str) -> None:
    """Forget user and password for a registry."""
    from refollama import transfer

    host = transfer.login_host(host)
    transfer.logout(host)
    click.echo(f"the login for '{host}' is forgotten")


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
@click.argument("model", shell_complete=complete_models)
def stop(model: str) -> None:
    """Make the server let go of a model that it holds in memory."""
    from refollama.client import Client

    with Client() as client, closing(client.generate(_model(model), keep_alive=0)) as records:
        for _ in records:
            pass


@cli.command(
    epilog=_more("refollama cp tale tale:mine", environment=["OLLAMA_HOST", "OLLAMA_MODELS"])
)
@click.argument("source", shell_complete=complete_models)
@click.argument("target")
def cp(source: str, target: str) -> None:
    """Give a model a second name."""
    with reach.keeper() as keeper:
        keeper.copy(source, target)
    click.echo(f"copied '{source}' to '{target}'")


@cli.command(
    epilog=_more(
        "refollama rm tale",
        "refollama rm tale tale:mine             # one after another, until one fails",
        environment=["OLLAMA_HOST", "OLLAMA_MODELS"],
    )
)
@click.argument("models", nargs=-1, required=True, shell_complete=complete_models)
def rm(models: Sequence[str]) -> None:
    """Remove models."""
    with reach.keeper() as keeper:
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
    asked = click.Context(found, ctx.parent, info_name=command) if command else ctx.parent
    click.echo(found.get_help(asked))


for _command in workshop.COMMANDS:
    cli.add_command(_command)


# --- which server ----------------------------------------------------------------------------


def _near() -> bool:
    return on_this_machine(base_url(os.environ))


# --- create, pull, login ---------------------------------------------------------------------


def _credentials(username: str | None, password_stdin: bool) -> tuple[str, str]:
    """Asked for at the terminal, the password without echo; or the password from a pipe."""
    if password_stdin:
        if not username:
            raise click.UsageError("--password-stdin needs --username")
        return username, sys.stdin.read().removesuffix("\n").removesuffix("\r")
    if not sys.stdin.isatty():
        raise click.UsageError("no terminal to ask at: use --username and --password-stdin")
    username = username or click.prompt("Username", err=True)
    return username, click.prompt("Password", hide_input=True, err=True)


# --- list and show ---------------------------------------------------------------------------


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

    level = given["think_level"]
    return Ask(
        model,
        system=given["system"],
        options=given["settings"],
        format=given["format"],
        keep_alive=_seconds_or_duration(given["keepalive"]),
        think={"true": True, "false": False, None: given["think"]}.get(level, level),
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
    if not is_path(name) and not lies_here(name):
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
        name: from_text(name, texts if name in LISTS else texts[-1:])
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


def main() -> None:
    """The console script."""
    if COMPLETING in os.environ:
        complete_in_bash()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal that cannot show é still gets a ?
            stream.reconfigure(errors="replace")
    cli(prog_name="refollama")
