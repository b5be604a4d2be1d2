"""Routines: what torch compiles to C++, kept on disk for this processor, this torch, this code.

    refollama warm MODEL ── compiled ──► ~/.cache/refollama/blocks ── loaded ──► any load afterwards

Nothing is compiled while somebody waits for an answer.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from refollama.errors import RefollamaError
from refollama.fast.instructions import teach, whole_vectors
from refollama.fast.prepared import LINE

Routine = Callable[[list[Tensor]], list[Tensor]]
# The pages that make them.
WRITTEN = (
    *("step", "pieces", "rows", "fixed", "lanes", "dots", "instructions"),
    *("laned", "compiled", "routines"),
)
CPUINFO = Path("/proc/cpuinfo")
INDUCTOR_CACHE = "TORCHINDUCTOR_CACHE_DIR"
# A product that is written code by code is one loop: nothing of it goes to memory in between.
AS_ONE = dict.fromkeys(
    ("realize_opcount_threshold", "realize_reads_threshold", "realize_acc_reads_threshold"), 1 << 30
)
# Loops are laid out for all cores, by however many threads this process computes just now.
FOR_CPU = {"cpp.dynamic_threads": True, "cpp.threads": os.cpu_count() or 1, **AS_ONE}
ON_STACK = {"aot_inductor.allow_stack_allocation": True, **FOR_CPU}
MOST_ON_STACK = 1 << 20  # bytes: an eighth of what a thread has on Linux

log = logging.getLogger(__name__)
_known: dict[Path, Routine] = {}
_refused: set[tuple[Path, int]] = set()  # and when they were written


def cache_folder(kind: str) -> Path:
    """Where things of this kind are kept, that can be made anew."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "refollama" / kind


def folder() -> Path:
    """Where routines are kept."""
    return cache_folder("blocks")


def is_ours(path: Path) -> bool:
    """May nobody but its user have written it?  Raises: OSError if it is not there."""
    stat = path.stat()
    return not hasattr(os, "getuid") or (stat.st_uid == os.getuid() and not stat.st_mode & 0o022)


def path_for(told: object, device: str = "cpu") -> Path:
    """Of what is described so: for this processor, by this torch and this code."""
    return folder() / f"{maker(device)}-{_digest(told)}.pt2"


@cache
def maker(device: str = "cpu") -> str:
    """What names of files begin with."""
    code = [Path(__file__).with_name(f"{name}.py").read_text() for name in WRITTEN]
    if device == "cuda":
        properties = [torch.cuda.get_device_name(), torch.version.cuda]
        return _digest([*properties, torch.__version__, *code])
    processor = platform.processor() or platform.machine()
    if CPUINFO.exists():
        lines = CPUINFO.read_text().splitlines()
        processor = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return _digest([processor, torch.__version__, *code])


def _digest(told: object) -> str:
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]


def loaded(path: Path, device: str = "cpu") -> Routine | None:
    """The routine of a file; None if there is none that may be trusted and works.

    It stays, though its file may go; and what is not there now may be there later.
    """
    if path in _known:
        return _known[path]
    try:
        file = path, path.stat().st_mtime_ns
    except OSError:
        return None
    routine = None if file in _refused else _opened(path, device)
    if routine is None:
        _refused.add(file)
    else:
        _known[path] = routine
    return routine


def forget() -> None:
    """Look at files anew from now on."""
    _known.clear()
    _refused.clear()


def _opened(path: Path, device: str) -> Routine | None:
    if not is_ours(path):
        log.warning("%s is left alone: others than its user may write it", path)
        return None
    # For a recording it must not ask the GPU, between its steps, whether it has ended.
    alone = device == "cuda"
    try:
        # What torch's own reader of packages is built on; that takes two seconds to import.
        with nullcontext() if alone else _leaving_nothing():
            loader = torch._C._aoti.AOTIModelPackageLoader(str(path), "model", alone, 1, -1)
    except (RuntimeError, AttributeError) as problem:
        log.warning("%s is no routine: %s", path, str(problem).split("\n")[0])
        return None
    run: Routine = loader.run
    return run


