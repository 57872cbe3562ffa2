"""Streamed sums against the whole X: any split, order and grouping of the rows, any dtype, NaN, memory."""

import pickle
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from cases import rows
from hypothesis import given
from hypothesis import strategies as st
from reference import centred, moments

from liar.errors import CalibrationError
from liar.statistics import ChannelMoments, Factor, Folds, Moments, TokenIndex
from liar.statistics.chunks import CHUNK, STRIP, add_gram, mirror
from liar.statistics.folds import HELD_OUT, PLENTY

KINDS = [Moments, Factor]
TOKENS = 3 * CHUNK + 123


def pair(tokens=500, channels=6, out=3, seed=0):
    return torch.from_numpy(rows(tokens, channels, seed=seed)), torch.from_numpy(rows(tokens, out, seed=seed + 99))


def streamed(kind, z, t, sizes):
    made = kind()
    for part_z, part_t in zip(z.split(sizes), t.split(sizes), strict=True):
        made.update(part_z, part_t)
    return made


def assert_normal(got, want, rtol=1e-10):
    """`want` is another Normal or a dict from the reference; compared by the scale of each quantity."""
    for name in ("gram", "cross", "mean_z", "mean_t", "target_energy"):
        expected = torch.as_tensor(want[name] if isinstance(want, dict) else getattr(want, name), dtype=torch.float64)
        scale = float(expected.abs().max()) + 1e-30
        torch.testing.assert_close(
            torch.as_tensor(getattr(got, name), dtype=torch.float64), expected, rtol=rtol, atol=rtol * scale
        )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("sizes", [TOKENS, 1000, CHUNK, 5000, 37])
def test_streamed_equals_whole(kind, affine, sizes):
    z, t = pair(TOKENS)
    normal = streamed(kind, z, t, sizes).normal(affine=affine)
    assert normal.count == TOKENS
    assert normal.affine is affine
    assert_normal(normal, moments(z.numpy(), t.numpy(), affine))


@pytest.mark.parametrize("recent", [1, 2, 3])
@pytest.mark.parametrize("weighted", [True, False])
def test_means_of_chunks_enter_the_sums_at_any_time(recent, weighted, monkeypatch):
    monkeypatch.setattr("liar.statistics.moments.RECENT", recent)
    z, t = pair(TOKENS)
    weight = torch.rand(TOKENS, generator=torch.Generator().manual_seed(1), dtype=torch.float64) if weighted else None
    sums = Moments()
    sums.update(z, t, weight)
    wanted = Moments()
    monkeypatch.setattr("liar.statistics.moments.RECENT", 100)
    wanted.update(z, t, weight)
    assert_normal(sums.normal(affine=True), wanted.normal(affine=True), rtol=1e-12)
    if not weighted:
        assert_normal(sums.normal(affine=True), moments(z.numpy(), t.numpy(), True))


@pytest.mark.parametrize("kind", KINDS)
def test_a_lost_row_would_be_seen(kind):
    z, t = pair()
    with pytest.raises(AssertionError):
        assert_normal(streamed(kind, z[1:], t[1:], 100).normal(affine=True), moments(z.numpy(), t.numpy(), True))


@given(cuts=st.lists(st.integers(0, 5000), max_size=8), seed=st.integers(0, 5))
def test_any_batching_gives_the_same_moments_to_the_bit(cuts, seed):
    z, t = pair(5000, 4, 2, seed)
    edges = [0, *sorted(cuts), 5000]
    made = Moments()
    for low, high in pairwise(edges):
        made.update(z[low:high], t[low:high])
    once = Moments()
    once.update(z, t)
    assert torch.equal(made.normal(affine=True).gram, once.normal(affine=True).gram)
    assert torch.equal(made.normal(affine=True).cross, once.normal(affine=True).cross)


