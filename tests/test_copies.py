"""Copies among calibration texts: in one fold, and counted once."""

import copy
from pydoc_data.topics import topics

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import liar
from liar.data import Calibration
from liar.data.copies import NEARLY, RUN, find_copies
from liar.testing import tiny_batches, tiny_model
from liar.verdicts import Verdict

MODEL = tiny_model("llama", head="causal-lm", max_position_embeddings=4096)


def ids_of(length, seed):
    return torch.randint(1, 96, (length,), generator=torch.Generator().manual_seed(seed))


def folds_of(rows):
    """The fold of every row's tokens, and the number of tokens that are no copies."""
    batches = [row[None] for row in rows]
    # As in a larger whole, so that every row is one piece.
    calibration = Calibration.of(batches, MODEL, total_tokens=10**6)
    return [fold.unique().tolist() for fold in calibration.folds], calibration.distinct_tokens


def naive(rows):
    """`find_copies` for whole rows, pair by pair: groups by the share of runs in common."""
    group = grouped(rows, lambda common, own, other, is_copy: is_copy or 2 * common > min(own, other))
    largest = max(sum(len(row) for row, leader in zip(rows, group, strict=True) if leader == each) for each in group)
    if 2 * largest > sum(map(len, rows)):
        group = grouped(rows, lambda common, own, other, _: common >= max(1, NEARLY * min(own, other)))
    return group


def grouped(rows, belong_together):
    runs = [{tuple(row[i : i + RUN]) for i in range(max(len(row) - RUN + 1, 1))} for row in rows]
    first, group = {}, list(range(len(rows)))
    for number, own in enumerate(runs):
        for run in own:
            first.setdefault(run, number)
    for number, own in enumerate(runs):
        common = [sum(first[run] == other for run in own) for other in range(number)]
        for other in range(number):
            is_copy = 2 * sum(common) > len(own) and common[other] == max(common) > 0
            if belong_together(common[other], len(own), len(runs[other]), is_copy):
                low, high = sorted((group[number], group[other]))
                group = [low if each == high else each for each in group]
    return group


@given(data=st.data())
def test_against_pairs_of_rows(data):
    """Rows are cut from three texts whose runs are all different, so that runs of a row do not repeat in it."""
    texts = [list(range(100 * number, 100 * number + 60)) for number in range(3)]
    rows = []
    for _ in range(data.draw(st.integers(1, 8))):
        text = data.draw(st.sampled_from(texts))
        start = data.draw(st.integers(0, 58))
        rows.append(text[start : start + data.draw(st.integers(1, 60))])
    sequence = np.repeat(np.arange(len(rows)), [len(row) for row in rows])
    leaders, new = find_copies(np.concatenate(rows), sequence, sequence)
    assert leaders.tolist() == naive(rows)
    assert all(0 <= count <= len(row) for count, row in zip(new, rows, strict=True))
    assert new[0] == len(rows[0])


def test_identical_sequences_are_in_one_fold_and_count_once():
    rows = [ids_of(20, seed) for seed in (0, 1, 0, 2, 0, 1, 3)]
    folds, distinct = folds_of(rows)
    assert folds[0] == folds[2] == folds[4]
    assert folds[1] == folds[5]
    assert distinct == 4 * 20
    assert len({fold for each in folds for fold in each}) > 1, "the others are still held out from each other"


@pytest.mark.parametrize("shift", [1, 3, 9])
def test_the_same_text_cut_elsewhere_is_a_copy(shift):
    text = ids_of(60, 0)
    others = [ids_of(40, seed) for seed in range(1, 4)]
    folds, distinct = folds_of([text[:40], *others, text[shift : shift + 40]])
    assert folds[0] == folds[4]
    assert [fold for each in folds[:4] for fold in each] == [0, 1, 2, 3]
    assert 160 <= distinct <= 160 + 2 * shift


def test_copies_by_way_of_others_belong_together():
    """Windows over one text: the first and the last have nothing in common, but each is nearly its neighbour."""
    text = ids_of(100, 0)
    others = [ids_of(40, seed) for seed in range(1, 13)]
    folds, _ = folds_of([*[text[start : start + 40] for start in range(0, 60, 10)], *others])
    assert all(fold == folds[0] for fold in folds[:6])
    assert len({fold for each in folds[6:] for fold in each}) == 4


@pytest.mark.parametrize("data", ["a prompt before every text", "windows over one text", "four letters"])
def test_what_all_texts_have_in_common_does_not_switch_the_hold_out_off(data):
    """More of them is the same than is not, and still each has something of its own."""
    prompt, text = ids_of(60, 0), ids_of(4000, 0)
    letters = torch.randint(1, 5, (40_000,), generator=torch.Generator().manual_seed(0))
    rows = {
        "a prompt before every text": [torch.cat([prompt, ids_of(30, seed)]) for seed in range(1, 101)],
        "windows over one text": [text[start : start + 128] for start in range(0, 3800, 48)],
        "four letters": list(letters.split(128)),
    }[data]
    folds, distinct = folds_of(rows)
    assert {fold for each in folds for fold in each} == {0, 1, 2, 3}
    sizes = torch.bincount(torch.tensor([fold for each in folds for fold in each]))
    assert sizes.min() > len(rows) / 8
    assert distinct > 0.2 * sum(map(len, rows))


