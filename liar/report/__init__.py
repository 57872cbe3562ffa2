"""What happened at every site and to the output: as data, as a table, as a figure, as a page."""

from liar.report.plots import plot
from liar.report.quality import METRICS, Measure, Quality
from liar.report.report import CostChange, Report, SiteReport

__all__ = ["METRICS", "CostChange", "Measure", "Quality", "Report", "SiteReport", "plot"]
