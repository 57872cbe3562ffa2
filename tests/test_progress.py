"""One bar for a whole run: its stages by share, the time left, and nothing where it is not wanted."""

import re
from importlib import import_module

import pytest

import liar
from liar.progress import Progress, progress_of
from liar.testing import assert_same_state, model_state, tiny_batches, tiny_model

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


# Every public function that takes `progress`, with the stages of its run. Hardly any time can be saved in a model so small.
VERBS = {
    "select": (lambda m, b, **how: liar.select(m, b, keep=0.5, **how), ["sensitivity", "elimination"]),
    "gradients": (lambda m, b, **how: liar.select(m, b, keep=0.5, criterion="taylor", **how), ["gradients"]),
    "reconstruct": (lambda m, b, **how: liar.reconstruct(m, {"heads.0": [0]}, b, **how), ["reconstruct"]),
    "prune": (lambda m, b, **how: liar.prune(m, b, keep=0.5, **how), ["sensitivity", "elimination", "reconstruct"]),
    "timed": (lambda m, b, **how: liar.select(m, keep=1.0, budget="latency", criterion="random", **how), ["latency"]),
    "collect": (lambda m, b, **how: liar.collect(m, b, criteria=["wanda"], **how), ["moments"]),
    "moments": (lambda m, b, **how: liar.moments(m, b, **how), ["moments"]),
    "latency": (lambda m, b, **how: liar.latency(m, length=8, **how), ["latency"]),
}
verbs = pytest.mark.parametrize("verb", VERBS)


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(timing, "ROUNDS", 2)
    monkeypatch.setattr(timing, "SECONDS", 0.0001)
    model = tiny_model("bert", max_position_embeddings=128)
    return model, tiny_batches(model)


@verbs
def test_a_function_is_told_every_stage_from_0_to_1(verb, quick, capsys):
    run, stages = VERBS[verb]
    updates = []
    run(*quick, progress=updates.append)
    assert list(dict.fromkeys(update.stage for update in updates)) == stages
    name = verb if hasattr(liar, verb) else "select"
    assert {update.verb for update in updates} == {name}
    fractions = [update.fraction for update in updates]
    assert fractions == sorted(fractions)
    assert (fractions[0], fractions[-1]) == (0.0, 1.0)
    assert len(set(fractions)) > 4
    assert not capsys.readouterr().err


class Stop(RuntimeError):
    """As the library's own code may raise one, and turn it into an error with advice."""


@verbs
@pytest.mark.parametrize("at", [0.0, 0.6, 1.0])
def test_what_a_function_raises_stops_the_run_and_leaves_the_model(verb, at, quick):
    model, batches = quick
    model.train()
    run, _ = VERBS[verb]
    before, calls = model_state(model), []

    def stop(update):
        calls.append(update)
        if update.fraction >= at:
            raise Stop

    with pytest.raises(Stop):
        run(model, batches, progress=stop)
    assert sum(update.fraction >= at for update in calls) == 1
    assert_same_state(model, before)
    # It is free for the next run, too.
    run(model, batches, progress=False)


def test_a_stage_that_counts_too_much_does_not_go_back():
    updates = []
    progress = Progress("prune", {"one": 1, "two": 1}, show=updates.append)
    for stage in ("one", "two"):
        with progress.stage(stage, steps=2) as advance:
            advance(2)
            advance(2)
    assert [update.fraction for update in updates] == [0.0, 0.5, 0.5, 0.5, 0.5, 1.0, 1.0, 1.0]


def calibration_fractions(texts, tokenizer, **options):
    updates = []
    liar.calibration(texts, tokenizer, max_length=8, progress=updates.append, **options)
    assert {(update.verb, update.stage) for update in updates} == {("calibration", "tokenise")}
    return [update.fraction for update in updates]


def test_tokenising_counts_tokens_or_texts(tokenizer):
    texts = ["a text", "", "another one", "one"]
    # Two words and the two tokens around them each.
    assert calibration_fractions(texts, tokenizer, tokens=8) == [0.0, 0.5, 1.0, 1.0]
    assert calibration_fractions(texts, tokenizer) == [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]
    # Nobody knows how many a generator gives.
    assert calibration_fractions((text for text in texts), tokenizer) == [0.0, 0.0, 0.0, 0.0, 0.0, 1.0]


def test_tokenising_shows_a_bar_where_one_is_wanted(tokenizer, capsys):
    liar.calibration(["a text"], tokenizer, progress=False)
    assert not capsys.readouterr().err
    liar.calibration(["a text"], tokenizer)
    assert "calibration: tokenise: 100%" in capsys.readouterr().err


def test_tokenising_stops_at_what_a_function_raises(tokenizer):
    def stop(update):
        raise Stop

    with pytest.raises(Stop):
        liar.calibration(["a text"], tokenizer, progress=stop)
