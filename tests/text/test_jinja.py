"""Jinja templates run in a process of their own: what they may, and what they may not.

Judges: Hugging Face's documentation of chat templates; Python's own json and datetime.
"""

import json
import threading
import time
from datetime import date

import pytest

from refollama.errors import ServerBusy, TemplateError
from refollama.text import jinja
from refollama.text.jinja import JinjaTemplate


def render(source, **values):
    return JinjaTemplate(source).render(values)


def test_blocks_leave_no_lines_behind():
    """As the documentation says: the newline behind a block goes, and the spaces before it."""
    source = "{% for x in xs %}\n    {% if x %}\n{{ x }},\n    {% endif %}\n{% endfor %}\nend\n"
    assert render(source, xs=["a", "", "b"]) == "a,\nb,\nend"


@pytest.mark.parametrize("value", [{"b": "<é>", "a": [1, 2.5, None, True]}, "\udbff", [], "'&"])
def test_tojson_writes_json_as_it_is(value):
    assert render("{{ x | tojson }}", x=value) == json.dumps(value, ensure_ascii=False)
    wide = render("{{ x | tojson(indent=4) }}", x=value)
    assert wide == json.dumps(value, ensure_ascii=False, indent=4)


def test_what_model_authors_use_is_there():
    assert render("{{ strftime_now('%Y-%m-%d') }}") == date.today().isoformat()
    assert render(
        "{% for i in range(9) %}{% if i > 2 %}{% break %}{% endif %}{{ i }}{% endfor %}"
    ) == ("012")
    assert render("{% generation %}a{% endgeneration %}") == "a"
    assert render("{% set ns = namespace(n=1) %}{% set ns.n = 2 %}{{ ns.n }}") == "2"
    assert render("{{ 'a</think>b'.split('</think>')[-1] }}{{ none is none }}") == "bTrue"


def test_it_knows_which_variables_it_mentions():
    names = JinjaTemplate("{% if not tools is defined %}{% set tools = none %}{% endif %}").names
    assert "tools" in names and "messages" not in names


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("a\n{% if %}", "line 2"),
        ("a\n\n{{ x | nothing }}", "line 3"),
        ("{{ raise_exception('roles must alternate') }}", "template: roles must alternate"),
        ("{{ raise_exception(['a', 1]) }}", "template: ['a', 1]".replace("[", r"\[")),
        ("{{ raise_exception([missing]) }}", r"template: \[Undefined\]"),
        ("{{ raise_exception(missing) }}", "template: TemplateError"),
        ("{{ raise_exception(namespace(a=1)) }}", "template: <Namespace"),
        ("{{ 1 + 'a' }}", "TypeError"),
        ("{{ missing.field }}", "missing"),
        ("x" * 70_000, "longer than"),
    ],
)
def test_a_template_that_cannot_be_read_or_filled_in_is_an_error(source, problem):
    with pytest.raises(TemplateError, match=problem):
        render(source)


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ cycler.__init__.__globals__.os.system('id') }}",
        "{{ messages.append(1) }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
        "{{ ().__class__.__bases__[0].__subclasses__() }}",
        "{{ 'a' * 10**10 }}",
        "{{ 'a'.center(10**10) }}",
        "{% set x = 'a' * 1000 %}" + "{% set x = x ~ x %}" * 40,
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% for i in range(99999) %}{{ 'a' * 1000 }}{% endfor %}",
        "{{" + "(" * 300 + "1" + ")" * 300 + "}}",
    ],
)
def test_a_hostile_template_gets_nowhere(source):
    with pytest.raises(TemplateError) as refusal:
        render(source, messages=[])
    assert "\n" not in str(refusal.value) and "/refollama/" not in str(refusal.value)


def test_a_template_that_takes_too_long_is_stopped_and_the_next_one_works(monkeypatch):
    monkeypatch.setattr(jinja, "TIME_LIMIT", 0.5)
    loop = "{% for i in range(99999) %}"
    endless = JinjaTemplate(loop * 3 + "{% endfor %}" * 3)
    begin = time.monotonic()
    with pytest.raises(TemplateError, match="more than 0.5 seconds"):
        endless.render({})
    assert time.monotonic() - begin < 10
    monkeypatch.undo()
    assert render("{{ 1 + 1 }}") == "2"


LOOP = "{% for i in range(99999) %}"
ENDLESS = LOOP * 3 + "{% endfor %}" * 3


@pytest.fixture
def hurried(monkeypatch):
    """A worker of its own that has little time; it forgets at the end."""
    worker = jinja._Worker()
    monkeypatch.setattr(jinja, "_WORKER", worker)
    monkeypatch.setattr(jinja, "TIME_LIMIT", 0.5)
    yield worker
    worker.close()


def refusal(source):
    """What is said, and after how many seconds."""
    begin = time.monotonic()
    with pytest.raises(TemplateError) as found:
        JinjaTemplate(source).render({})
    return str(found.value), time.monotonic() - begin


def test_a_template_that_ran_out_of_time_is_refused_at_once_for_a_while(hurried, monkeypatch):
    JinjaTemplate("").render({})  # the process runs
    first, slow = refusal(ENDLESS)
    again, quick = refusal(ENDLESS)
    assert first == again and "more than 0.5 seconds" in first
    assert slow >= 0.5 and quick < 0.3
    assert render("{{ 1 + 1 }}") == "2"
    monkeypatch.setattr(time, "monotonic", lambda now=time.monotonic: now() + 61)
    assert refusal(ENDLESS)[1] >= 0.5  # it gets another try


def test_who_waits_with_a_template_that_is_refused_meanwhile_waits_no_longer(hurried):
    template = JinjaTemplate(ENDLESS)
    said = []

    def run():
        with pytest.raises(TemplateError) as found:
            template.render({})
        said.append(str(found.value))

    threads = [threading.Thread(target=run) for _ in range(8)]
    begin = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert time.monotonic() - begin < 3  # one after another: 4 seconds, and 7 new processes
    assert len(said) == 8 and len(set(said)) == 1


def test_only_so_many_refused_templates_are_remembered(hurried):
    sources = [str(n) for n in range(jinja.MOST_REFUSED + 5)]
    for source in sources:
        hurried._refuse(source)
    refused = [source for source in sources if source in hurried._refused]
    assert refused == sources[5:]


def test_who_waits_too_long_for_a_turn_is_told_so(hurried, monkeypatch):
    template = JinjaTemplate("{{ 1 }}")
    monkeypatch.setattr(jinja, "WAIT_LIMIT", 0.1)
    hurried._lock.acquire()
    threading.Timer(3, hurried._lock.release).start()  # else there might be no end
    with pytest.raises(ServerBusy, match="busy"):
        template.render({})
    monkeypatch.setattr(jinja, "WAIT_LIMIT", 20)
    assert template.render({}) == "1"


def test_many_threads_each_get_their_own_text():
    template = JinjaTemplate("{% for i in range(50) %}{{ x }}{% endfor %}")
    found = {}

    def run(x):
        found[x] = [template.render({"x": x}) for _ in range(20)]

    threads = [threading.Thread(target=run, args=(x,)) for x in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {x: [x * 50] * 20 for x in "abcd"}


def test_a_process_that_was_killed_is_replaced():
    template = JinjaTemplate("{{ 2 * x }}")
    assert template.render({"x": 2}) == "4"
    process = jinja._WORKER._process
    assert process is not None
    process.kill()
    process.wait()
    assert template.render({"x": 3}) == "6"
