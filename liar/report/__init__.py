"""What happened at every site: as data, as a table, as a figure."""

from liar.report.plots import plot
from liar.report.report import Report, SiteReport

__all__ = ["Report", "SiteReport", "plot"]