def test_rulers_make_no_copies():
    """As under headings in plain text: many tokens of one kind in texts that are different."""
    ruler = torch.full((40,), 7)
    rows = [torch.cat([ids_of(20, seed), ruler, ids_of(6, 100 + seed)]) for seed in range(12)]
    folds, distinct = folds_of(rows)
    assert [fold for each in folds for fold in each] == [0, 1, 2, 3] * 3
    assert distinct > 0.98 * 12 * 66
    # Negative control: of such texts themselves, copies are found.
    folds, distinct = folds_of([*rows, rows[0]])
    assert folds[12] == folds[0]
    assert distinct <= 12 * 66


def test_a_packed_text_that_repeats_is_one_copy_after_another():
    joined = ids_of(30, 0).repeat(40)
    folds, distinct = folds_of(list(joined.split(100)))
    assert len({fold for each in folds for fold in each}) == 1
    assert distinct <= 60


def test_different_texts_with_a_common_beginning_are_no_copies():
    """Negative control: a prompt before every text, shorter than what follows."""
    prompt = ids_of(12, 0)
    rows = [torch.cat([prompt, ids_of(40, seed)]) for seed in range(1, 9)]
    folds, distinct = folds_of(rows)
    assert [fold for each in folds for fold in each] == [0, 1, 2, 3, 0, 1, 2, 3]
    assert distinct > 8 * 40


def test_real_paragraphs_are_no_copies(tokenizer):
    """Negative control: real English, with its idioms and repeated phrases."""
    words = {word: number for number, word in enumerate(sorted({w for t in topics.values() for w in t.split()}))}
    rows = [torch.tensor([words[word] for word in text.split()])[:256] for text in topics.values()]
    sequence = np.repeat(np.arange(len(rows)), [len(row) for row in rows])
    leaders, new = find_copies(torch.cat(rows).numpy(), sequence, sequence)
    assert (leaders != np.arange(len(rows))).mean() < 0.05
    assert new.sum() > 0.85 * len(sequence)


@pytest.mark.parametrize("kind", ["bert", "llama"])
@pytest.mark.parametrize("copies", [2, 200])
def test_copies_of_one_text_change_no_weight(kind, copies):
    """However many tokens they are: nothing else can be held out."""
    model = tiny_model(kind)
    ids = ids_of(24, 0).repeat(copies, 1)
    mask = liar.select(model, keep=0.5, criterion="magnitude")
    cut, repaired = copy.deepcopy(model), copy.deepcopy(model)
    liar.remove(cut, mask)
    report = liar.reconstruct(repaired, mask, [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}], progress=False)
    assert set(report.verdicts.values()) <= {Verdict.NOTHING_HELD_OUT, Verdict.TOO_FEW_TOKENS}
    for value, other in zip(cut.state_dict().values(), repaired.state_dict().values(), strict=True):
        assert torch.equal(value, other)


def test_copies_are_said(caplog):
    rows = [ids_of(20, 0)] * 5 + [ids_of(20, seed) for seed in range(1, 6)]
    folds_of(rows)
    assert "4 of 10 calibration sequences (long ones in pieces) repeat others" in caplog.text
    caplog.clear()
    folds_of([ids_of(20, seed) for seed in range(10)])
    assert not caplog.text


def test_embeddings_are_compared_as_well():
    embeds = torch.randn(3, 10, 32, generator=torch.Generator().manual_seed(0))
    calibration = Calibration.of([{"inputs_embeds": torch.cat([embeds, embeds[:1]])}], MODEL, total_tokens=10**6)
    folds = [fold.unique().tolist() for fold in calibration.folds[0].split(10)]
    assert folds == [[0], [1], [2], [0]]
    assert calibration.distinct_tokens == 30


def test_without_copies_nothing_is_said_and_all_count():
    model = tiny_model("bert")
    calibration = Calibration.of(tiny_batches(model, batches=3), model)
    assert calibration.distinct_tokens == calibration.tokens


def test_copies_do_not_make_enough_of_too_few_tokens():
    """Three texts of twenty tokens fill three folds, however often each comes."""
    model = tiny_model("llama")
    ids = torch.cat([ids_of(20, seed)[None].repeat(50, 1) for seed in range(3)])
    mask = liar.select(model, keep=0.5, criterion="magnitude")
    report = liar.reconstruct(model, mask, [ids], progress=False)
    assert report.tokens == 3000
    assert set(report.verdicts.values()) == {Verdict.TOO_FEW_TOKENS}
