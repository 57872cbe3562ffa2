"""Figures: they show what the report or the mask says, and need nothing else."""

import itertools
import sys
from dataclasses import replace
from math import inf, nan

import numpy as np
import pytest
import torch

import liar
from liar.errors import CheckpointError, LiarError, MaskError, OptionError
from liar.report import Report, SiteReport
from liar.verdicts import Verdict

pytest.importorskip("matplotlib")


def site(name, kept, total, before, after):
    return SiteReport(name, f"module.{name}", kept, total, before, after, Verdict.OK, 0.0, 10.0, 0.1)


@pytest.fixture
def report():
    sites = [
        site("heads.0", 4, 4, 0.0, 0.0),
        site("neurons.0", 30, 60, 0.5, 0.05),
        site("heads.1", 1, 4, 0.25, 0.1),
        site("neurons.1", 15, 60, 0.4, nan),
        site("heads.2", 2, 4, nan, nan),
        site("neurons.2", 6, 60, 0.3, 0.2),
    ]
    return Report(tuple(sites), 0.5, 0.497, (1000, 600), 12345, 10, {"target": "residual_stream"}, "float32", {"solve": 1.0})


def drawn_errors(axes):
    return {line.get_label(): sorted(line.get_ydata().tolist()) for line in axes.lines if "," in str(line.get_label())}


def test_what_is_drawn(report):
    upper, lower = liar.plot(report).axes
    bars = {container.get_label(): [bar.get_height() for bar in container] for container in upper.containers}
    assert bars == {"heads": [1.0, 0.25, 0.5], "neurons": [0.5, 0.25, 0.1]}
    assert drawn_errors(lower) == {
        "heads, before": [0.25],
        "heads, after": [0.1],
        "neurons, before": [0.3, 0.5],
        "neurons, after": [0.05, 0.2],
    }
    assert lower.get_yscale() == "log"
    assert lower.get_xlabel() == "layer"
    assert "held-out error" in lower.get_ylabel()
    assert upper.get_ylabel() == "share kept"
    assert "49.7% of the block parameters kept" in upper.get_title(loc="left")


def test_bars_do_not_overlap(report):
    upper, _ = liar.plot(report).axes
    spans = sorted((bar.get_x(), bar.get_x() + bar.get_width()) for bar in upper.patches)
    assert all(left[1] <= right[0] for left, right in itertools.pairwise(spans))


def test_json_gives_the_same_figure(report, tmp_path):
    report.save(tmp_path / "report.json")
    first, second = (
        liar.plot(source, tmp_path / f"{number}.svg") for number, source in enumerate([report, tmp_path / "report.json"])
    )
    assert drawn_errors(first.axes[1]) == drawn_errors(second.axes[1])
    assert (tmp_path / "0.svg").stat().st_size > 1000


@pytest.mark.parametrize("ending", ["png", "pdf", "svg"])
def test_file(report, ending, tmp_path):
    liar.plot(str(_saved(report, tmp_path)), tmp_path / f"figure.{ending}")
    assert (tmp_path / f"figure.{ending}").stat().st_size > 1000


def test_messages(report, tmp_path):
    with pytest.raises(OptionError, match=r"figure.xyz': expected a name that ends in .png, .pdf, .svg"):
        liar.plot(report, tmp_path / "figure.xyz")
    with pytest.raises(CheckpointError, match=r"nothing\.json: expected the JSON of a report or a mask, got No such file"):
        liar.plot(tmp_path / "nothing.json")
    (tmp_path / "list.json").write_text("[1]")
    with pytest.raises(LiarError, match=r"list\.json: "):
        liar.plot(tmp_path / "list.json")


def _saved(report, folder):
    report.save(folder / "report.json")
    return folder / "report.json"


@pytest.mark.parametrize("layers", [1, 12, 100])
def test_any_number_of_layers(layers):
    sites = tuple(site(f"{kind}.{i}", 1, 2, 0.2, 0.1) for i in range(layers) for kind in ("heads", "neurons"))
    figure = liar.plot(Report(sites, None, 0.5, (2, 1), 1, 1, {}, "float32"))
    assert figure.axes[1].get_xlim() == (-0.6, layers - 0.4)
    assert len(figure.axes[1].get_xticks()) <= 33
    figure.canvas.draw()


def test_no_held_out_errors(report):
    bare = replace(report, sites=tuple(replace(s, before=nan, after=inf if s.kept else nan) for s in report.sites))
    _, lower = liar.plot(bare).axes
    assert [text.get_text() for text in lower.texts] == ["no held-out errors in this report"]
    assert lower.get_yscale() == "linear"


def test_limits_of_errors_far_apart(report):
    """Every error that is more than rounding is inside of the axes, and their numbers can be read."""
    sites = (replace(report.sites[1], before=2e10, after=1e-4), replace(report.sites[3], before=1e-3, after=1e-9))
    _, lower = liar.plot(replace(report, sites=sites)).axes
    low, high = lower.get_ylim()
    assert low == 1e-6
    assert high > 2e10
    assert lower.get_yscale() == "log"
    assert len(lower.get_yticks()) < 20
    low, _ = liar.plot(report).axes[1].get_ylim()
    assert 0.01 < low < 0.05


