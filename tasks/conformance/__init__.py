"""The checks that every task must pass, built-in or a user's own: what it promises against what small runs of it do.

cases.py    what each task is checked with: options that make its runs small, labels that it must not learn from
planted.py  the few planted images
subject.py  how a task is made to run: small, watched, and stopped wherever one wants it
equal.py    what two equal runs must not differ in
facts.py    one function per fact, their order, and what usually causes a false one
check.py    the checks themselves
"""

from __future__ import annotations

from tasks.conformance.cases import small_options
from tasks.conformance.check import Check, check_task, subjects
from tasks.conformance.equal import differing
from tasks.conformance.facts import FACTS
from tasks.conformance.subject import Stopped, TooLong, reread

__all__ = ["FACTS", "Check", "Stopped", "TooLong", "check_task", "differing", "reread", "small_options", "subjects"]
