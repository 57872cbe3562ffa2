"""One bar for a whole run: its stages by share, the time left, and nothing where it is not wanted."""

import re
from importlib import import_module

import pytest

import liar
from liar.progress import Progress, progress_of
from liar.testing import tiny_batches, tiny_model

# `liar.selection.budget.latency` is the function.
timing = import_module("liar.selection.budget.latency")


def test_stages_take_their_share_whatever_was_counted():
    progress = Progress("prune", {"one": 3, "two": 1}, show=False)
    with progress.stage("one", steps=10) as advance:
        advance(5)
        assert progress.done == pytest.approx(1.5)
    assert progress.done == pytest.approx(3)
    with progress.stage("two", steps=2) as advance:
        advance(2)
        advance(2)
    assert progress.done == pytest.approx(4)


def test_a_run_inside_another_shares_its_bar(capsys):
    with progress_of(True, "outer", {"a": 1, "b": 1}) as outer, progress_of(outer, "inner", {"b": 1}) as inner:
        assert inner is outer
        with inner.stage("b", 1):
            pass
    shown = capsys.readouterr().err
    assert "outer: b" in shown
    assert "inner" not in shown


def shown_by(verb, capsys, **options):
    model = tiny_model("bert", max_position_embeddings=128)
    batches = tiny_batches(model)
    verb(model, batches, **options)
    return [line for line in re.split(r"[\r\n]+", capsys.readouterr().err) if line.strip()]


@pytest.mark.parametrize("budget", ["params", "latency"])
def test_pruning_shows_one_bar_with_the_time_left(budget, capsys, monkeypatch):
    monkeypatch.setattr(timing, "ROUNDS", 3)
    monkeypatch.setattr(timing, "SECONDS", 0.001)
    # Hardly any time can be saved in a model so small.
    lines = shown_by(liar.prune, capsys, keep=1.0 if budget == "latency" else 0.5, budget=budget)
    shares = [int(re.search(r"(\d+)%", line).group(1)) for line in lines]
    assert all(re.match(r"prune(: (latency|sensitivity|elimination|reconstruct))?: +\d", line) for line in lines)
    assert shares == sorted(shares)
    assert (shares[0], shares[-1]) == (0, 100)
    assert re.search(r"\d\d:\d\d<\d\d:\d\d", lines[-1])


@pytest.mark.parametrize("verb", ["prune", "select", "collect", "moments"])
def test_no_bar_where_none_is_wanted(verb, capsys):
    options = {"keep": 0.5} if verb in ("prune", "select") else {}
    assert not shown_by(getattr(liar, verb), capsys, progress=False, **options)


def test_a_bar_that_is_interrupted_is_closed(capsys):
    def interrupted():
        with progress_of(True, "prune", {"one": 1}) as progress, progress.stage("one", 2) as advance:
            advance(1)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert capsys.readouterr().err.endswith("\n")
