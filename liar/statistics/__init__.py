"""From rows `[tokens, channels]` to sums: everything here is updated token by token and never keeps the rows."""

from liar.statistics.channels import ChannelMoments
from liar.statistics.factor import Factor
from liar.statistics.folds import Folds, Rows
from liar.statistics.moments import Moments
from liar.statistics.normal import Normal

__all__ = ["ChannelMoments", "Factor", "Folds", "Moments", "Normal", "Rows"]
