"""The commands on files: they do their work here, without a server.

    bench        how fast a model is on this machine
    warm         a model, made ready to answer sooner on this machine
    perplexity   how well a model foretells a text
    imatrix      which columns of its matrices matter, while it reads a text
    quantize     a model, packed as another type
    export       a model as a folder that transformers loads

`cli.py` adds them to its own. torch is imported when one of them begins to work.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from refollama import terminal
from refollama.completion import complete_models
from refollama.errors import BadRequest, NotFound, RefollamaError

if TYPE_CHECKING:
    from refollama.bench import Speed
    from refollama.export import Exported
    from refollama.loaded import LoadedModel
    from refollama.perplexity import Window
    from refollama.quantize import Change

STDIN = "-"
SHORT = 32  # tokens


def shown(*examples: str) -> str:
    """Examples, at the end of a help page."""
    return "\b\nExamples:\n" + "\n".join(f"  {example}" for example in examples)


# --- the commands ----------------------------------------------------------------------------


@click.command(
    epilog=shown(
        "refollama bench fable",
        "refollama bench ./tale-Q4_0.gguf --depth 1024 --threads 2",
        "refollama bench ./tale-Q4_0.gguf --prompt-bits 16    # prompts in bfloat16",
        "refollama bench ./tale-Q4_0.gguf --plain    # without the parts of refollama/fast",
    )
)
@click.argument("model", shell_complete=complete_models)
@click.option("-p", "--read", type=int, help="Tokens of a prompt (512, or as MODEL allows).")
@click.option("-n", "--write", type=int, help="Tokens of an answer (128, or as MODEL allows).")
@click.option("-d", "--depth", default=0, show_default=True, help="Tokens that were read before.")
@click.option("-r", "--repeat", default=5, show_default=True, help="How often each is measured.")
@click.option("-t", "--threads", type=click.IntRange(1), help="Of the CPU (as torch chooses).")
@click.option(
    "--prompt-bits",
    type=click.Choice(["8", "16", "32"]),
    default="32",
    show_default=True,
    help="Of the numbers in which a prompt is multiplied; 32 is exact.",
)
@click.option("--plain", is_flag=True, help="Every product as models/ has it: exact, and slow.")
@click.option("--json", "as_json", is_flag=True, help="All numbers, for a program.")
def bench(model: str, depth: int, repeat: int, plain: bool, as_json: bool, **given: Any) -> None:
    """Measure how fast a model is on this machine.

    MODEL is a name or the path of a .gguf file. Median, least and most tokens a second: to read a
    prompt, and to write an answer token by token, both without tokenizer, sampler and server.
    """
    import torch

    from refollama.bench import bench as measure

    if given["threads"]:
        torch.set_num_threads(given["threads"])
    chosen = {"fast": not plain, "prompt_bits": int(given["prompt_bits"])}
    llm = _loaded(model, chosen)
    with terminal.counter("measuring", "tests") as moved:
        speeds = measure(llm, given["read"], given["write"], depth=depth, repeat=repeat, told=moved)
    if as_json:
        about = {"model": model, "threads": torch.get_num_threads(), **chosen}
        tests = {one.name: [round(rate, 2) for rate in one.rates] for one in speeds}
        click.echo(json.dumps(about | {"torch": torch.__version__, "tokens_per_second": tests}))
        return
    click.echo(terminal.table(_SPEEDS, (_speed_row(one) for one in speeds)))
    click.echo(f"{torch.get_num_threads()} threads, torch {torch.__version__}")


@click.command(epilog=shown("refollama warm fable", "refollama warm ./tale-Q4_0.gguf"))
@click.argument("model", shell_complete=complete_models)
def warm(model: str) -> None:
    """Make a model ready to answer sooner on this machine.

    MODEL is a name or the path of a .gguf file. Its blocks, and products of its types of weights,
    are compiled for this processor. That needs a C++ compiler, and half a minute for a small model,
    some minutes for the first large one of a type; it writes up to several times as fast then. What
    is compiled serves all models of the shape, and all weights of the type. And what is made of its
    matrices is kept on disk, about as large as the file, so that it is loaded sooner; it is removed
    when the file is gone. A model that a server has loaded takes both after `refollama stop MODEL`.
    Answers differ from those before by rounding, where two words are as likely as each other.
    """
    llm = _loaded(model)
    try:
        _compile(model, llm)
    except RefollamaError:
        _keep_copies(llm)  # these it can have, whatever there is to compile with
        raise
    _keep_copies(llm)


def _keep_copies(llm: LoadedModel) -> None:
    from refollama.fast.copies import are_kept, keep

    if are_kept(llm.net, llm.sources):
        return
    with terminal.spinner("writing"):
        size = keep(llm.net, llm.sources)
    click.echo(
        f"{terminal.human_size(size)} that were made of its matrices are kept for the next time"
    )


def _compile(model: str, llm: LoadedModel) -> None:
    from refollama.cachekind import CacheKind
    from refollama.fast import CompiledBlock, has_routines, lacking
    from refollama.fast import warm as compile_for
    from refollama.fast.routines import folder

    blocks = llm.net.blk
    if all(isinstance(block, CompiledBlock) for block in blocks) and not lacking(llm.net):
        click.echo(f"{model} is ready: all of it was compiled before")
        return
    before = _writes(llm)
    dtype = CacheKind.of(llm.defaults, llm.net).dtype
    with terminal.counter("compiling", "routines") as moved:
        count = compile_for(llm.net, dtype, moved)
    if not has_routines(llm.net):
        raise BadRequest(
            f"{model} has nothing that can be compiled: adapters, layers on a GPU, and matrices in "
            "F32 take the plain path"
        )
    click.echo(f"{count} of {len(blocks)} blocks are compiled; what is kept lies in {folder()}")
    click.echo(f"It writes {_writes(llm):.0f} tokens/s; before, {before:.0f}.")


def _writes(llm: LoadedModel) -> float:
    """Tokens a second, of a short answer."""
    from refollama.bench import bench as measure

    [speed] = measure(llm, 0, min(SHORT, llm.net.n_ctx), repeat=3)
    return speed.median


_SPEEDS = ("TEST", "TOKENS/S", "LEAST", "MOST")


def _speed_row(found: Speed) -> tuple[str, ...]:
    return (found.name, *(f"{rate:.1f}" for rate in (found.median, *found.spread)))


@click.command(
    epilog=shown(
        "refollama perplexity tale wiki.test.raw",
        "refollama perplexity ./tale-Q4_0.gguf wiki.test.raw --chunks 100",
        "refollama perplexity tale story.txt --num-ctx 128 --stride 32 --verbose",
    )
)
@click.argument("model", shell_complete=complete_models)
@click.argument("text")
@click.option("--num-ctx", type=int, help="Tokens of a window (512, or all that MODEL reads).")
@click.option("--stride", default=0, help="Windows that overlap: each begins so much later.")
@click.option("--chunks", type=click.IntRange(1), help="No more than so many windows.")
@click.option("-v", "--verbose", is_flag=True, help="Show what is known after each window.")
def perplexity(
    model: str, text: str, num_ctx: int | None, stride: int, chunks: int | None, verbose: bool
) -> None:
    """Measure how well a model foretells a text.

    MODEL is a name or the path of a .gguf file; TEXT is a file in UTF-8, or - for what comes
    through a pipe. Lower is better; only numbers of the same text and the same windows compare.
    Windows and stride are those of llama.cpp's tool, so its numbers do.
    """
    from refollama import perplexity as measure

    words = _text(text)
    llm = _loaded(model)
    found = measure.perplexity(llm, words, num_ctx, stride=stride, chunks=chunks)
    *_, last = _in_lines(found) if verbose else _with_a_bar(found)
    click.echo(f"Perplexity: {_told(last)} ({last.so_far.tokens} tokens in {last.of} windows)")


def _in_lines(found: Iterable[Window]) -> Iterator[Window]:
    """Without a bar, which would take these lines for its own and move them to standard error."""
    for window in found:
        click.echo(f"[{window.number}/{window.of}] {_told(window)}")
        yield window


def _with_a_bar(found: Iterable[Window]) -> Iterator[Window]:
    with terminal.counter("reading", "windows") as moved:
        for window in found:
            moved(window.number, window.of)
            yield window


def _told(window: Window) -> str:
    return f"{window.so_far.perplexity:.4f} ± {window.so_far.plus_minus:.5f}"


@click.command(
    epilog=shown(
        "refollama imatrix ./tale-F16.gguf calibration.txt -o tale.imatrix.gguf",
        "refollama imatrix tale calibration.txt -o tale.imatrix.gguf --chunks 100",
    )
)
@click.argument("model", shell_complete=complete_models)
@click.argument("text")
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="The new file.")
@click.option("--num-ctx", type=int, help="Tokens of a window (512, or all that MODEL reads).")
@click.option("--chunks", type=click.IntRange(1), help="No more than so many windows.")
@click.option("--process-output", is_flag=True, help="Listen at the output matrix, too.")
@click.option("-f", "--force", is_flag=True, help="Write over OUT.")
def imatrix(model: str, text: str, out: Path, force: bool, **given: Any) -> None:
    """Find out which columns of a model's matrices matter.

    While MODEL reads TEXT, all that its matrices multiply is squared and summed up, column by
    column. OUT is a GGUF file, as llama.cpp writes and reads it; it helps to quantise the model.
    """
    from refollama.imatrix import collect
    from refollama.weights.importance import write_importance

    _check_free(out, force)
    words = _text(text)
    llm = _loaded(model)
    with terminal.counter("reading", "windows") as moved:
        found = collect(
            llm,
            words,
            given["num_ctx"],
            chunks=given["chunks"],
            output=given["process_output"],
            told=moved,
        )
    write_importance(out, replace(found, datasets=(text,)))
    click.echo(f"wrote {out}: {len(found.sums)} tensors from {found.chunks} windows")


@click.command(
    epilog=shown(
        "refollama quantize tale-F16.gguf tale-Q4_K_M.gguf Q4_K_M",
        "refollama quantize tale-F16.gguf tale-Q2_K.gguf Q2_K --imatrix tale.imatrix.gguf",
        "refollama quantize tale-Q8_0.gguf tale-F16.gguf F16    # unpacked",
    )
)
@click.argument("source", metavar="IN", type=click.Path(path_type=Path))
@click.argument("target", metavar="OUT", type=click.Path(path_type=Path))
@click.argument("type")
@click.option("--imatrix", type=click.Path(path_type=Path), help="Spare the columns that matter.")
@click.option("--allow-requantize", is_flag=True, help="Pack again what is packed: errors add up.")
@click.option("-f", "--force", is_flag=True, help="Write over OUT.")
@click.option("-v", "--verbose", is_flag=True, help="Show what became of each tensor.")
def quantize(source: Path, target: Path, type: str, **given: Any) -> None:
    """Make a model smaller: pack its weights in fewer bits.

    IN and OUT are .gguf files. TYPE is Q8_0, Q6_K, Q5_K_M, Q5_K_S, Q5_1, Q5_0, Q4_K_M, Q4_K_S,
    Q4_1, Q4_0, Q3_K_L, Q3_K_M, Q3_K_S or Q2_K; or F16, BF16 or F32, which unpack. What is packed is
    unpacked again and compared: --verbose shows the mean squared error of each tensor.
    """
    from refollama.quantize import plan
    from refollama.weights import open_gguf
    from refollama.weights.importance import read_importance

    with open_gguf(source) as file:
        importance = read_importance(given["imatrix"]) if given["imatrix"] else None
        work = plan(file, type, again=given["allow_requantize"], importance=importance)
        _check_free(target, given["force"])
        with terminal.counter("quantising", "weights") as moved:
            work.write(target, lambda done: moved(done, work.weights))
    if given["verbose"]:
        click.echo(terminal.table(_CHANGES, map(_change_row, work.changes, work.errors.values())))
    size, old = (terminal.human_size(path.stat().st_size) for path in (target, source))
    bits = target.stat().st_size * 8 / work.weights
    click.echo(f"wrote {target}: {work.type}, {size}, {bits:.2f} bits for each weight; was {old}")


_CHANGES = ("TENSOR", "SHAPE", "WAS", "IS", "MEAN SQUARED ERROR")


def _change_row(change: Change, error: float) -> tuple[str, ...]:
    shape = " × ".join(map(str, change.shape))
    return change.name, shape, change.old, change.new, f"{error:.3e}" if error else "0"


@click.command(
    epilog=shown(
        "refollama export tale ./tale",
        "refollama export ./tale-Q4_0.gguf ./tale --dtype F32",
        "refollama export tale ./tale --format gguf --dtype F16    # unpacked",
    )
)
@click.argument("model", shell_complete=complete_models)
@click.argument("folder", type=click.Path(path_type=Path))
@click.option(
    "--format",
    default="safetensors",
    show_default=True,
    metavar="safetensors|gguf",
    help="For transformers, or for llama.cpp and us.",
)
@click.option("--dtype", metavar="F32|F16|BF16", help="Of the new weights.")
def export(model: str, folder: Path, format: str, dtype: str | None) -> None:
    """Write a model as a folder that others can load.

    MODEL is a name or the path of a .gguf file; FOLDER is new, or empty. safetensors: the weights
    are unpacked, under the names of Hugging Face, with settings and tokenizer; without --dtype they
    are what most of them were, or F16 if they were packed. gguf: the files themselves; with --dtype
    unpacked. Eyes come along, and adapters are added to the weights. A Modelfile lies beside them:
    `refollama create NAME -f FOLDER/Modelfile` makes the same model again.
    """
    from refollama.export import export as write

    with terminal.counter("exporting", "bytes") as moved:
        write(_exported(model), folder, format, dtype, told=moved)
    files = [path for path in sorted(folder.iterdir()) if path.is_file()]
    size = terminal.human_size(sum(path.stat().st_size for path in files))
    click.echo(f"wrote {folder}: {size} in {len(files)} files")


# --- what they share -------------------------------------------------------------------------


def _loaded(model: str, options: Mapping[str, Any] | None = None) -> LoadedModel:
    from refollama.loaded import load

    with terminal.spinner("loading"):
        return load(model, options)


def _exported(model: str) -> Exported:
    """The files of a model, by its path or its name."""
    from refollama.export import Exported
    from refollama.fable.bundled import stock
    from refollama.show import settings_of
    from refollama.store import Name, Store

    path = Path(model).expanduser()
    if path.is_file():
        return Exported(path, name=path.stem)
    store = Store.default()
    stock(store, model)
    files = store.resolve(Name.parse(model))
    return Exported(
        files.weights,
        next(iter(files.projectors), None),
        files.adapters,
        settings_of(files),
        files.name.model,
    )


def _text(path: str) -> str:
    """A file's text, without the line feed at its end; the same in llama.cpp."""
    raw = sys.stdin.buffer.read() if path == STDIN else Path(path).read_bytes()
    try:
        return raw.decode("utf-8").removesuffix("\n")
    except UnicodeDecodeError as problem:
        name = "standard input" if path == STDIN else path
        raise BadRequest(f"{name} is not UTF-8 text: see byte {problem.start}") from None


def _check_free(path: Path, force: bool) -> None:
    """Before long work: can this file be written, and may it be, if there is one already?"""
    if not path.parent.is_dir():
        raise NotFound(f"{path.parent}: there is no such folder")
    if path.exists() and not path.is_file():
        raise BadRequest(f"{path} is a folder or a device: OUT must be the name of a file")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise BadRequest(f"{path.parent}: no file may be written in this folder")
    if force or not path.exists():
        return
    if not sys.stdin.isatty():
        raise BadRequest(f"{path} exists: use --force to write over it")
    click.confirm(f"{path} exists. Write over it?", abort=True, err=True)


COMMANDS = (bench, warm, perplexity, imatrix, quantize, export)
