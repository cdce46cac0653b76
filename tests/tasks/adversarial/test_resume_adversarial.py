"""An adversarial run that is stopped, in its training or among its attacks, equals one that is not, to the last bit."""

from collections import Counter

import pytest
import torch
from parts import adversarial as attacked
from parts.norm_choices import TIER1
from parts.resuming import Stopped, reread, results

from norms.registry import make_norm, norm_info, norm_names
from tasks.adversarial import evaluation, training
from tasks.adversarial.ensemble import PARTS
from tasks.adversarial.task import TASK
from tasks.base import RunContext
from tasks.journal import Interrupted

pytestmark = pytest.mark.usefixtures("one_thread", "data")
data = attacked.data

METHODS = ("standard", "pgd", "fgsm_rs", "trades")
STEPS = 10
"""Of a whole run: an epoch of eight, and the second one, which ends early."""
SMALL = {"max_steps": STEPS, "steps": 1, "pgd_steps": 2, "attack_images": 24, "apgd_steps": 2, "square_queries": 4}
ATTACKS = ["FGSM", "PGD", "PGD", "apgd_ce", "square"]
OF_VALIDATION = ["FGSM", "PGD"]


def tiny(name, method, **given):
    slices = {} if norm_info(name).across_iterations else {"norm_batch_size": 16}
    return attacked.options(**{"method": method, "augmentation": "crop_flip", **SMALL, **slices, **given})


def of_two_domains(name, method):
    """The factory, with the two domains of TRADES where the norm has an option for them."""
    setting = {"num_domains": 2} if method == "trades" and "domain" in norm_info(name).needs else {}
    return make_norm(name, **attacked.NORM_OPTIONS.get(name, {}), **setting)


class Halted(Stopped):
    """Told to leave before these updates, and before or inside these parts of the evaluation, each once."""

    def __init__(self, state, steps, before, inside):
        self.before, self.inside = before, inside
        super().__init__(state, steps)

    def at(self, position, row=None):
        super().at(position, row)
        self.leave_in(position.phase, self.before)

    def leave_in(self, part, parts):
        if part in parts:
            parts.remove(part)
            self.leave()


class Watched:
    """What a run does, over all its processes: updates, and attacks by their names."""

    def __init__(self, monkeypatch):
        self.journal, self.updates, self.begun = None, 0, []
        real_step, real_attack = training.adversarial_step, evaluation._survivors
        real_validation = training.evaluate

        def step(*arguments, **facts):
            self.updates += 1
            return real_step(*arguments, **facts)

        def survivors(net, images, labels, which, run, epsilon, what, *others):
            self.begun.append(what)
            made = real_attack(net, images, labels, which, run, epsilon, what, *others)
            self.journal.leave_in(self.journal.position.phase, self.journal.inside)
            return made

        def validation(net, batches, precision, what, *told):
            found = real_validation(net, batches, precision, what, *told)
            self.journal.leave_in(what, self.journal.inside)
            return found

        monkeypatch.setattr(training, "adversarial_step", step)
        monkeypatch.setattr(training, "evaluate", validation)
        monkeypatch.setattr(evaluation, "_survivors", survivors)

    def run(self, factory, options, steps=(), before=(), inside=()):
        """(outcome, number of processes), with networks of its own in each."""
        state, steps, before, inside = None, [("step", step) for step in steps], list(before), list(inside)
        processes = 0
        while True:
            self.journal = Halted(state, steps, before, inside)
            processes += 1
            try:
                made = TASK.run(factory, options, RunContext(torch.device("cpu"), 0, None, None, journal=self.journal))
            except Interrupted:
                state = reread(self.journal.stored)
            else:
                assert not steps + before + inside
                return made, processes


@pytest.fixture
def watched(monkeypatch):
    return Watched(monkeypatch)


def check_resumed(watched, name, method, **given):
    """Twice in the first epoch, in the second one, between two attacks, and inside two."""
    factory, options = of_two_domains(name, method), tiny(name, method, **given)
    whole, _ = watched.run(factory, options)
    stopped, processes = watched.run(
        factory, options, [3, 5, 9], before=["attack pgd 1"], inside=["attack apgd_ce", "val attack fgsm"]
    )
    assert processes == 7
    assert results(stopped) == results(whole)


@pytest.mark.parametrize(
    ("method", "name"),
    [("standard", "bgn"), ("pgd", "brn"), ("fgsm_rs", "cbn"), ("trades", "dual_bn")],
)
def test_a_run_goes_on_within_its_epochs_and_attacks(watched, method, name):
    check_resumed(watched, name, method)


def test_what_a_training_is_told_goes_on_too(watched):
    """The moments of AdamW, and statistics in bfloat16's forwards, crafted in training mode."""
    told = {"optimizer": "adamw", "learning_rate": 0.01, "gradient_clip": 0.5, "schedule": "steps"}
    check_resumed(watched, "bn", "pgd", crafting_mode="train", precision="bfloat16", **told)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", norm_names())
def test_every_norm_goes_on_within_its_epochs_and_attacks(watched, method, name):
    factory = of_two_domains(name, method)
    if TASK.why_not(factory, norm_info(name), tiny(name, method)) is None:
        check_resumed(watched, name, method)
    else:
        assert name not in TIER1


def test_an_interruption_neither_trains_again_nor_repeats_what_is_finished(watched):
    factory, options = make_norm("bn"), tiny("bn", "pgd")
    whole, _ = watched.run(factory, options)
    assert (watched.updates, watched.begun) == (STEPS, ATTACKS + OF_VALIDATION)
    watched.updates, watched.begun = 0, []
    inside = ["validation after step 8", "attack pgd 0", "attack square", "val attack pgd 0"]
    before = ["attack fgsm", "attack square", "attack gradients"]
    stopped, processes = watched.run(factory, options, before=before, inside=inside)
    assert processes == 8
    assert watched.updates == STEPS
    assert Counter(watched.begun) == Counter(ATTACKS + OF_VALIDATION + ["PGD", "square", "PGD"])  # the last: inside
    assert results(stopped) == results(whole)


def test_what_is_told_of_a_run_names_every_attack():
    told = []

    class Telling(Stopped):
        def at(self, position, row=None):
            super().at(position, row)
            told.append(str(position))

    spec = tiny("gn", "standard", epochs=1, max_steps=2, autoattack=PARTS, fab_steps=1)
    TASK.run(
        of_two_domains("gn", "standard"),
        spec,
        RunContext(torch.device("cpu"), 0, None, None, journal=Telling(None, [])),
    )
    names = ["clean", "fgsm", "pgd 0", "pgd 1", *PARTS, "gradients"]
    light = ["clean", "fgsm", "pgd 0", "gradients"]
    expected = [*(f"attack {name}" for name in names), *(f"val attack {name}" for name in light)]
    assert [line for line in told if "attack" in line] == expected
