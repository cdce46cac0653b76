"""Runs of the two domain tasks that are stopped and go on equal those that are not, to the last bit."""

from dataclasses import replace

import pytest
import torch
from parts import domain_adaptation as adapted
from parts import domain_generalization as generalized
from parts.resuming import results, resumed

from tasks.base import RunContext
from tasks.domain_adaptation import task as domain_adaptation
from tasks.domain_generalization import task as domain_generalization

pytestmark = pytest.mark.usefixtures("one_thread")
SHORT = {"epochs": 2, "augmentation": "crop", "batch_size": 8, "norm_batch_size": 4}
FORWARDS = [("dsbn", "source_only", None), ("dsbn", "dann", "joint"), ("dsbn", "mcd", "joint")]
FORWARDS += [("transnorm", "cdan_e", "separate")]
MORE = [("dsbn", "dann", "separate"), ("dsbn", "mcd", "separate"), ("bn", "mcd", "joint")]
MORE += [("dsbn", "cdan_e", "joint"), ("dsbn", "cdan_e", "separate")]
"""Slow: test_resume_matrix has mcd by separate forwards and cdan_e by joint ones among its few."""


def same(task, norm, options, folder, stops):
    whole = task.run(norm, options, RunContext(torch.device("cpu"), 0, folder, folder))
    stopped, parts = resumed(task, norm, options, stops, folder, data_dir=folder)
    assert parts == len(stops) + 1
    assert results(stopped) == results(whole)


@pytest.mark.parametrize(
    ("name", "method", "forward"),
    [*FORWARDS, *(pytest.param(*case, marks=pytest.mark.slow) for case in MORE)],
)
def test_adaptation_goes_on_within_passes_of_both_domains(name, method, forward, adaptation_domains, tmp_path):
    # 12 batches of the source and 7 of the target in a pass: stopped in the second and the third of the target's
    for domain, size in (("mnist", 100), ("blend", 60)):
        part = adaptation_domains[domain].train
        fewer = replace(part, images=part.images[:size], labels=part.labels[:size])
        adaptation_domains[domain] = replace(adaptation_domains[domain], train=fewer)
    options = adapted.options(method, **SHORT, **({"forward": forward} if forward else {}))
    same(domain_adaptation.TASK, adapted.norm(name, options), options, tmp_path, [5, 9, 16])


@pytest.mark.usefixtures("generalization_domains")
@pytest.mark.parametrize("name", ["bn", "bne", "brn"])
def test_generalization_goes_on_within_passes_of_all_sources(name, tmp_path):
    options = generalized.options(**SHORT)
    same(domain_generalization.TASK, generalized.norm(name), options, tmp_path, [3, 5, 11])


adaptation_domains = adapted.domains
generalization_domains = generalized.domains
