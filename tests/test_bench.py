"""What is timed is what was asked for; the table and its JSON say the same."""

import json

import pytest
import torch
from click.testing import CliRunner

import refollama
from refollama.bench import Speed, bench
from refollama.cli import cli
from refollama.errors import BadRequest
from tests.tiny import write_model


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("bench") / "tiny.gguf", type="Q8_0")


@pytest.fixture
def llm(path):
    model = refollama.load(path)
    yield model
    model.close()


def test_each_test_passes_its_tokens_through_the_net(llm, monkeypatch):
    """After those of the depth, in one step or in steps of one."""
    seen = []
    forward = type(llm.net).forward

    def watched(net, tokens, positions, cache):
        seen.append((tokens.shape[1], int(positions[0, 0])))
        return forward(net, tokens, positions, cache)

    monkeypatch.setattr(type(llm.net), "forward", watched)
    read, write = bench(llm, 8, 3, depth=4, repeat=1)
    assert (read.name, write.name) == ("read 8 after 4", "write 3 after 4")
    assert seen == [(4, 0), (8, 4)] * 2 + [(4, 0), (1, 4), (1, 5), (1, 6)] * 2


def test_rates_are_tokens_over_seconds(llm, monkeypatch):
    clock = iter(range(0, 1000, 2))
    monkeypatch.setattr("refollama.bench.perf_counter", lambda: next(clock))
    (read,) = bench(llm, 8, 0, repeat=3)
    assert read.rates == (4.0,) * 3


def test_the_first_of_each_is_not_counted_and_progress_is_told(llm):
    told = []
    read, write = bench(llm, 4, 2, repeat=2, told=lambda done, total: told.append((done, total)))
    assert len(read.rates) == len(write.rates) == 2
    assert told == [(n, 6) for n in range(1, 7)]


def test_median_and_spread():
    assert Speed("read 1", (3.0, 1.0, 9.0)).median == 3.0
    assert Speed("read 1", (3.0, 1.0, 9.0)).spread == (1.0, 9.0)


@pytest.mark.parametrize(("counts", "more"), [((10**6, 1), {}), ((1, 1), {"depth": 10**6})])
def test_what_does_not_fit_is_refused(llm, counts, more):
    with pytest.raises(BadRequest, match="looks back on"):
        bench(llm, *counts, **more)


@pytest.mark.parametrize(("counts", "depth"), [((-1, 1), 0), ((1, -1), 0), ((1, 1), -1)])
def test_less_than_nothing_is_refused(llm, counts, depth):
    with pytest.raises(BadRequest, match="from 0 on"):
        bench(llm, *counts, depth=depth)


@pytest.mark.parametrize(("counts", "repeat"), [((0, 0), 1), ((1, 1), 0)])
def test_nothing_is_no_measurement(llm, counts, repeat):
    with pytest.raises(BadRequest, match="nothing to measure"):
        bench(llm, *counts, repeat=repeat)


@pytest.fixture
def run(path):
    threads = torch.get_num_threads()
    yield lambda *args: CliRunner().invoke(cli, ["bench", str(path), *args])
    torch.set_num_threads(threads)


def test_the_command_shows_a_table(run):
    found = run("-p", "6", "-n", "2", "-r", "2")
    assert found.exit_code == 0, found.output
    lines = [line.split("\t") for line in found.stdout.splitlines()]
    assert [cells[0].strip() for cells in lines[:3]] == ["TEST", "read 6", "write 2"]
    for _, median, least, most in lines[1:3]:
        assert 0 < float(least) <= float(median) <= float(most)
    assert "threads, torch" in lines[-1][0]


def test_the_command_gives_json_and_takes_what_fits(run, path):
    found = run("--json", "-r", "1", "--plain", "--threads", "1")
    assert found.exit_code == 0, found.output
    told = json.loads(found.stdout)
    n_ctx = refollama.load(path).net.n_ctx
    assert (told["fast"], told["threads"]) == (False, 1)
    counts = f"read {min(512, n_ctx)}", f"write {min(128, n_ctx)}"
    assert tuple(told["tokens_per_second"]) == counts


def test_an_error_is_one_sentence(run):
    found = run("-p", "1000000")
    assert found.exit_code == 1
    assert found.stderr.splitlines()[-1].startswith("Error: read 1000000 after 0 does not fit")
