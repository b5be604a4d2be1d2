"""A name is read, shown and turned into a path; nothing else ever becomes one."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from refollama.errors import BadName
from refollama.store.name import Name

PART = st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,20}", fullmatch=True).filter(
    lambda part: ".." not in part
)
HOST = st.builds(lambda host, port: host + port, PART, st.sampled_from(["", ":80", ":65535"]))
NAMES = st.builds(Name, HOST, PART, PART, PART)


@pytest.mark.parametrize(
    ("text", "full", "short"),
    [
        ("llama2", "registry.ollama.ai/library/llama2:latest", "llama2:latest"),
        ("llama2:7b", "registry.ollama.ai/library/llama2:7b", "llama2:7b"),
        ("me/x:7b", "registry.ollama.ai/me/x:7b", "me/x:7b"),
        ("localhost:5000/ns/m", "localhost:5000/ns/m:latest", "localhost:5000/ns/m:latest"),
        ("http://h/ns/m:t", "h/ns/m:t", "h/ns/m:t"),
        ("https://registry.ollama.ai/library/m:t", "registry.ollama.ai/library/m:t", "m:t"),
        ("Me/Llama2.Q4_K-M", "registry.ollama.ai/Me/Llama2.Q4_K-M:latest", None),
    ],
)
def test_the_table_of_the_specification(text, full, short):
    name = Name.parse(text)
    assert name.full == full
    assert short is None or str(name) == short


@given(NAMES)
def test_what_is_printed_is_read_back(name):
    assert Name.parse(str(name)) == name
    assert Name.parse(name.full) == name
    assert Name.parse(f"http://{name.full}") == name


@given(NAMES)
def test_a_path_has_four_plain_parts(name):
    assert name.path.parts == (name.host, name.namespace, name.model, name.tag)
    assert not name.path.is_absolute()


@given(NAMES)
def test_case_does_not_distinguish(name):
    assert name.same_as(Name.parse(name.full.upper()))
    assert not name.same_as(Name(name.host, name.namespace, name.model + "x", name.tag))


@pytest.mark.parametrize(
    "text",
    [
        *("", "/", ":", "a:", ":t", "a/", "/a", "a//b", "a/b/c/d", "..", "../a", "a/../b"),
        *("a..b", ".a", "-a", "a:b:c", "a:../x", "a b", "a\n", "a\0b", "a\\b", "ä", "a:t\n"),
        *("ftp://h/n/m", "://a", "h:x/n/m", "h:/n/m", "h:1:2/n/m", "../../etc/passwd", "~/a"),
        *("a" * 81, "m:" + "t" * 81, "h" * 351 + "/n/m", "n" * 81 + "/m", "\ud800", "٣", "a/%2e"),
    ],
)
def test_everything_else_is_refused(text):
    with pytest.raises(BadName) as problem:
        Name.parse(text)
    assert problem.value.status == 400
    assert len(str(problem.value)) < 400
    assert str(problem.value).isprintable()


@given(st.text(max_size=40))
def test_any_text_is_a_safe_name_or_refused(text):
    try:
        name = Name.parse(text)
    except BadName:
        return
    assert all(part not in ("", ".", "..") and "/" not in part for part in name.path.parts)
    assert name.full.isascii()


def test_the_longest_parts_are_allowed():
    name = Name("h" * 350, "n" * 80, "m" * 80, "t" * 80)
    assert Name.parse(str(name)) == name


def test_a_name_cannot_be_made_around_the_grammar():
    with pytest.raises(BadName):
        Name("registry.ollama.ai", "library", "..", "latest")
