"""Finding the table of an unknown family by running a model and changing single channels."""

from liar.tracing.proposal import discover, propose_family

__all__ = ["discover", "propose_family"]
