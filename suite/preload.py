"""Imported once by the fork server, before it forks the first run: what every run would otherwise import for itself."""

from suite.environment import describe, set_allocator

set_allocator()  # before torch allocates anything

import numpy  # noqa: E402, F401
import torch  # noqa: E402, F401
import torchvision  # noqa: E402, F401

import suite.cli  # noqa: E402 - a worker imports its parent's main module, which imports this
import suite.runner  # noqa: E402, F401
from norms.registry import norm_names  # noqa: E402
from tasks import get_task, task_names  # noqa: E402

norm_names()
for _name in task_names():
    get_task(_name)
describe("cpu", 1, "")  # looks up versions and hardware once; forked workers inherit the answers
