"""Reports: to JSON and back with every number a float can be, and a table for people."""

import json
import sys
from dataclasses import FrozenInstanceError, replace
from math import inf, isnan, nan

import pytest
from hypothesis import given
from hypothesis import strategies as st

import liar
from liar import Report, Verdict
from liar.errors import CheckpointError
from liar.report import SiteReport
from liar.testing import tiny_batches, tiny_model

SITE = SiteReport(
    site="neurons.3", module="encoder.layer.3.output.dense", kept=10, total=64, before=0.5, after=0.25, verdict=Verdict.RIDGED,
    ridge=0.01, condition=1234.5, seconds=0.5, bias_created=True,
)  # fmt: skip
REPORT = Report(
    sites=(replace(SITE, site="heads.3", verdict=Verdict.UNTOUCHED, before=0.0, after=0.0, ridge=nan, condition=nan), SITE,
           replace(SITE, site="neurons.4", verdict=Verdict.KEPT_BASELINE, before=nan, after=-inf, ridge=inf)),
    requested=0.5, achieved=0.4987, parameters=(123456, 65432), tokens=5000, sequences=40,
    options={"target": "residual_stream", "ridge": "auto", "solver": "auto", "bias": "preserve"}, dtype="bfloat16",
    seconds={"solve": 1.5, "statistics": 0.25},
)  # fmt: skip


def same(a, b):
    return repr(a) == repr(b)


def test_json_goes_round_with_numbers_json_has_not():
    again = Report.from_json(REPORT.to_json())
    assert same(again, REPORT)
    assert again.verdicts == {"heads.3": Verdict.UNTOUCHED, "neurons.3": Verdict.RIDGED, "neurons.4": Verdict.KEPT_BASELINE}
    assert isnan(again.sites[0].ridge)
    assert again.sites[2].ridge == inf
    assert again.sites[1] == SITE


def test_the_json_is_strict():
    """No NaN or Infinity literals: any JSON parser reads it."""

    def refuse(literal):
        raise AssertionError(f"{literal} is not JSON")

    content = json.loads(REPORT.to_json(), parse_constant=refuse)
    assert content["sites"][2]["ridge"] == "inf"
    assert content["sites"][1]["verdict"] == "ridged"


@given(
    numbers=st.tuples(*[st.floats(allow_nan=True, allow_infinity=True)] * 4),
    verdict=st.sampled_from(list(Verdict)),
    requested=st.none() | st.floats(0.01, 1),
)
def test_any_report_goes_round(numbers, verdict, requested):
    before, after, ridge, condition = numbers
    site = replace(SITE, before=before, after=after, ridge=ridge, condition=condition, verdict=verdict)
    report = replace(REPORT, sites=(site,), requested=requested)
    assert same(Report.from_json(report.to_json()), report)


def test_files(tmp_path):
    REPORT.save(tmp_path / "report.json")
    assert same(Report.load(tmp_path / "report.json"), REPORT)


def test_a_report_is_frozen():
    with pytest.raises(FrozenInstanceError):
        REPORT.achieved = 1.0
    with pytest.raises(FrozenInstanceError):
        SITE.kept = 1


def test_the_table_says_what_happened():
    text = str(REPORT)
    assert "49.9% of the block parameters kept (50.0% requested)" in text
    assert "123,456 to" in text.replace("\n", " ")
    rows = [line for line in text.splitlines() if "neurons.3" in line]
    assert len(rows) == 1
    for cell in ("10", "64", "0.5000", "0.2500", "ridged +bias"):
        assert cell in rows[0]
    assert "kept_baseline" in next(line for line in text.splitlines() if "neurons.4" in line)
    # every verdict that occurs is explained once below the table
    for verdict in Verdict:
        explained = text.replace("\n", " ").count(f"{verdict.value}: ")
        assert explained == (verdict in REPORT.verdicts.values()), verdict
    assert "requested" not in str(replace(REPORT, requested=None))


def test_the_table_without_rich(monkeypatch):
    """The library works without the command line's extras: the same cells, separated by tabs."""
    rows = REPORT.rows()
    monkeypatch.setitem(sys.modules, "rich.console", None)
    lines = str(REPORT).splitlines()
    assert lines[0].startswith("49.9% of the block parameters kept (50.0% requested); model 123,456 to 65,432 parameters;")
    assert [tuple(line.split("\t")) for line in lines[2 : 2 + len(rows)]] == rows
    assert rows[1] == ("neurons.3", "10", "64", "0.5000", "0.2500", "1e-02", "1e+03", "0.50", "ridged +bias")
    assert [line.partition(": ")[0] for line in lines[2 + len(rows) :]] == ["kept_baseline", "ridged", "untouched"]


def test_a_real_report():
    model = tiny_model()
    report = liar.prune(model, tiny_batches(model), keep=0.6, progress=False)
    assert same(Report.from_json(report.to_json()), report)
    for site in report.sites:
        assert site.site in str(report)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["achieved"], "a"), (["achieved"], 10**400), (["achieved"], 2), (["requested"], {}), (["parameters"], [1]),
        (["parameters"], "ab"), (["tokens"], -1), (["tokens"], []), (["seconds"], 3), (["seconds"], {"a": []}),
        (["options"], []), (["sites"], []), (["sites"], {}), (["sites", 0], 5), (["sites", 0, "site"], "heads"),
        (["sites", 0, "site"], None),
        (["sites", 0, "kept"], [1]), (["sites", 0, "before"], None), (["sites", 0, "verdict"], "good"),
        (["sites", 0, "bias_created"], 1), (["sites", 0, "ridge"], "infinite"), (["dtype"], 3), (["unknown"], 3),
    ],
)  # fmt: skip
def test_a_value_that_is_none_is_named(path, value, tmp_path):
    content = json.loads(REPORT.to_json())
    place = content
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    (tmp_path / "report.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=f"report.json: expected a report.json that liar wrote, got .*{path[-1]}|got"):
        Report.load(tmp_path / "report.json")


@pytest.mark.parametrize("missing", ["sites", "achieved", "tokens", "options"])
def test_an_entry_that_is_missing(missing):
    content = json.loads(REPORT.to_json())
    del content[missing]
    with pytest.raises(CheckpointError, match=missing):
        Report.from_json(json.dumps(content))


@pytest.mark.parametrize("text", ["", "null", "[]", "3", "[" * 100_000, '{"sites": ' + "[" * 100_000, "NaN", "\x00"])
def test_texts_that_are_no_report(text, tmp_path):
    (tmp_path / "report.json").write_text(text)
    for call in (
        lambda: Report.from_json(text),
        lambda: Report.load(tmp_path / "report.json"),
        lambda: liar.plot(tmp_path / "report.json"),
    ):
        with pytest.raises(CheckpointError):
            call()
