"""Options are checked once, by name, type and range."""

import dataclasses
import logging
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from refollama.errors import BadOption
from refollama.options import KNOWN, Options, from_text

NAMES = [f.name for f in dataclasses.fields(Options)]


def test_null_means_not_given():
    base = Options(temperature=0.3)
    assert base.updated(dict.fromkeys(NAMES)) == base


def test_the_later_record_wins_key_by_key():
    model = Options().updated({"temperature": 0.1, "stop": ["a", "b"], "top_k": 7})
    both = model.updated({"temperature": 0.2, "stop": ["c"]})
    assert (both.temperature, both.stop, both.top_k) == (0.2, ("c",), 7)


@pytest.mark.parametrize(
    ("name", "value", "kept"),
    [
        ("temperature", 1, 1.0),
        ("num_predict", 10.0, 10),
        ("num_predict", 10.7, 10),
        ("num_predict", -1.0, -1),
        ("stop", [], ()),
        ("f16_kv", False, False),
    ],
)
def test_values_that_fit(name, value, kept):
    found = getattr(Options().updated({name: value}), name)
    assert found == kept and type(found) is type(kept)


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("num_ctx", "x", "an integer"),
        ("num_ctx", True, "an integer"),
        ("num_ctx", math.nan, "an integer"),
        ("num_ctx", math.inf, "an integer"),
        ("num_ctx", 10**400, "between 0 and"),
        ("temperature", "hot", "a number"),
        ("temperature", False, "a number"),
        ("temperature", 10**400, "a number"),
        ("f16_kv", 1, "true or false"),
        ("stop", "bare", "a list of strings"),
        ("stop", ["a", 1], "a list of strings"),
        ("num_predict", -3, "between -2 and"),
        ("num_batch", 0, "between 1 and"),
        ("top_p", 1.5, "between 0 and 1"),
        ("repeat_penalty", 0, "between 0.001 and 1000"),
        ("presence_penalty", -1e39, "between -1000 and 1000"),
        ("stop", ["x" * 1001], "of 1000 characters"),
        ("stop", ["x"] * 65, "at most 64 strings"),
        ("seed", -2, "between -1 and"),
        ("mirostat", "two", "an integer"),
        ("mirostat", 3, "between 0 and 2"),
        ("num_gqa", "two", "an integer"),
        ("num_keep", -2, "between -1 and"),
        ("num_gpu", -2, "between -1 and"),
        ("main_gpu", -1, "between 0 and 1023"),
        ("num_thread", 1025, "between 0 and 1024"),
        ("rope_frequency_base", 1, "0, or between 1.001 and"),
        ("rope_frequency_scale", 0.0001, "0, or between 0.001 and 1000"),
        ("use_mmap", 1, "true or false"),
    ],
)
def test_values_that_do_not_fit_are_refused_with_name_and_range(name, value, allowed):
    with pytest.raises(BadOption) as caught:
        Options().updated({name: value})
    assert f"'{name}'" in str(caught.value) and allowed in str(caught.value)
    assert len(str(caught.value)) < 200


def test_unknown_names_are_warned_about_once_each_and_ignored(caplog):
    with caplog.at_level(logging.WARNING):
        assert Options().updated({"tempratur": 1}) == Options()
    assert [r.getMessage() for r in caplog.records] == ["unknown option 'tempratur' ignored"]


def test_an_option_without_effect_is_warned_about_with_the_reason(caplog):
    with caplog.at_level(logging.WARNING):
        assert Options().updated({"vocab_only": False, "logits_all": True}).logits_all
    (record,) = caplog.records
    assert "option 'logits_all' has no effect: an answer needs" in record.getMessage()


def test_strict_refuses_what_would_be_ignored():
    with pytest.raises(BadOption, match="tempratur"):
        Options().updated({"tempratur": 1}, strict=True)


@given(st.dictionaries(st.text(max_size=5) | st.sampled_from(sorted(KNOWN)), st.from_type(object)))
def test_whatever_is_sent_gives_options_or_bad_option(given):
    logging.disable(logging.WARNING)
    try:
        assert isinstance(Options().updated(given), Options)
    except BadOption as error:
        assert str(error)
    finally:
        logging.disable(logging.NOTSET)


@pytest.mark.parametrize(
    ("name", "texts", "value"),
    [
        ("temperature", ["0.7", "0.9"], 0.7),
        ("num_ctx", ["4096"], 4096),
        ("stop", ["a", "b"], ["a", "b"]),
        ("penalize_newline", ["False"], False),
        ("mirostat", ["2"], 2),
    ],
)
def test_modelfile_texts(name, texts, value):
    assert from_text(name, texts) == value


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("nonsense", "1"),
        ("Temperature", "1"),
        ("temperature", "warm"),
        ("temperature", "nan"),
        ("num_ctx", "1.5"),
        ("num_ctx", "-1"),
        ("penalize_newline", "perhaps"),
    ],
)
def test_modelfile_texts_that_do_not_fit(name, text):
    with pytest.raises(BadOption, match=name):
        from_text(name, [text])
