"""Figures: what is drawn is what the report says; only a report is needed."""

import itertools
import sys
from dataclasses import replace
from math import inf, nan

import pytest

import liar
from liar.errors import Verdict
from liar.report import Report, SiteReport

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
    return Report(tuple(sites), 0.5, 0.497, (1000, 600), 12345, 10, {"target": "dense_stream"}, "float32", {"solve": 1.0})


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


def test_the_global_state_of_matplotlib_is_left_alone(report):
    import matplotlib.pyplot as plt  # noqa: PLC0415

    liar.plot(report)
    assert plt.get_fignums() == []


def test_without_matplotlib(report, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r'plots need matplotlib, which is not installed: pip install "liar-prune\[plot\]"'):
        liar.plot(report)
