"""The README is true: its Python runs, its commands exist."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_the_python_example_gives_what_its_comments_say(oracles, tmp_path, capsys):
    (code,) = [block for block in blocks("python") if "stories260K.gguf" in block]
    code = code.replace('"stories260K.gguf"', f'"{oracles / "stories260K.gguf"}"')
    names: dict[str, object] = {}
    exec(code, names)
    assert "there was a little girl" in capsys.readouterr().out
    checked = 0
    for line in re.findall(r"^(?:\w+ = )?([a-z][^=\n]*?) +# ([^:\n]+)", code, re.MULTILINE):
        expression, said = line
        if said[0] in "[('":
            assert eval(expression, names) == eval(said), line
            checked += 1
    assert names["seen"], "the hook saw nothing"
    assert checked >= 4


def test_every_command_that_is_named_exists():
    for command in set(re.findall(r"refollama ([a-z]+)", "".join(blocks("console")))):
        help_ = [sys.executable, "-m", "refollama", command, "--help"]
        assert subprocess.run(help_, capture_output=True, cwd=ROOT).returncode == 0, command


def test_every_make_target_that_is_named_exists():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"(?:\$|`)\s?make ([a-z-]+)", README)) <= targets


@pytest.mark.parametrize("name", ["weights", "Client", "Options", "load", "load_tokenizer"])
def test_public_names_are_there_at_once(name):
    code = f"import refollama, sys; refollama.{name}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_other_names_are_not():
    import refollama

    with pytest.raises(AttributeError, match="nonsense"):
        _ = refollama.nonsense
