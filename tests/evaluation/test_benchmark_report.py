"""What is written: tables, and a page that needs nothing else."""

import re
from html.parser import HTMLParser

import pandas as pd
import pytest

from evaluation.benchmark_builders import FailsForOne, PairSplit, broken, collapsed, small_screen
from scvi_sams import evaluation
from scvi_sams.evaluation import BenchmarkResult
from scvi_sams.exceptions import SAMSError


@pytest.fixture(scope="module")
def result():
    screen = small_screen()
    return evaluation.benchmark(
        screen,
        methods={
            "collapsed": collapsed,
            "fails <for> one": FailsForOne(),
            "broken": broken,
        },
        split=PairSplit(screen),
        seeds=(0,),
        modes=("perturbench",),
        progress_bar=False,
    )


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.ids, self.links, self.open = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        attributes = dict(attrs)
        self.ids.append(attributes.get("id"))
        for name in ("href", "src", "xlink:href", "action", "data"):
            if name in attributes:
                self.links.append(attributes[name])


def test_the_page_refers_to_nothing_outside_itself(result, tmp_path):
    path = tmp_path / "report.html"
    result.to_html(path, title="A <title>")
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert all(link.startswith("#") for link in page.links)
    assert set(page.links) <= {f"#{name}" for name in page.ids}
    assert not re.search(r"https?:|//[a-z]|@import|url\((?!#)", text)
    assert "script" not in page.tags
    assert page.tags.count("svg") > 5
    assert list(tmp_path.iterdir()) == [path]
    assert "A &lt;title&gt;" in text
    assert "fails &lt;for&gt; one" in text


def test_the_page_says_what_was_run_and_what_failed(result, tmp_path):
    result.to_html(tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    for expected in (
        "norman_ood",
        "scvi-tools",
        "RuntimeError: it does not converge",
        "half of the test cells",
        ">chance<",
        "root mean squared error of mean log1p expression",
    ):
        assert expected in text


def test_tables(result, tmp_path):
    result.to_csv(tmp_path / "scores.csv")
    read = pd.read_csv(tmp_path / "scores.csv", keep_default_na=False, na_values={"value": [""]})
    assert len(read) == len(result.scores)
    assert read["value"].sum() == pytest.approx(result.scores["value"].sum())
    try:
        import pyarrow  # noqa: F401
    except ImportError:
        with pytest.raises(SAMSError, match="pip install pyarrow"):
            result.to_parquet(tmp_path / "scores.parquet")
    else:
        result.to_parquet(tmp_path / "scores.parquet")
        pd.testing.assert_frame_equal(
            pd.read_parquet(tmp_path / "scores.parquet"), result.scores, check_dtype=False
        )


def test_every_metric_of_the_table_is_defined(result):
    defined = result.describe_metrics().set_index(["mode", "metric"])
    summary = result.summary()
    for mode, metric, axis in summary[["mode", "metric", "axis"]].itertuples(index=False):
        assert defined.loc[(mode, metric), "axis"] == axis


def test_a_summary_needs_its_negative_control(result):
    with pytest.raises(SAMSError, match="no method 'nothing'"):
        result.summary(negative="nothing")


def test_a_page_of_controls_only_says_so(result, tmp_path):
    controls = result.scores[
        result.scores["method"].isin(["control mean", "mean of perturbations"])
    ]
    page = tmp_path / "report.html"
    BenchmarkResult(controls, result.runs, result.settings).to_html(page)
    assert "Only the controls have scores" in page.read_text(encoding="utf-8")


def test_dollar_signs_of_names_are_no_formula(result, tmp_path):
    named = {"method": {"collapsed": "a$_$b"}, "perturbation": {"P001": "c$^$d"}}
    scores, runs = result.scores.replace(named), result.runs.replace({"method": named["method"]})
    settings = result.settings | {
        "methods": {named["method"].get(k, k): v for k, v in result.settings["methods"].items()}
    }
    BenchmarkResult(scores, runs, settings).to_html(tmp_path / "report.html")
    assert "a$_$b" in (tmp_path / "report.html").read_text(encoding="utf-8")
