"""A student as a file that inference runtimes run in integers; their packages are imported when a file is made."""

from zsq.export.plans import Plan, plan
from zsq.export.targets import DEFAULT, TARGETS, Target, find_target

__all__ = ["DEFAULT", "TARGETS", "Plan", "Target", "find_target", "plan"]
