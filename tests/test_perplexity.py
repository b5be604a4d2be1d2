"""Perplexity: windows as llama.cpp's tool cuts them, numbers as it finds them."""

import json
import math
import os
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

import refollama
from refollama.cli import cli
from refollama.errors import BadRequest, RefollamaError
from refollama.perplexity import Cut, Estimate, perplexity, windows
from refollama.text import tokenizer_from
from refollama.weights.gguf import Typed
from tests import oracle_llama
from tests.tiny import tokenizer, write_model

ROOT = Path(__file__).parent.parent
GOLDEN = json.loads((Path(__file__).parent / "golden" / "perplexity.json").read_text())
WAYS = [pytest.param(way, id=f"{way['num_ctx']}-{way.get('stride', 0)}") for way in GOLDEN["ways"]]
TEXT = "the rest is on the sand and then it is in the water near a tree " * 3
VOCABULARY = {
    key: value.value if isinstance(value, Typed) else value for key, value in tokenizer().items()
}
WORDS = tokenizer_from(VOCABULARY)


@pytest.fixture
def llm(tiny):
    with refollama.load(tiny) as model:
        yield model


# ── the numbers ───────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("way", WAYS)
def test_a_real_model_is_as_surprised_as_in_llama_cpp(oracles, way):
    """Window by window: what it was surprised by was recorded once."""
    llm = refollama.load(oracles / "stories260K.gguf")
    assert llm.tokenizer.encode(GOLDEN["text"], bos=True) == GOLDEN["ids"]
    found = list(perplexity(llm, GOLDEN["text"], way["num_ctx"], stride=way.get("stride", 0)))
    means = np.array([float(-window.scores.mean()) for window in found])
    np.testing.assert_allclose(means, way["windows"], atol=1e-4)
    assert found[-1].so_far.perplexity == pytest.approx(way["perplexity"], rel=1e-4)


def test_the_scored_half_is_what_a_slow_forward_foretells(llm, tiny):
    ids = llm.tokenizer.encode(TEXT, bos=True)
    found = list(perplexity(llm, TEXT, 32))
    surprises = []
    for start in range(0, len(ids) - 31, 32):
        window = [1, *ids[start + 1 : start + 32]]
        logits = torch.tensor(oracle_llama.from_file(tiny, np.array(window)))
        likely = logits.log_softmax(-1)[torch.arange(31), window[1:]]
        surprises.append(-likely[16:])
    every = torch.cat(surprises)
    assert len(found) == len(surprises) > 2 and found[-1].so_far.tokens == len(every)
    assert found[-1].so_far.perplexity == pytest.approx(float(every.mean().exp()), rel=1e-5)
    error = float(every.std()) / math.sqrt(len(every))
    assert found[-1].so_far.error == pytest.approx(error, rel=1e-4)


def test_what_is_known_grows_with_each_window(llm):
    found = list(perplexity(llm, TEXT, 16))
    for number, window in enumerate(found, 1):
        every = torch.cat([one.scores for one in found[:number]]).double()
        assert (window.number, window.of) == (number, len(found))
        assert window.so_far.loss == pytest.approx(-float(every.mean()))
    some = list(perplexity(llm, TEXT, 16, chunks=2))
    assert [one.of for one in some] == [2, 2] and some[-1].so_far == found[1].so_far


def test_a_model_that_knows_nothing_is_lost_among_all_tokens(llm):
    llm.net.output.register_forward_hook(lambda module, args, out: torch.zeros_like(out))
    *_, last = perplexity(llm, TEXT, 16)
    assert last.so_far.perplexity == pytest.approx(llm.net.n_vocab, rel=1e-5)
    assert last.so_far.error == pytest.approx(0, abs=1e-3)


def test_one_token_has_no_error_and_a_hopeless_model_no_end():
    assert Estimate().plus(torch.tensor([-2.0])).error == 0
    assert Estimate().plus(torch.tensor([-1e4])).perplexity == math.inf


# ── the windows ───────────────────────────────────────────────────────────────────────────────


