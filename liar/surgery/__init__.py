"""Cutting models: layers to the kept units, and what the stock class can still build."""

from liar.surgery.cut import adopt, all_or_nothing, check_adoptable, copy_block, copy_dense, cut_site, remove, update_config
from liar.surgery.heads import selection_of
from liar.surgery.stock import (
    OPTIONAL_PARTS,
    Width,
    accepts,
    build_stock,
    kind_sizes,
    patterns_of,
    scaled_sizes,
    stock_class,
    stock_counts,
    uniform_sizes,
)

__all__ = [
    "OPTIONAL_PARTS",
    "Width",
    "accepts",
    "adopt",
    "all_or_nothing",
    "build_stock",
    "check_adoptable",
    "copy_block",
    "copy_dense",
    "cut_site",
    "kind_sizes",
    "patterns_of",
    "remove",
    "scaled_sizes",
    "selection_of",
    "stock_class",
    "stock_counts",
    "uniform_sizes",
    "update_config",
]
