"""The page of a report: it says what the report says, warns first, escapes names, and needs nothing else."""

import json
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from math import inf, nan

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

import liar
from liar.cli import app
from liar.errors import CheckpointError, OptionError
from liar.report import CostChange, Measure, PageSource, Quality, Report, SiteReport
from liar.report.findings import findings, words_of
from liar.report.page import page
from liar.testing import tiny_batches, tiny_model
from liar.verdicts import Verdict

pytest.importorskip("matplotlib")

GOOD = Quality((Measure("logits", "kl", 0.125, 0.75), Measure("logits", "agreement", 0.875, 0.5)), 6, 321, 300, held_out=True)
BAD = replace(GOOD, measures=(Measure("logits", "kl", 0.75, 0.125),))


def site(name, kept=3, total=4, before=0.5, after=0.25, verdict=Verdict.RIDGED, **other):
    return SiteReport(name, f"module.{name}", kept, total, before, after, verdict, 0.01, 1234.5, 0.5, **other)


def report(layers=2, **changes):
    sites = tuple(site(f"{kind}.{layer}") for layer in range(layers) for kind in ("heads", "neurons"))
    content = {
        "sites": sites, "requested": 0.5, "achieved": 0.497, "parameters": (2_000_000, 1_000_000), "tokens": 5_000,
        "sequences": 40, "options": {"ridge": "auto"}, "dtype": "float32", "seconds": {"solve": 1.5}, "quality": GOOD,
        "distinct_tokens": 5_000, "lengths": (8, 99, 128),
    }  # fmt: skip
    return Report(**{**content, **changes})


class Page(HTMLParser):
    """Text, ids and links of a page; every tag that is opened is closed."""

    VOID = ("meta", "br", "path", "use", "input", "rect")

    def __init__(self, source):
        super().__init__()
        self.text, self.ids, self.links, self.tags, self.headings = "", [], [], [], []
        self.open, self.outside = [], []
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        self.ids += [attributes["id"]] if "id" in attributes else []
        for name in ("href", "src", "xlink:href", "action", "data", "srcset", "poster"):
            if name in attributes:
                self.links.append(attributes[name])
        self.outside += re.findall(r"url\((?!#)[^)]*\)|https?:[^\"' )]*", " ".join(v or "" for v in attributes.values()))

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" in self.open:
            assert "@import" not in data
            assert "url(" not in data
        elif data.strip():
            self.text += " ".join(data.split()) + "\n"
            if self.open and self.open[-1] in ("h1", "h2", "h3"):
                self.headings.append((self.open[-1], " ".join(data.split())))


def shown(*reports, **other):
    names = [f"model {number}" for number in range(len(reports))]
    return Page(page([PageSource(name, each, **other) for name, each in zip(names, reports, strict=True)]))


@pytest.mark.parametrize("layers", [1, 2, 6, 30, 80])
def test_a_page_of_any_number_of_layers(layers):
    source = page([PageSource("model", report(layers))])
    assert len(source.encode()) < 1_000_000
    seen = Page(source)
    for each in report(layers).sites:
        assert f"{each.site}\n" in seen.text
    assert len(seen.ids) == len(set(seen.ids))
    assert {link for link in seen.links if not link.startswith("#")} <= {
        link for link in seen.links if link.startswith("data:")
    }
    assert {link[1:] for link in seen.links if link.startswith("#")} <= set(seen.ids)
    assert [link for link in seen.outside if "www.w3.org" not in link] == []
    assert "script" not in seen.tags


def test_it_says_what_the_report_says():
    text = shown(report(cost=CostChange("seconds", 0.02, 0.01))).text
    for part in (
        "1,000,000", "−50.0% of 2,000,000, 8 MB to 4 MB as float32", "49.7%", "50.0% were asked for", "10 ms",
        "−50.0% of 20 ms, summed from times measured layer by layer", "0.125", "0.75 with the mask alone; on held-out text",
        "87.5%", "3 of 4", "−50.0%", "repaired, held near the old weights by a ridge", Verdict.RIDGED.text, "1.23e+03", "5,000",
        "8 to 128 tokens, median 99", "6 sequences (321 tokens), held out; 300 predictions",
    ):  # fmt: skip
        assert part in text, part


def test_warnings_come_first():
    seen = shown(report(quality=BAD))
    assert [heading for _, heading in seen.headings][:3] == ["model 0: what was pruned", "Warnings", "In short"]
    assert seen.text.index("no closer to the dense model than with the mask alone") < seen.text.index("In short")
    assert "There are none." not in seen.text
    assert "There are none." in shown(report()).text


