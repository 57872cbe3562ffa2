"""Cutting models: layers to the kept units, and what the stock class can still build."""

from liar.surgery.cut import adopt, check_adoptable, copy_block, cut_site, remove, update_config
from liar.surgery.stock import build_stock, scaled_sizes, stock_counts, uniform_sizes

__all__ = [
    "adopt",
    "build_stock",
    "check_adoptable",
    "copy_block",
    "cut_site",
    "remove",
    "scaled_sizes",
    "stock_counts",
    "uniform_sizes",
    "update_config",
]