@pytest.mark.parametrize("kind", KINDS)
@given(order=st.permutations(range(5)), sizes=st.lists(st.integers(0, 60), min_size=5, max_size=5))
def test_merge_in_any_order_and_grouping(kind, order, sizes):
    sizes[0] += 20
    z, t = pair(sum(sizes), 4, 2)
    parts = [streamed(kind, *part, 17) if len(part[0]) else kind() for part in zip(z.split(sizes), t.split(sizes), strict=True)]
    a, b, c, d, e = (parts[i] for i in order)
    a.merge(b)
    d.merge(e)
    c.merge(d)
    a.merge(c)
    for affine in (True, False):
        assert_normal(a.normal(affine=affine), moments(z.numpy(), t.numpy(), affine), rtol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_merge_leaves_the_other_alone_and_can_go_on(kind):
    z, t = pair(600)
    first, second = streamed(kind, z[:200], t[:200], 50), streamed(kind, z[200:500], t[200:500], 50)
    first.merge(second)
    first.update(z[500:], t[500:])
    assert_normal(second.normal(affine=True), moments(z[200:500].numpy(), t[200:500].numpy(), True))
    assert_normal(first.normal(affine=True), moments(z.numpy(), t.numpy(), True))
    assert (first.count, second.count) == (600, 300)


@pytest.mark.parametrize("kind", KINDS)
def test_reading_in_between_changes_nothing(kind):
    z, t = pair(3 * CHUNK)
    made = kind()
    for low in range(0, len(z), 700):
        made.update(z[low : low + 700], t[low : low + 700])
        assert made.count == min(low + 700, len(z))
        made.normal(affine=True)
    assert_normal(made.normal(affine=True), moments(z.numpy(), t.numpy(), True))


def test_answers_are_not_changed_by_later_rows():
    z, t = pair(300)
    made = streamed(Moments, z[:100], t[:100], 100)
    early = made.normal(affine=False)
    kept = early.gram.clone()
    made.update(z[100:], t[100:])
    made.normal(affine=False)
    assert torch.equal(early.gram, kept)


@pytest.mark.parametrize("affine", [True, False])
def test_factor_is_the_same_problem_as_moments(affine):
    z, t = pair(TOKENS)
    by_gram, by_factor = (streamed(kind, z, t, 900).normal(affine=affine) for kind in KINDS)
    assert_normal(by_factor, by_gram)
    r, rotated = by_factor.factor
    torch.testing.assert_close(r.T @ r, by_gram.gram, rtol=1e-9, atol=1e-9 * by_gram.scale)
    torch.testing.assert_close(r.T @ rotated, by_gram.cross, rtol=1e-9, atol=1e-9 * by_gram.scale)
    assert by_gram.factor is None


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("tokens", [1, 2, 5])
def test_factor_of_fewer_rows_than_channels(affine, tokens):
    z, t = pair(500)
    z, t = z[:tokens], t[:tokens]
    normal = streamed(Factor, z, t, 500).normal(affine=affine)
    want = moments(z.numpy(), t.numpy(), affine)
    torch.testing.assert_close(normal.gram, torch.from_numpy(want["gram"]), rtol=0, atol=1e-12)
    torch.testing.assert_close(normal.cross, torch.from_numpy(want["cross"]), rtol=0, atol=1e-12)
    assert normal.factor[0].shape[1] == 6


def test_centring_survives_a_huge_mean():
    z = (1000 + torch.from_numpy(rows(20_000, 4, condition=1.0, mean=0.0))).float()
    want = moments(z.double().numpy(), z.double().numpy(), True)["gram"]
    for sizes in (20_000, 512):
        got = streamed(Moments, z, z, sizes).normal(affine=True).gram
        torch.testing.assert_close(got, torch.from_numpy(want), rtol=2e-4, atol=2e-4 * float(np.abs(want).max()))
    # What the shift is for: raw sums of the same float32 rows are useless.
    raw = (z.T @ z - torch.outer(z.sum(0), z.sum(0)) / len(z)).double().numpy()
    assert np.abs(raw - want).max() > 0.05 * np.abs(want).max()


def test_channels_survive_a_huge_mean():
    z = (1000 + torch.from_numpy(rows(20_000, 4, condition=1.0, mean=0.0))).float()
    made = ChannelMoments()
    for part in z.split(777):
        made.update(part)
    want = z.double()
    torch.testing.assert_close(made.variance, want.var(0, correction=0), rtol=1e-4, atol=0)
    torch.testing.assert_close(made.mean, want.mean(0), rtol=1e-7, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_low_precision_rows_are_summed_well(dtype):
    """The answer is that of the rounded rows: nothing is lost in the sums."""
    z, t = (value.to(dtype) for value in pair(10_000))
    exact = moments(z.double().numpy(), t.double().numpy(), True)
    assert_normal(streamed(Moments, z, t, 640).normal(affine=True), exact, rtol=1e-11 if dtype == torch.float64 else 1e-5)
    assert_normal(streamed(Factor, z, t, 640).normal(affine=True), exact, rtol=1e-9)


def test_targets_and_rows_may_differ_in_dtype():
    z, t = pair(1000)
    got = streamed(Moments, z.half(), t.float(), 300).normal(affine=True)
    assert_normal(got, moments(z.half().double().numpy(), t.float().double().numpy(), True), rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_memory_does_not_grow_with_tokens(kind):
    """Everything the object holds, storages behind views included, pickled."""
    sizes = []
    for batches in (20, 200):
        made = kind()
        for number in range(batches):
            z, t = pair(130, seed=number)
            made.update(z, t)
        sizes.append(len(pickle.dumps(made)))
    rows_waiting = CHUNK * (6 + 3) * 8
    assert sizes[1] <= sizes[0] + rows_waiting * 1.1
    assert sizes[1] < 200 * 130 * 9 * 8 / 2


def test_state_goes_round_and_on():
    z, t = pair(1000)
    first = streamed(Moments, z[:700], t[:700], 90)
    state = first.state_dict()
    second = Moments()
    second.load_state_dict(pickle.loads(pickle.dumps(state)))
    assert second.count == 700
    for made in (first, second):
        made.update(z[700:], t[700:])
    assert_normal(second.normal(affine=True), first.normal(affine=True), rtol=0)
    third = Moments()
    third.load_state_dict(Moments().state_dict())
    assert third.count == 0


def test_a_loaded_state_is_not_shared():
    z, t = pair(100)
    first = streamed(Moments, z, t, 100)
    second = Moments()
    second.load_state_dict(first.state_dict())
    before = first.normal(affine=False).gram
    second.update(z, t)
    second.normal(affine=False)
    assert torch.equal(first.normal(affine=False).gram, before)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("where", ["z", "t"])
def test_non_finite_rows_are_an_error(kind, bad, where):
    z, t = pair(100)
    (z if where == "z" else t)[50, 1] = bad
    with pytest.raises(CalibrationError, match="NaN or Inf in the activations"):
        streamed(kind, z, t, 40).normal(affine=True)
    channels = ChannelMoments()
    channels.update(z if where == "z" else t)
    with pytest.raises(CalibrationError, match="NaN or Inf in the activations"):
        _ = channels.variance


@pytest.mark.parametrize("kind", KINDS)
def test_no_rows_is_an_error(kind):
    made = kind()
    made.merge(kind())
    with pytest.raises(CalibrationError, match="no calibration token reached the layer"):
        made.normal(affine=True)
    with pytest.raises(CalibrationError, match="no calibration token reached the layer"):
        _ = ChannelMoments().mean


@given(sizes=st.lists(st.integers(0, 50), min_size=1, max_size=6).filter(sum))
def test_channels_equal_whole_however_split(sizes):
    z = torch.from_numpy(np.random.default_rng(0).normal(loc=5, size=(sum(sizes), 6)))
    made = ChannelMoments()
    for part in z.split(sizes):
        made.update(part)
    assert made.count == len(z)
    torch.testing.assert_close(made.mean, z.mean(0))
    torch.testing.assert_close(made.variance, z.var(0, correction=0), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_folds_split_every_row_once(kind):
    z, t = pair(900)
    fold = torch.arange(900) % 5 % 4  # fold 0 has more rows than the others
    folds = Folds(4, kind)
    for part in torch.arange(900).split(110):
        tokens = TokenIndex.of(torch.ones(1, len(part), dtype=torch.bool), fold[part], 4)
        folds.update(z[part][None], t[part][None], tokens)
    all_data, splits = folds.normals(affine=True, channels=900)
    assert_normal(all_data, moments(z.numpy(), t.numpy(), True))
    assert len(splits) == 4
    for number, (fitted, held) in enumerate(splits):
        inside = (fold == number).numpy()
        assert_normal(held, moments(z.numpy()[inside], t.numpy()[inside], True))
        assert_normal(fitted, moments(z.numpy()[~inside], t.numpy()[~inside], True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rows", "channels"), [(900, 1), (4 * HELD_OUT, 10_000)])
def test_plenty_of_rows_are_split_once(kind, rows, channels):
    """With very many rows for every channel, or in a fold, one held-out part says enough; it and the rest are all rows."""
    z, t = pair(rows)
    order = (torch.arange(rows) % 4).argsort(stable=True)
    folds = Folds(4, kind)
    folds.update(z[None], t[None], TokenIndex(order, (rows // 4,) * 4))
    all_data, ((fitted, held),) = folds.normals(affine=True, channels=channels)
    assert fitted.count + held.count == rows
    assert_normal(held, moments(z.numpy()[::4], t.numpy()[::4], True))
    assert_normal(all_data, moments(z.numpy(), t.numpy(), True))


def test_fewer_rows_are_split_by_every_fold():
    z, t = pair(4 * HELD_OUT - 4)
    folds = Folds(4)
    folds.update(z[None], t[None], TokenIndex(torch.arange(len(z)), (HELD_OUT - 1,) * 4))
    assert len(folds.normals(affine=True, channels=len(z) // PLENTY + 1)[1]) == 4


def test_accumulators_made_together_have_one_shift():
    """Whichever has rows first sets it; merging them then moves nothing, and is as exact as ever."""
    z, t = pair(3 * CHUNK)
    first, second, empty = Moments.several([0, 0, 0])
    second.update(z[:CHUNK], t[:CHUNK])
    first.update(z[CHUNK:] + 100, t[CHUNK:] - 50)
    first.merge(second)
    first.merge(empty)
    assert first.state_dict()["shift_z"] is second.state_dict()["shift_z"]
    rows = torch.cat([z[:CHUNK], z[CHUNK:] + 100]), torch.cat([t[:CHUNK], t[CHUNK:] - 50])
    assert_normal(first.normal(affine=True), moments(*(part.numpy() for part in rows), True))


def test_rows_given_are_not_overwritten():
    z, t = pair(2 * CHUNK + 5)
    before = z.clone(), t.clone()
    for kind in KINDS:
        kind().update(z, t, z[:, 0].abs())
    assert torch.equal(z, before[0])
    assert torch.equal(t, before[1])


def test_one_fold_cannot_be_held_out():
    z, t = pair(50)
    folds = Folds(4)
    folds.update(z[None], t[None], TokenIndex(torch.arange(50), (0, 0, 50, 0)))
    all_data, splits = folds.normals(affine=True, channels=6)
    assert splits == []
    assert all_data.count == 50


def test_rows_are_the_kept_tokens_sorted_by_fold():
    value = torch.arange(12.0).reshape(2, 3, 2)
    tokens = TokenIndex.of(torch.tensor([[True, False, True], [True, True, False]]), torch.tensor([1, 0, 1, 0]), 3)
    assert tokens.sizes == (2, 2, 0)
    assert tokens.gather(value).tolist() == [[4, 5], [8, 9], [0, 1], [6, 7]]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("affine", [True, False])
def test_weighted_rows_count_as_often_as_their_weight_says(kind, affine):
    z, t = pair(5000)
    weight = torch.from_numpy(np.random.default_rng(3).uniform(0.01, 100, 5000))
    made, halves = kind(), (kind(), kind())
    for number, part in enumerate(torch.arange(5000).split(700)):
        for taker in (made, halves[number % 2]):
            taker.update(z[part], t[part], weight[part])
    halves[0].merge(halves[1])
    want = moments(z.numpy(), t.numpy(), affine, weight.numpy())
    for normal in (made.normal(affine=affine), halves[0].normal(affine=affine)):
        assert_normal(normal, want)
        assert (normal.count, normal.weight_sum) == (5000, pytest.approx(float(weight.sum())))
    whole = torch.randint(1, 4, (5000,), generator=torch.Generator().manual_seed(0))
    counted, copied = kind(), kind()
    counted.update(z, t, whole.double())
    copied.update(z.repeat_interleave(whole, 0), t.repeat_interleave(whole, 0))
    assert_normal(counted.normal(affine=affine), copied.normal(affine=affine))


@pytest.mark.parametrize("channels", [1, STRIP - 1, STRIP, STRIP + 1, 700])
def test_the_gram_of_half_the_products_is_the_gram(channels):
    z = torch.from_numpy(rows(900, channels))
    total = torch.ones(channels, channels, dtype=torch.float64)
    add_gram(total, z)
    torch.testing.assert_close(mirror(total), z.T @ z + 1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("affine", [True, False])
def test_columns_of_the_target(kind, affine):
    """`columns` is what streaming these columns alone would have given."""
    z, t = pair(400)
    part = slice(1, t.shape[1])
    got = streamed(kind, z, t, 400).normal(affine=affine).columns(part)
    assert_normal(got, streamed(kind, z, t[:, part], 400).normal(affine=affine))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("affine", [True, False])
def test_another_target_from_the_same_sums(kind, affine):
    """`project_targets` is what streaming the new target would have given, but for its energy."""
    z, t = pair(400)
    weight, bias = torch.randn(3, 5, dtype=torch.float64), torch.randn(5, dtype=torch.float64) * affine
    got = streamed(kind, z, t, 400).normal(affine=affine).project_targets(weight, bias)
    want = streamed(kind, z, t @ weight + bias, 400).normal(affine=affine)
    assert got.target_energy == 0
    assert_normal(replace(got, target_energies=want.target_energies), want)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("affine", [True, False])
def test_error_is_the_sum_of_squares(kind, affine):
    z, t = pair(400)
    normal = streamed(kind, z, t, 400).normal(affine=affine)
    weights = torch.from_numpy(np.random.default_rng(0).normal(size=(2, 6, 3)))
    # Without an intercept in the problem there is none in the answer either.
    biases = torch.from_numpy(np.random.default_rng(1).normal(size=(2, 3))) * affine
    naive = torch.stack([(t - z @ w - b).square().sum() for w, b in zip(weights, biases, strict=True)])
    torch.testing.assert_close(normal.error(weights, biases), naive)
    torch.testing.assert_close(normal.error(weights[0], biases[0]), naive[0])


def test_scale_is_the_mean_diagonal():
    z, t = pair(400)
    z_centred, _ = centred(z.numpy(), True)
    assert streamed(Moments, z, t, 400).normal(affine=True).scale == pytest.approx(np.square(z_centred).sum(0).mean())


@pytest.mark.parametrize("kind", [*KINDS, ChannelMoments])
def test_a_state_is_not_changed_by_later_rows(kind):
    z, t = pair(tokens=3 * CHUNK)
    rows_of = (z,) if kind is ChannelMoments else (z, t)
    accumulator, again = kind(), kind()
    accumulator.update(*rows_of)
    state = accumulator.state_dict()
    copied = pickle.loads(pickle.dumps(state))
    accumulator.update(*(5 * rows for rows in rows_of))
    again.load_state_dict(state)
    for name, value in again.state_dict().items():
        torch.testing.assert_close(value, copied[name], rtol=0, atol=0)


@pytest.mark.parametrize("order", [1, -1])
def test_sums_are_as_exact_as_the_coarsest_of_their_rows(order):
    """A direction that is rounding error of float32 stays one when float64 rows join."""
    parts = [Moments() for _ in range(2)]
    for part, dtype in zip(parts, (torch.float32, torch.float64), strict=True):
        z = torch.randn(50, 3, dtype=dtype)
        part.update(z, z)
    coarse, fine = (part.normal(affine=True).rank_tolerance for part in parts)
    assert coarse > fine
    first, second = parts[::order]
    first.merge(second)
    assert first.normal(affine=True).rank_tolerance == coarse
