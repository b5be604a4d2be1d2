"""Modelfiles are cut as Ollama cut them in December 2023, but for the last newline."""

import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from refollama.errors import ModelfileError
from refollama.store import modelfile as module
from refollama.store.modelfile import Command, Modelfile, parse


def commands(text):
    """Of a Modelfile to which FROM has been added in front."""
    return [(command.name, *command.args) for command in parse("FROM x\n" + text).commands[1:]]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        # the table of the specification; the first three rows with the mended last newline
        ('SYSTEM "hi"', [("system", "hi")]),
        ('SYSTEM """hi"""', [("system", "hi")]),
        ('SYSTEM """a\nb"""', [("system", "a\nb")]),
        ('SYSTEM You are "Mario" from games\n', [("system", "You are Mario")]),
        (
            'SYSTEM He is 5\'10" tall\nPARAMETER stop "A"\n',
            [("system", "He is 5'10 tall\nPARAMETER stop ")],
        ),
        ("SYSTEM He is 5'10\" tall\n", [("system", "He is 5'10\" tall")]),
        ('# it is 6" wide\nSYSTEM "s"\n', []),
        ('SYSTEM """never closed\nmore\n', [("system", "")]),
        ('PARAMETER stop " a "\n', [("parameter", "stop", "a")]),
        ('PARAMETER stop "\\n"\n', [("parameter", "stop", "\\n")]),
        ("  SYSTEM x\n", []),
        ("SYSTEM\tx\n", []),
        ('SYSTEM   """a"""\n', [("system", "  a")]),
        ('SYSTEM"""a"""\n', []),
        ('TEMPLATE """a""" trailing\n', [("template", "a")]),
        ('ADAPTER "x y"\n', [("adapter", "x y")]),
        ('SYSTEM ""\n', [("system", "")]),
        # and what follows from the rules
        ('SYSTEM """\na"""\n', [("system", "\na")]),
        ('SYSTEM """say "x" now"""\n', [("system", 'say "x" now')]),
        ('SYSTEM """a"""\nLICENSE b\n', [("system", "a"), ("license", "b")]),
        ("SYSTEM a\r\nLICENSE b\r\n", [("system", "a"), ("license", "b")]),
        ('SYSTEM """a\r\nb"""\r\nLICENSE b', [("system", "a\r\nb"), ("license", "b")]),
        ("sYsTeM  a \n", [("system", " a ")]),
        ("ADAPTER  a \n", [("adapter", "a")]),
        ("PARAMETER  num_ctx   4096 \n", [("parameter", "num_ctx", "4096")]),
        ("SYSTEM\n", [("system", "")]),
        ("#c\n# c\n#\n\n \n", []),
        # what three quotes protect, and which of many quotes close
        ('PARAMETER stop """ a """\n', [("parameter", "stop", " a ")]),
        ('PARAMETER  stop  """\n"""', [("parameter", "stop", "\n")]),
        ('PARAMETER stop """\na"""\nSYSTEM b', [("parameter", "stop", "\na"), ("system", "b")]),
        ('PARAMETER """stop a"""\n', [("parameter", "stop", "a")]),
        ('SYSTEM """say "x""""\nLICENSE b', [("system", 'say "x"'), ("license", "b")]),
        ('SYSTEM """"""""\n', [("system", '""')]),
        ('SYSTEM """"x"""\n', [("system", '"x')]),
        ("MESSAGE user Hi there\n", [("message", "user", "Hi there")]),
        ('MESSAGE assistant """a\nb"""\n', [("message", "assistant", "a\nb")]),
    ],
)
def test_the_table_of_the_specification(text, expected):
    assert commands(text) == expected


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "no FROM line"),
        ("SYSTEM x", "no FROM line"),
        ("  FROM x", "no FROM line"),
        ("FROM\tx", "no FROM line"),
        ("# FROM x", "no FROM line"),
        ("\nFROM", "line 2: FROM needs an argument"),
        ("FROM  \n", "line 1: FROM needs an argument"),
        ('FROM ""', "line 1: FROM needs an argument"),
        ("FROM x\nADAPTER", "line 2: ADAPTER needs an argument"),
        ("FROM x\nPARAMETER", "line 2: PARAMETER needs a name and a value"),
        ("FROM x\n\nPARAMETER top_k", r"line 3: missing value for \[top_k\]"),
        ('FROM x\nPARAMETER stop ""', r"line 2: missing value for \[stop\]"),
        ('FROM x\nSYSTEM """\n\n"""\nPARAMETER bad 1', "line 5: unknown parameter 'bad'"),
        ("FROM x\nPARAMETER Top_k 1", "line 2: unknown parameter 'Top_k'"),
        ("FROM x\nPARAMETER model y", "line 2: unknown parameter 'model'"),
        ("FROM x\nPARAMETER top_k 1.5", "line 2: parameter 'top_k' must be an integer"),
        ("FROM x\nPARAMETER top_k 1\nPARAMETER top_k x", "line 3: parameter 'top_k' must be"),
        ("FROM x\nPARAMETER temperature nan", "line 2: parameter 'temperature' must be a number"),
        ("FROM x\nPARAMETER num_ctx -5", "line 2: option 'num_ctx' must be "),
        ("FROM x\nEMBED y", "line 2: EMBED is no longer supported"),
        ("FROM x\nPROMPT y", "line 2: PROMPT is no longer supported"),
        ("FROM x\nMESSAGE robot y", "line 2: message role must be one of"),
    ],
)
def test_errors_know_their_line(text, problem):
    with pytest.raises(ModelfileError, match=f"^Modelfile: {problem}"):
        parse(text)