@given(st.integers(4, 40), st.integers(0, 40), st.integers(0, 200))
def test_windows_are_those_of_the_tool(num_ctx, stride, more):
    """By the rule that is told of it, counted with other sums: how many, where, how long."""
    stride = min(stride, num_ctx)
    length = num_ctx + stride // 2
    ids = list(range(10, 10 + 2 * length + more))
    scored = stride or length - length // 2 - 1
    cut = Cut.checked(num_ctx, stride, 60)
    found = windows(WORDS, ids, cut, fewest=2 * length)
    expected = -(-(len(ids) - length) // stride) if stride else len(ids) // length
    assert len(found) == expected and cut.scored == scored
    for number, window in enumerate(found):
        start = 10 + number * (stride or num_ctx)
        assert window == [1, *range(start + 1, start + length)]
    if stride:  # no token is scored twice, none between two is left out
        ends = [window[-1] for window in found]
        assert all(b - a == scored for a, b in pairwise(ends))


def test_a_model_that_wants_no_bos_gets_none():
    words = tokenizer_from(VOCABULARY | {"tokenizer.ggml.add_bos_token": False})
    (window,) = windows(words, range(10, 18), Cut.checked(8, 0, 60), fewest=8)
    assert window == list(range(10, 18))


@pytest.mark.parametrize(
    ("stride", "most", "length"), [(0, 4096, 512), (0, 320, 320), (32, 4096, 528), (32, 320, 320)]
)
def test_windows_have_512_tokens_or_all_that_the_model_reads(stride, most, length):
    assert Cut.checked(None, stride, most).length == length


@given(st.integers(5, 2000))
def test_the_widest_stride_that_is_told_is_the_widest(most):
    with pytest.raises(BadRequest) as raised:
        Cut.checked(None, 10**6, most)
    widest = int(str(raised.value).split("… ")[1].split(",")[0])
    assert Cut.checked(None, widest, most).length <= most
    with pytest.raises(BadRequest, match=f"stride must be 0 … {widest},.* not {widest + 1}"):
        Cut.checked(None, widest + 1, most)


# ── what cannot be measured ───────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("text", "settings", "sentence"),
    [
        ("", {"num_ctx": 16}, r"too short: it has 1 tokens, and windows of 16 need 32"),
        (list(range(31)), {"num_ctx": 16}, "it has 31 tokens"),
        (TEXT, {"num_ctx": 3}, r"num_ctx must be 4 … 128.* not 3"),
        (TEXT, {"num_ctx": 129}, r"num_ctx must be 4 … 128.* not 129"),
        (TEXT, {"num_ctx": 120, "stride": 20}, r"num_ctx must be 4 … 118.* not 120"),
        (TEXT, {"num_ctx": 16, "stride": 17}, r"stride must be 0 … 16.* not 17"),
        (TEXT, {"num_ctx": 16, "stride": -1}, r"stride must be 0 … 16.* not -1"),
        (TEXT, {"num_ctx": -5}, r"num_ctx must be 4 … 128.* not -5"),
        (TEXT, {"num_ctx": 0, "stride": 8}, r"num_ctx must be 4 … 128.* not 0"),
        (TEXT, {"num_ctx": 4000, "stride": 2000}, r"num_ctx must be 4 … 128.* not 4000"),
        (TEXT, {"stride": 2000}, r"stride must be 0 … 85,.* not 2000"),
        (TEXT, {"stride": -1}, r"stride must be 0 … 85,.* not -1"),
    ],
)
def test_what_is_wrong_is_said_at_once(llm, text, settings, sentence):
    with pytest.raises(BadRequest, match=sentence):
        perplexity(llm, text, **settings)


def test_ids_outside_the_vocabulary_are_refused(llm):
    with pytest.raises(BadRequest, match="vocabulary"):
        list(perplexity(llm, [10**6] * 40, 16))


def test_weights_that_lead_out_of_the_numbers_are_told(llm):
    llm.net.output.register_forward_hook(lambda module, args, out: out * math.nan)
    with pytest.raises(RefollamaError, match="window 1 of .* NaN"):
        list(perplexity(llm, TEXT, 16))


# ── the command ───────────────────────────────────────────────────────────────────────────────


def command(*arguments, piped=""):
    return CliRunner().invoke(cli, ["perplexity", *map(str, arguments)], input=piped)


def test_the_command_says_what_python_says(llm, tiny, tmp_path):
    file = tmp_path / "text"
    file.write_bytes(TEXT.encode() + b"\n")  # the line feed at the end is no part of it
    *_, last = perplexity(llm, TEXT, 32)
    told = f"{last.so_far.perplexity:.4f} ± {last.so_far.plus_minus:.5f}"
    whole = f"Perplexity: {told} ({last.so_far.tokens} tokens in {last.of} windows)\n"
    shown = command(tiny, file, "--num-ctx", 32)
    assert (shown.exit_code, shown.stdout, shown.stderr) == (0, whole, "reading\n")
    lines = command(tiny, "-", "--num-ctx", 32, "--verbose", piped=TEXT).stdout.splitlines()
    assert len(lines) == last.of + 1 and f"{lines[-1]}\n" == whole
    assert lines[-2] == f"[{last.of}/{last.of}] {told}"
    strided = command(tiny, file, "--num-ctx", 32, "--stride", 8, "--chunks", 3).stdout
    assert strided.endswith("(24 tokens in 3 windows)\n")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "text: No such file or directory"),
        (b"the sand \xff", "text is not UTF-8 text: see byte 9"),
        (b"the sand", "the text is too short: it has "),
    ],
)
def test_a_text_that_is_none_is_one_sentence(tiny, tmp_path, content, sentence):
    file = tmp_path / "text"
    if content is not None:
        file.write_bytes(content)
    shown = command(tiny, file, "--num-ctx", 16)
    assert shown.exit_code == 1 and shown.stderr.startswith("Error: ")
    assert sentence in shown.stderr and len(shown.stderr.splitlines()) == 1


def test_its_help_page_teaches():
    page = command("--help")
    assert page.exit_code == 0 and "Examples:" in page.stdout
    assert "\n  perplexity " in CliRunner().invoke(cli, ["--help"]).stdout


@pytest.mark.slow
def test_ctrl_c_ends_it_cleanly(tmp_path):
    """Between two windows of a long text, as a shell does it."""
    model = write_model(tmp_path / "tiny.gguf", block_count=8)
    (tmp_path / "text").write_text(TEXT * 300)
    call = [sys.executable, "-m", "refollama", "perplexity", str(model), str(tmp_path / "text")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [*call, "--num-ctx", "32", "-v"],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline().startswith("[1/")
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in told and "Perplexity" not in told