@contextmanager
def _leaving_nothing() -> Iterator[None]:
    """A package is unpacked into a temporary folder, which would stay behind wherever a process
    ends at once, as servers do. What is loaded needs its files no more (on a GPU, it does)."""
    tempfile.gettempdir()  # is found once, and other threads ask as well: it stays where it was
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch,
        _environment("TMPDIR", scratch),
    ):
        yield


def prune() -> None:
    """Remove what other versions have left."""
    makers = tuple(map(maker, ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)))
    for old in folder().glob("*.pt2"):
        if not old.name.startswith(makers):
            old.unlink(missing_ok=True)


def compile_to(
    path: Path,
    made: nn.Module,
    given: tuple[object, ...],
    dynamic: tuple[object, ...],
    device: str = "cpu",
    on_stack: bool = False,
) -> None:
    """Compile what takes such arguments; the file appears whole, or not at all.

    dynamic: which of their sizes may be others, as `torch.export` has it. on_stack: what its loops
    hand on lies there, if it is a megabyte at most, and has one size. Then it must return nothing:
    all results would be one tensor, that of the last call.
    Raises: RefollamaError without a compiler, or if it fails.
    """
    _check_compiler()
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    beside = tempfile.TemporaryDirectory(dir=path.parent)
    configs = {} if device != "cpu" else ON_STACK if on_stack else FOR_CPU
    with beside as scratch, _quietly(scratch):
        try:
            if device == "cpu":
                teach()
            with whole_vectors(), _written_for_stack() if on_stack else nullcontext():
                package = torch._inductor.aoti_compile_and_package(
                    torch.export.export(made, given, dynamic_shapes=dynamic),
                    package_path=str(Path(scratch) / "routine.pt2"),
                    inductor_configs=configs,
                )
        except Exception as problem:  # a compiler says much; the log has all of it
            log.debug("compiling failed", exc_info=True)
            last = str(problem).strip().split("\n")[-1]
            raise RefollamaError(f"a routine could not be compiled: {last}") from problem
        os.chmod(package, 0o600)
        os.replace(package, path)
    forget()


def _check_compiler() -> None:
    from torch._inductor import cpp_builder

    try:
        cpp_builder.get_cpp_compiler()
    except RuntimeError:
        raise RefollamaError(
            "there is no C++ compiler: install g++ (Debian, Ubuntu: apt install g++), or name one "
            "in the environment variable CXX"
        ) from None


@contextmanager
def _written_for_stack() -> Iterator[None]:
    """torch's compiler can put tensors on the stack. But who writes its C++ is decided for all
    that a process compiles, by the first; and it stops at a tenth of `MOST_ON_STACK`."""
    from torch._inductor.codegen import common, cpp_wrapper_cpu_array_ref

    common.init_backend_registration()
    writing: Any = common.device_codegens["cpu"]
    limits: Any = cpp_wrapper_cpu_array_ref
    before = writing.cpp_wrapper_codegen, limits.MAX_STACK_ALLOCATION_SIZE
    writing.cpp_wrapper_codegen = _aligned(limits.CppWrapperCpuArrayRef)
    limits.MAX_STACK_ALLOCATION_SIZE = MOST_ON_STACK
    try:
        yield
    finally:
        writing.cpp_wrapper_codegen, limits.MAX_STACK_ALLOCATION_SIZE = before


def _aligned(writer: Any) -> Any:
    """Who writes so that what lies on the stack begins with a line of memory. Else it may begin
    anywhere, each vector of 512 bits then lies in two lines, and products of eight tokens by rows
    of 16 bits, which load one for each product, take half as long again."""

    class Aligned(writer):  # type: ignore[misc]
        def make_allocation(self, name: str, *others: Any, **more: Any) -> str:
            found: str = super().make_allocation(name, *others, **more)
            lines = self.wrapper_call._lines
            if f" {name}_storage[" in str(lines[-1]):
                lines[-1] = f"alignas({LINE}) {lines[-1]}"
            return found

        @staticmethod
        def create(*_: Any) -> Any:
            return Aligned()

    return Aligned


@contextmanager
def _quietly(scratch: str) -> Iterator[None]:
    """What torch compiles on the way lies in this folder; its advice is for others."""
    with _environment(INDUCTOR_CACHE, scratch), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    """torch is told some things no other way."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(name)
        else:
            os.environ[name] = before