LITTLE = site("neurons.0", verdict=Verdict.TOO_FEW_TOKENS)
WARNINGS = [
    ({"quality": BAD}, "the output is no closer to the dense model than with the mask alone"),
    (
        {"sites": (site("heads.0"), site("neurons.0", verdict=Verdict.TOO_FEW_TOKENS))},
        "1 of 2 layers (neurons.0): too little text",
    ),
    ({"sites": (site("heads.0", verdict=Verdict.NOTHING_HELD_OUT),)}, "1 of 1 layers (heads.0): too little text to hold"),
    ({"sites": (site("heads.0", after=0.6),)}, "1 of 1 layers (heads.0): the held-out error is larger after the repair"),
    ({"distinct_tokens": 4_000}, "Only 4,000 of 5,000 calibration tokens are distinct"),
]
SEEN = replace(GOOD, held_out=False)
NOTES = [
    ({"quality": None}, "The output was not compared with the dense model's"),
    (
        {"quality": replace(GOOD, held_out=False)},
        "6 sequences (321 tokens), seen by the fit: the weights were fitted to this text",
    ),
    ({"sites": (site("heads.0", verdict=Verdict.KEPT_BASELINE),)}, "no update was better on held-out tokens"),
    ({"sites": (site("heads.0", bias_created=True),)}, "got a bias"),
    ({"options": {"ridge": 0.1}}, "The ridge was given (0.1)"),
    ({"achieved": 0.4}, "Less is left than was asked for: 40.0% of the block parameters, not 50.0%"),
    ({"sites": (site("neurons.0", kept=1_000, total=2_000),)}, "5.0 for each, where 10 are a good minimum"),
]


@pytest.mark.parametrize(("changes", "says"), WARNINGS + NOTES)
def test_findings(changes, says):
    level = "warning" if (changes, says) in WARNINGS else "note"
    found = findings(report(**changes))
    assert [each.level for each in found if says in each.text] == [level]
    assert findings(report()) == []
    assert says in Page(report(**changes)._repr_html_()).text.replace("\n", " ")


def test_findings_are_sorted():
    levels = [each.level for each in findings(report(quality=replace(BAD, held_out=False), distinct_tokens=10, achieved=0.1))]
    assert levels == sorted(levels, reverse=True)
    assert set(levels) == {"warning", "note"}


@given(
    verdict=st.sampled_from(list(Verdict)),
    before=st.floats(0, 2) | st.just(nan),
    after=st.floats(0, 2) | st.sampled_from([nan, inf]),
)
def test_no_site_is_called_good_whose_error_did_not_fall(verdict, before, after):
    words, level = words_of(site("heads.0", before=before, after=after, verdict=verdict))
    assert words
    if level == "good":
        assert after < before
    if after > before + 1e-6:
        assert level == "warning"


def test_names_and_texts_are_escaped():
    bad = '<script>alert("1")</script>'
    source = page([PageSource(bad, report(options={"ridge": bad}), loading=bad, replaying=bad, run={bad: bad})])
    assert "<script" not in source
    assert source.count("&lt;script&gt;alert(&#34;1&#34;)&lt;/script&gt;") >= 5
    Page(source)
    both = page([PageSource(bad, report()), PageSource(bad, report())])
    assert "<script" not in both
    Page(both)


def test_heads_are_drawn_one_by_one_where_the_mask_is_known():
    row = torch.tensor([True, False, True, True])
    source = page([PageSource("model", report(1), mask=liar.Mask({"heads.0": row, "neurons.0": row}))])
    assert 'd="M0 0h1v1h-1zM2 0h1v1h-1zM3 0h1v1h-1z"' in source
    assert source.count('d="M0 0h3v1H0z"') == 1
    assert page([PageSource("model", report(1))]).count('d="M0 0h3v1H0z"') == 2
    # A mask of another model is not drawn.
    other = liar.Mask({"heads.0": torch.tensor([True])})
    assert page([PageSource("model", report(1), mask=other)]).count('d="M0 0h3v1H0z"') == 2


def test_layers_may_lack_a_kind_and_numbers_may_be_missing():
    sites = (site("heads.0", before=nan, after=nan), site("neurons.3", before=0.5, after=inf, total=0, kept=0))
    seen = shown(report(sites=sites, quality=replace(GOOD, measures=(Measure("x", "cosine", nan, nan),)), requested=None))
    assert "by a mask that was given" in seen.text
    assert shown(report(quality=replace(GOOD, measures=()))).text
    assert shown(report(distinct_tokens=None, lengths=None, tokens=0, seconds={}, options={})).text


def test_a_comparison():
    seen = shown(report(), report(parameters=(2_000_000, 500_000), quality=BAD), report(quality=None))
    assert [heading for tag, heading in seen.headings if tag == "h2"] == ["Comparison", "model 0", "model 1", "model 2"]
    assert len(seen.ids) == len(set(seen.ids))
    assert "KL divergence of logits against parameters; the table has the numbers" in page(
        [PageSource("a", report()), PageSource("b", report())]
    )
    assert "not compared" in seen.text
    cosine = replace(GOOD, measures=(Measure("hidden", "cosine", 0.9, 0.8),))
    assert "No two of these reports compare the output in the same way" in shown(report(), report(quality=cosine)).text


