"""What a run will need, before it runs: memory, operations, time."""

from liar.planning.places import choose_activations
from liar.planning.plan import Plan, plan, plan_with

__all__ = ["Plan", "choose_activations", "plan", "plan_with"]