def test_the_global_state_of_matplotlib_is_left_alone(report):
    import matplotlib.pyplot as plt  # noqa: PLC0415

    liar.plot(report)
    assert plt.get_fignums() == []


def test_without_matplotlib(report, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r'plots need matplotlib, which is not installed: pip install "liar-prune\[plot\]"'):
        liar.plot(report)


# Masks


def row(kept, units):
    return torch.tensor([unit in kept for unit in range(units)])


@pytest.fixture
def mask():
    rows = {"heads.0": row({0, 2}, 4), "neurons.0": row(range(10), 60), "heads.1": row({3}, 4), "neurons.1": row(range(60), 60)}
    return liar.Mask(rows, requested=0.5)


def image(axes):
    """What a panel shows: shares [layers, cells], NaN where there is nothing."""
    (shown,) = axes.images
    return np.ma.filled(shown.get_array(), np.nan)


def test_every_unit_is_drawn(mask):
    heads, neurons = liar.plot(mask).axes
    for axes, kind in ((heads, "heads"), (neurons, "neurons")):
        np.testing.assert_array_equal(image(axes), [mask[f"{kind}.{layer}"].tolist() for layer in range(2)])
        assert axes.get_xlabel() == "unit"
        (top, bottom), (left, right) = axes.get_ylim()[::-1], axes.get_xlim()
        assert (top, bottom, left, right) == (-0.5, 1.5, -0.5, image(axes).shape[1] - 0.5)
    assert heads.get_title(loc="left") == "heads: 37.5% of 8 units kept"
    assert neurons.get_title(loc="left") == "neurons: 58.3% of 120 units kept"
    assert heads.get_ylabel() == "layer"
    assert [text.get_text() for text in heads.get_yticklabels()] == ["0", "1"]


def test_kept_is_dark_and_removed_light_in_image_and_key(mask):
    axes = liar.plot(mask).axes[-1]
    dark, light = axes.images[0].to_rgba(np.array([1.0, 0.0]))
    assert dark[:3].max() < 0.2 < 0.85 < light[:3].min() < 1
    key = dict(zip(["kept", "removed"], axes.get_legend().legend_handles, strict=True))
    assert [text.get_text() for text in axes.get_legend().get_texts()] == list(key)
    np.testing.assert_array_equal([key["kept"].get_color(), key["removed"].get_color()], [dark, light])


def test_cells_of_a_wide_layer_are_shares():
    kept = torch.arange(1300) < 400
    kept[-1] = True
    (axes,) = liar.plot(liar.Mask({"neurons.0": kept})).axes
    cells = image(axes)
    # 1300 units do not fit into 512 cells by twos; by threes they are 433 cells and one that has a single unit.
    assert cells.shape == (1, 434)
    np.testing.assert_allclose(cells[0], [kept[i : i + 3].double().mean() for i in range(0, 1300, 3)])
    assert axes.get_xlabel() == "unit (shade: share kept of 3 neighbours)"
    assert axes.get_xlim() == (-0.5, 1299.5)
    assert axes.images[0].get_extent()[1] == 434 * 3 - 0.5
    assert axes.get_title(loc="left") == "neurons: 30.8% of 1,300 units kept"


def test_layers_may_differ_or_be_missing():
    mask = liar.Mask({"heads.1": row({0}, 3), "heads.5": row({1}, 2), "neurons.5": row({0}, 2)})
    heads, neurons = liar.plot(mask).axes
    np.testing.assert_array_equal(image(heads), [[1, 0, 0], [0, 1, np.nan]])
    np.testing.assert_array_equal(image(neurons), [[np.nan, np.nan], [1, 0]])
    assert [text.get_text() for text in heads.get_yticklabels()] == ["1", "5"]
    assert heads.get_title(loc="left") == "heads: 40.0% of 5 units kept"


@pytest.mark.parametrize("layers", [1, 100])
def test_a_mask_of_any_number_of_layers(layers):
    rows = {f"{kind}.{layer}": row({0}, units) for layer in range(layers) for kind, units in (("heads", 2), ("neurons", 700))}
    figure = liar.plot(liar.Mask(rows))
    assert len(figure.axes[0].get_yticks()) <= 33
    assert figure.get_size_inches().max() <= 16
    figure.canvas.draw()


def test_a_file_of_a_mask_gives_the_same_figure(mask, tmp_path):
    mask.save(tmp_path / "mask.json")
    first, second = (
        liar.plot(source, tmp_path / f"{number}.png") for number, source in enumerate([mask, tmp_path / "mask.json"])
    )
    assert (tmp_path / "0.png").read_bytes() == (tmp_path / "1.png").read_bytes()
    np.testing.assert_array_equal(image(first.axes[0]), image(second.axes[0]))


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ({}, r'expected a mask of sites such as "heads\.0", got no site; see Mask\.of\(mask, layout\)'),
        ({"heads.0": row({0}, 2), "encoder.output.dense": row({0}, 2)}, r"got encoder\.output\.dense; see Mask\.of"),
    ],
)  # fmt: skip
def test_a_mask_without_sites_cannot_be_drawn(rows, says):
    with pytest.raises(MaskError, match=says):
        liar.plot(liar.Mask(rows))
