"""What happened at every site and to the output: as data, as a table, as a figure, as a page."""

from liar.report.content import CostChange, SiteReport
from liar.report.page import PageSource, write_page
from liar.report.plots import plot
from liar.report.quality import METRICS, Measure, Quality
from liar.report.report import Report

__all__ = ["METRICS", "CostChange", "Measure", "PageSource", "Quality", "Report", "SiteReport", "plot", "write_page"]
