"""A run that is stopped and goes on equals one that is not, to the last bit."""

import pytest
import torch
from parts import classification as classified
from parts.resuming import results, resumed

from tasks.base import RunContext
from tasks.classification import task as classification

pytestmark = pytest.mark.usefixtures("one_thread", "data")
data = classified.data


@pytest.mark.parametrize("name", ["bn", "bgn", "cbn", "mbn", "brn", "gn"])
def test_classification_goes_on_within_an_epoch(name):
    options = classification.TASK.options(**(classified.TINY | {"augmentation": "crop_flip", "norm_batch_size": 16}))
    norm = classified.factory(name)
    whole = classification.TASK.run(norm, options, RunContext(torch.device("cpu"), 0, None, None))
    stopped, parts = resumed(classification.TASK, norm, options, [3, 10, 12])
    assert parts == 4
    assert results(stopped) == results(whole)
