"""The checks that every task must pass, built-in or a user's own: what it promises against what small runs of it do.

cases.py    options that make a task's runs small, labels that its runs must not learn from
planted.py  the few planted images
subject.py  runs of a task: small, watched, and stopped at any place
equal.py    the comparison of two runs
facts.py    one function per fact, their order, and the usual cause of a false one
check.py    the checks themselves
"""

from __future__ import annotations

from tasks.conformance.cases import small_options
from tasks.conformance.check import Check, check_task, subjects
from tasks.conformance.equal import differing
from tasks.conformance.facts import FACTS
from tasks.conformance.subject import Stopped, TooLong, reread

__all__ = ["FACTS", "Check", "Stopped", "TooLong", "check_task", "differing", "reread", "small_options", "subjects"]
