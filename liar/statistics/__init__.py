"""From rows `[tokens, channels]` to sums: everything here is updated token by token and never keeps the rows."""

from liar.statistics.channels import ChannelMoments
from liar.statistics.collectives import Collectives
from liar.statistics.factor import Factor
from liar.statistics.folds import Folds, TokenIndex
from liar.statistics.moments import Moments
from liar.statistics.normal import Normal, check_finite

__all__ = ["ChannelMoments", "Collectives", "Factor", "Folds", "Moments", "Normal", "TokenIndex", "check_finite"]