def test_unknown_commands_are_told_with_name_and_line(caplog):
    with caplog.at_level(logging.WARNING):
        parse('FROM x\nSYSTEM """a\nb"""\nWHATEVER y\n')
    assert "line 4: unknown command 'WHATEVER' ignored" in caplog.text


def test_parameters_as_they_are_stored():
    text = (
        "FROM x\nPARAMETER temperature 1\nPARAMETER stop <|im_end|>\nPARAMETER num_ctx 4096\n"
        "PARAMETER stop b\nPARAMETER num_ctx 8192\nPARAMETER penalize_newline F\n"
    )
    parameters = parse(text).parameters()
    assert parameters == {
        "temperature": 1.0,
        "stop": ["<|im_end|>", "b"],
        "num_ctx": 4096,
        "penalize_newline": False,
    }
    assert isinstance(parameters["temperature"], float)


def test_the_mark_of_some_editors_is_no_letter():
    assert parse("\ufeffFROM x").commands == (Command("from", ("x",)),)


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=30) | st.text(
    '"\n\r #ab', max_size=12
)
SAYABLE = TEXT.filter(lambda text: '"""' not in text.rstrip('"'))
WORD = SAYABLE.map(str.strip).filter(bool)
COMMAND = st.one_of(
    st.builds(lambda text: Command("from", (text,)), WORD),
    st.builds(lambda text: Command("adapter", (text,)), WORD),
    st.builds(lambda text: Command("parameter", ("stop", text)), SAYABLE.filter(bool)),
    st.builds(lambda k: Command("parameter", ("top_k", str(k))), st.integers(-9, 9)),
    st.builds(
        lambda name, text: Command(name, (text,)),
        st.sampled_from(["template", "system", "license"]),
        SAYABLE,
    ),
    st.builds(
        lambda role, text: Command("message", (role, text)), st.sampled_from(module.ROLES), SAYABLE
    ),
)


@given(st.lists(COMMAND, max_size=6), WORD)
def test_what_is_printed_is_read_back(commands, what):
    modelfile = Modelfile((*commands, Command("from", (what,))))
    assert parse(module.print(modelfile)) == modelfile


@given(TEXT)
def test_what_was_read_is_printed_or_refused(text):
    try:
        modelfile = parse("FROM x\nSYSTEM " + text)
        printed = module.print(modelfile)
    except ModelfileError:
        return
    assert parse(printed) == modelfile


@pytest.mark.parametrize("text", ['a"""b', '""""b', 'a"""\n'])
def test_what_no_modelfile_can_say_is_refused(text):
    with pytest.raises(ModelfileError, match="cannot be written"):
        module.print(Modelfile((Command("from", ("x",)), Command("system", (text,)))))


def test_the_cutting_takes_time_in_proportion(caplog):
    caplog.set_level(logging.ERROR)  # each line is an unknown command
    parse("FROM x\n" + '"\n' * 200_000 + '"""\n' * 99_999)