def test_the_file(tmp_path):
    report().to_html(tmp_path / "page.html", name="the model")
    assert "the model: what was pruned" in Page((tmp_path / "page.html").read_text(encoding="utf-8")).text
    with pytest.raises(OptionError, match=r"page.png': expected a name that ends in .html"):
        report().to_html(tmp_path / "page.png")
    with pytest.raises(CheckpointError, match="there is no folder"):
        report().to_html(tmp_path / "none" / "page.html")


def test_the_same_report_gives_the_same_page():
    assert page([PageSource("model", report())]) == page([PageSource("model", report())])


def test_without_matplotlib(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r'pip install "liar-prune\[plot\]"'):
        report().to_html(tmp_path / "page.html")
    assert "KL divergence of logits" in report()._repr_html_()


def test_notebook_cells():
    seen = Page(report(quality=BAD)._repr_html_())
    assert "Warning:" in seen.text
    assert seen.text.index("no closer to the dense model") < seen.text.index("1,000,000") < seen.text.index("heads.0")
    mask = liar.Mask({"<heads>.0": torch.tensor([True, False, False, True])})
    seen = Page(mask._repr_html_())
    assert "2 of 4 units kept" in seen.text
    assert "<heads>.0" in seen.text
    assert "50.0%" in seen.text
    assert Page(liar.Mask({})._repr_html_()).text == "0 of 0 units kept\n"


@pytest.fixture
def folder(tmp_path):
    model = tiny_model()
    mask = liar.select(model, keep=0.5, criterion="magnitude")
    outcome = liar.reconstruct(model, mask, tiny_batches(model), progress=False)
    run = {"run": {"model": "/home/me/bert", "source": {"calib": "/home/me/texts.txt"}, "calibration": {"max_length": 64}}}
    extra = {"mask.json": mask.to_json(), "run.json": json.dumps(run)}
    liar.save(model, tmp_path / "slim", mask=mask, report=outcome, extra=extra)
    return tmp_path / "slim"


def call(*arguments):
    return CliRunner().invoke(app, ["report", *map(str, arguments)])


def test_the_command_line(folder, tmp_path):
    done = call(folder, "--html", tmp_path / "page.html")
    assert done.exit_code == 0, done.output
    source = (tmp_path / "page.html").read_text(encoding="utf-8")
    text = Page(source).text
    for part in (
        "slim: what was pruned",
        "model = liar.load('slim')",
        "liar replay slim/run.json --out again",
        "texts.txt",
        "bert",
    ):
        assert part in text
    assert "/home/me" not in source
    assert call(folder, "--html", tmp_path / "page.html").exit_code == 1
    assert call(folder, "--html", tmp_path / "page.html", "--force").exit_code == 0
    several = call(folder, folder / "report.json", "--html", tmp_path / "both.html")
    assert several.exit_code == 0, several.output
    assert "2 pruned models compared" in (tmp_path / "both.html").read_text(encoding="utf-8")
    refused = call(folder, folder, "--plot", tmp_path / "figure.png")
    assert refused.exit_code == 1
    assert "--plot draws one report, got 2; use --html" in " ".join(refused.output.split())


@pytest.mark.parametrize("damaged", ["run.json", "mask.json", "config.json"])
@pytest.mark.parametrize("content", [None, "", "[1]", '{"run": 3, "mask": {}}', '{"run": {"source": [], "calibration": 5}}'])
def test_a_folder_with_less_in_it(folder, tmp_path, damaged, content):
    (folder / damaged).unlink()
    if content is not None:
        (folder / damaged).write_text(content)
    done = call(folder, "--html", tmp_path / "page.html")
    assert done.exit_code == 0, done.output
    Page((tmp_path / "page.html").read_text(encoding="utf-8"))


def test_the_model_card_has_the_output(folder):
    card = (folder / "README.md").read_text(encoding="utf-8")
    measure = Report.load(folder / "report.json").quality.measures[0]
    assert str(measure) in card
    assert "seen by the fit" in card


def test_dollars_in_names_are_no_formulas():
    """matplotlib reads text between dollars as a formula, and stops at one that it does not know."""
    assert "a$\\foo$" in page([PageSource("a$\\foo$", report()), PageSource("b", report())])


def test_models_of_one_name_are_told_apart():
    html = page([PageSource("same", report()), PageSource("same", report())])
    assert "same (1)" in html
    assert "same (2)" in html


def test_nothing_is_divided_by_nothing():
    empty = replace(report(), parameters=(0, 0), cost=CostChange("seconds", 0.0, 0.0))
    assert "–" in page([PageSource("a", empty)])
