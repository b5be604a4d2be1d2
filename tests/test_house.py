"""The laws of the house: who may import whom, what stays free of torch, what the README draws."""

import ast
import functools
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "refollama"

# Each floor may import the floors below it. Rooms of one floor do not know each other.
FLOORS = [
    {"errors", "options", "messages", "host", "paths", "version", "keep_alive"},
    {"weights", "text", "sampling", "kvcache", "store", "pictures"},
    {"models", "engine", "convert"},
    {
        "dialogue",
        "telling",
        "several",
        "sight",
        "watched",
        "fast",
        "trace",
        "quantize",
        "export",
        "cachekind",
    },
    {"loaded", "create", "show", "vocabularies", "fable"},
    {"shelf", "bench", "perplexity", "imatrix"},
    {"service"},
    {"server"},
    {"client", "terminal", "private_server", "promptline", "overview"}
    | {"upload", "transfer", "reach", "talk", "completion", "workshop", "cli"},
]
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}

NEIGHBOURS = {  # of one floor, yet: errors are everybody's, the command line has many rooms
    "options": {"errors"},
    "convert": {"models"},  # whose configuration it checks, which needs no torch
    "messages": {"errors"},
    "host": {"errors"},
    "keep_alive": {"errors"},
    "paths": {"errors"},
    "fable": {"create"},  # what comes with the package is made in the store like any other model
    "loaded": {"fable"},
    "imatrix": {"perplexity"},  # whose windows it reads
    "cli": {"client", "terminal", "promptline", "overview", "transfer", "reach", "talk"}
    | {"private_server", "completion", "workshop"},
    "workshop": {"terminal", "completion"},
    "completion": {"reach"},
    "reach": {"client", "terminal", "private_server"},
    "upload": {"client", "terminal"},
    "transfer": {"client", "terminal", "upload"},
    "talk": {"client", "terminal", "promptline", "overview"},
    "overview": {"terminal"},
    "client": {"terminal"},
    "private_server": {"client"},
}
CLIENT_SIDE = FLOORS[-1]
FOR_EVERYBODY = FLOORS[0]


def modules():
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


@functools.cache
def imports(path, *, local=True):
    """Names of modules that a file imports; without those inside functions if not `local`."""
    tree = ast.parse(path.read_text())
    inside = {
        node
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef)
        for node in ast.walk(function)
    }
    found = []
    for node in ast.walk(tree):
        if not local and node in inside:
            continue
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.append(node.module)
            found += (f"{node.module}.{alias.name}" for alias in node.names)
    return found


def rooms_used(path):
    for name in imports(path):
        if name.startswith("refollama.") and (room := name.split(".")[1]) in FLOOR:
            yield room


@pytest.mark.parametrize(("module", "path"), list(modules()), ids=str)
def test_rooms_import_only_what_lies_below(module, path):
    room = module.split(".")[1] if "." in module else None
    if room in (None, "__main__"):
        return
    assert room in FLOOR, f"{room} has no floor: add it to the house's plan"
    for other in set(rooms_used(path)) - {room}:
        below = FLOOR[other] < FLOOR[room]
        assert below or other in NEIGHBOURS.get(room, ()), f"{module} imports {other}"


@pytest.mark.parametrize("room", sorted(CLIENT_SIDE - {"workshop"}))  # that needs no server
def test_the_command_line_knows_the_server_by_http_only(room):
    """Inside functions, `serve` may start the server and `list` may read the store."""
    used = set()
    for name in imports(PACKAGE / f"{room}.py", local=False):
        if name.startswith("refollama."):
            used.add(name.split(".")[1])
    assert used <= FOR_EVERYBODY | CLIENT_SIDE | {"store"}, used


def test_only_load_knows_both_weights_and_modules():
    users = {
        path.name
        for path in (PACKAGE / "models").glob("*.py")
        if "weights" in set(rooms_used(path))
    }
    assert users == {"load.py"}


@pytest.mark.parametrize(
    ("library", "homes"),
    [
        ("flask", {"server"}),
        ("waitress", {"server"}),
        ("httpx", {"client", "store"}),
        ("cryptography", {"store"}),
        ("sentencepiece", {"text", "fable"}),
        ("tokenizers", {"text", "convert"}),
        ("llguidance", {"sampling"}),
        ("jinja2", {"text"}),
        ("click", {"cli", "completion", "workshop"}),
    ],
)
def test_libraries_have_one_home(library, homes):
    users = {
        module.split(".")[1]
        for module, path in modules()
        if any(name.split(".")[0] == library for name in imports(path))
    }
    assert users == homes


@pytest.mark.parametrize(
    "module",
    [
        "refollama",
        "refollama.cli",
        "refollama.client",
        "refollama.create",
        "refollama.dialogue",
        "refollama.fable.bundled",
        "refollama.messages",
        "refollama.options",
        "refollama.pictures",
        "refollama.store",
        "refollama.text",
        "refollama.text.prompt",
        "refollama.text.stops",
        "refollama.weights.gguf",
        "refollama.weights.mixes",
    ],
)
def test_torch_is_not_imported(module):
    code = f"import {module}, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_the_readme_draws_the_house_as_it_is():
    """Every file that the map names exists, and every file of the package is on the map."""
    text = (ROOT / "README.md").read_text()
    drawn = text.split("<!-- map -->")[1].split("<!-- /map -->")[0]
    listed, folders = set(), {-1: ""}
    for line in drawn.splitlines():
        if found := re.match(r"( *)([a-z_]+)(/|\.py)( |$)", line):
            depth, name = len(found[1]), found[2] + found[3]
            folders = {d: folder for d, folder in folders.items() if d < depth}
            path = folders[max(folders)] + name
            folders[depth] = path
            listed |= {path.removeprefix("refollama/")} if name.endswith(".py") else set()
    existing = {
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*.py")
        if path.name not in ("__init__.py", "__main__.py")
    }
    assert listed == existing


def test_no_function_is_long_and_no_page_is_endless():
    """Limits that leave room: the house rule is ten lines for a function, not sixty."""
    for _, path in modules():
        tree = ast.parse(path.read_text())
        assert len(path.read_text().splitlines()) <= 700, path
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and node.end_lineno is not None:
                assert node.end_lineno - node.lineno < 60, (path, node.name)
