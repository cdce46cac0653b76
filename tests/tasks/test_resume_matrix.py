"""A run that is stopped and goes on equals one that is not, to the last bit: every task and method with every norm that
it admits.

Each case is stopped six times at most: between updates twice within one epoch and once in a later one, in a forward of
an evaluation after the last update, and after two of the items that are measured then. Training images are shuffled.
Which places these are is drawn for each case. `make slow` has all cases, `make test` those whose norm keeps more than
buffers, and one for each other kind of loop.
"""

import zlib

import pytest

from norms.registry import norm_names, norm_option_defaults
from tasks.conformance import differing, subjects
from tasks.conformance.facts import between_steps, in_evaluation

pytestmark = pytest.mark.usefixtures("one_thread")

MAML = {"method": "maml", "steps": 30, "inner_steps": 2, "test_episodes": 4, "val_episodes": 2}
METHODS = {
    "classification": {"task": "classification"},
    "classification, norm batches": {"task": "classification", "norm_batch_size": 8},
    "classification, adamw": {"task": "classification", "optimizer": "adamw", "gradient_clip": 1.0},
    **{f"adversarial, {m}": {"task": "adversarial", "method": m} for m in ("standard", "pgd", "fgsm_rs", "trades")},
    "adaptation, source_only": {"task": "domain_adaptation", "method": "source_only"},
    **{
        f"adaptation, {m}, {f}": {"task": "domain_adaptation", "method": m, "forward": f}
        for m in ("dann", "cdan_e", "mcd")
        for f in ("joint", "separate")
    },
    "generalization": {"task": "domain_generalization"},
    **{f"search, {order}": {"task": "architecture_search", "order": order} for order in ("first", "second")},
    **{
        f"few-shot, {m}, {s}": {"task": "few_shot", "method": m, "inductive_statistics": s}
        for m in ("prototypical", "imprinting")
        for s in ("running", "support")
    },
    **{
        f"few-shot, maml, {order}, {s}": {"task": "few_shot", **MAML, "order": order, "inner_statistics": s}
        for order in ("first", "second")
        for s in ("shared", "per_step", "none")
    },
    "few-shot, maml, support": {"task": "few_shot", **MAML, "inductive_statistics": "support"},
}
FEW = [
    *(("classification", norm) for norm in ("cbn", "mbn", "mabn", "online", "brn", "bgn")),
    ("classification, adamw", "gn"),
    ("adversarial, trades", "dual_bn"),
    ("adversarial, fgsm_rs", "bn"),
    ("adaptation, mcd, separate", "dsbn"),
    ("adaptation, cdan_e, joint", "transnorm"),
    ("generalization", "bne"),
    ("few-shot, prototypical, running", "tasknorm"),
    ("few-shot, imprinting, support", "bn"),
    ("few-shot, maml, second, per_step", "bn"),
]


def case(find, method, norm):
    options = dict(METHODS[method])
    task = options.pop("task")
    if task == "adversarial" and options["method"] not in ("pgd", "trades"):
        options["steps"] = None
    choice = {norm: {"num_groups": 2} if "num_groups" in norm_option_defaults(norm) else {}}
    return find(task, options, choice)


def admitted(find, method, norm):
    try:
        subject = case(find, method, norm)
    except ValueError:  # of a norm's options, in another number of channels
        return False
    return subject.task.why_not(subject.norm, subject.info, subject.options) is None


def goes_on(find, method, norm):
    subject = case(find, method, norm)
    whole, seed = subject.whole, zlib.crc32(f"{method}, {norm}".encode())
    steps = between_steps(whole.journal.ends, whole.journal.steps_done, seed)
    stops = [*(("step", step) for step in steps), *in_evaluation(whole, 2, seed)]
    assert len(steps) == 3, (whole.journal.ends, steps)
    # global generators are the same in the first process only: sabn draws initial weights from them, as runs seed them
    stopped = subject.run(stops=stops)
    assert stopped.processes == len(stops) + 1, stops
    assert differing(whole, stopped) == [], stops
    assert stopped.updates == whole.updates, stops


def pytest_generate_tests(metafunc):
    """All cases are found, which takes a while, where they are asked for."""
    if metafunc.definition.name == "test_every_method_goes_on_with_every_norm":
        cases = []
        if metafunc.config.option.markexpr != "not slow":
            with subjects() as find:
                cases = [(m, n) for m in METHODS for n in norm_names() if admitted(find, m, n)]
            print(f"\nresumed runs: {len(cases)} cases of {len(METHODS)} methods", flush=True)
        metafunc.parametrize(("method", "norm"), cases)


@pytest.fixture(scope="module")
def find():
    with subjects() as found:
        yield found


@pytest.mark.parametrize(("method", "norm"), FEW)
def test_runs_of_all_kinds_go_on(method, norm, find):
    goes_on(find, method, norm)


@pytest.mark.slow
def test_every_method_goes_on_with_every_norm(method, norm, find):
    goes_on(find, method, norm)


@pytest.mark.slow
def test_there_are_at_least_300_cases_and_every_norm_is_in_them(find):
    found = [(method, norm) for method in METHODS for norm in norm_names() if admitted(find, method, norm)]
    assert len(found) >= 300
    assert {norm for _, norm in found} == set(norm_names())
