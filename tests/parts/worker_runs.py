"""Runs and steps of several workers for tests: what each process of `worker_processes.together` does.

Its functions are imported anew in every process, and return numbers, lists and arrays alone.
"""

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from parts import adversarial, domain_adaptation, domain_generalization
from parts.planted import bars, known
from parts.resuming import results
from torch import nn

from norms.registry import make_norm, norm_option_defaults
from norms.workers import ALONE, Workers
from tasks import data as datasets
from tasks import get_task
from tasks.base import Diverged, RunContext
from tasks.conformance import Stopped
from tasks.journal import Interrupted
from tasks.nets.models import build_net
from tasks.step import StepOptions, train_step

SIZE = 16
"""Images of an SGD batch."""
PLANTED = (
    lambda: bars((96, 300, 64), (1, 16, 16)),
    {"mnist": (1.0, 0), "blend": (0.8, 1), "uci": (0.9, 2), "fonts": (0.7, 3)},
)
RUNS = {
    "classification": {
        "dataset": "planted", "width": 4, "epochs": 2, "max_steps": 10, "batch_size": 16, "learning_rate": 0.2,
        "augmentation": "crop_flip", "recalibration_images": 32, "label_smoothing": 0.1, "gradient_clip": 1.0,
    },
    "adversarial": {
        **adversarial.TINY, "batch_size": 16, "augmentation": "crop", "attack_images": 40, "autoattack": ["square"],
        "apgd_steps": None, "epochs": 1, "learning_rate": 0.1,
    },
    "domain_adaptation": {**domain_adaptation.TINY, "batch_size": 16, "mcd_steps": None, "learning_rate": 0.1},
    "domain_generalization": {**domain_generalization.TINY, "epochs": 1, "learning_rate": 0.1},
}  # fmt: skip
"""task -> options of a run of seconds on planted images; of an SGD batch of 16 (of each domain)."""


def norm_of(name):
    small = {"num_groups": 2, "ghost_batch_size": 6}
    return make_norm(name, **{k: v for k, v in small.items() if k in norm_option_defaults(name)})


def network(name):
    """A small network in float64, the same in every process."""
    generator = RunContext(torch.device("cpu"), 0, None, None).generator
    net = build_net("resnet8", norm_of(name), num_classes=3, in_channels=1, width=4, generator=generator)
    return net.double()


def batch(step, size=SIZE):
    draw = torch.Generator().manual_seed(step)
    # images of different means and spreads, so that it counts which of them share statistics
    x = torch.randn(size, 1, 8, 8, generator=draw, dtype=torch.float64)
    x = x * torch.rand(size, 1, 1, 1, generator=draw).double().mul(3) + torch.randn(size, 1, 1, 1, generator=draw)
    return x, torch.randint(3, (size,), generator=draw)


class Descent:
    """Plain gradient descent. torch's optimizers import its compiler when first used, two seconds in each process."""

    def __init__(self, net, rate):
        self.param_groups, self.rate = [{"params": list(net.parameters())}], rate

    def zero_grad(self, set_to_none=True):
        for parameter in self.param_groups[0]["params"]:
            parameter.grad = None

    @torch.no_grad()
    def step(self):
        for parameter in self.param_groups[0]["params"]:
            if parameter.grad is not None:
                parameter.sub_(parameter.grad, alpha=self.rate)


def trained(name, workers, slices, size=SIZE, steps=3):
    """Three updates on this worker's part of each batch.

    Returns:
        {name: array}: the training forwards' logits of the part, gradients after each update, buffers, evaluation
        logits, losses, and counts of right answers.
    """
    net = network(name)
    optimizer = Descent(net, 0.1)
    options = StepOptions(slices, label_smoothing=0.1, gradient_clip=1.0, workers=workers)
    found, logits = {}, []
    handle = net.register_forward_hook(lambda module, inputs, output: logits.append(output.detach()))
    for step in range(1, steps + 1):
        x, y = batch(step, size)
        loss, right = train_step(net, optimizer, workers.share(x), workers.share(y), options, step=step)
        found[f"outputs {step}"] = logits[-1]
        count = len(workers.share(y))
        found[f"loss {step}"] = workers.total(loss.double() * count if count else torch.zeros(()).double()) / size
        found[f"right {step}"] = workers.total(right)
        found |= {f"gradient {step} {n}": p.grad.clone() for n, p in net.named_parameters() if p.grad is not None}
        found |= {f"buffer {step} {n}": b.clone() for n, b in net.named_buffers()}
    handle.remove()
    with torch.no_grad():
        found["evaluation"] = net.eval()(batch(0)[0])
    return {key: value.numpy() for key, value in found.items()}


def all_trained(rank, size, cases):
    """`trained` of each (norm, slices of a worker, sync, images of a batch)."""
    return [trained(name, Workers(rank, size, sync), slices, images) for name, slices, sync, images in cases]


def patched(patch):
    """Planted data under the names that RUNS use, until `patch` is undone."""
    classes, domains = PLANTED
    known(patch, classes())
    load = datasets.load
    held = {d: bars((96, 40, 60), (3, 16, 16), 4, seed, contrast) for d, (contrast, seed) in domains.items()}
    patch.setattr(
        datasets,
        "load",
        lambda name, folder, domain=None, classes=None: (
            load(name, folder, classes=classes) if domain is None else held[domain]
        ),
    )


def made(task, norm, options, workers=ALONE, stops=(), folder=None):
    """A run of RUNS with further options: its results without times (tests.parts.resuming.results), and weights.

    Stopped at places (as tasks.conformance.Stopped has them), all workers go on with the state that the first stored.
    """
    value, state, left = get_task(task), None, list(stops)
    given = value.options(**{**RUNS[task], **options})
    while True:
        journal = Stopped(state, left)
        context = RunContext(torch.device("cpu"), 0, folder, folder, journal=journal, workers=workers)
        torch.manual_seed(7 + len(left))  # a run depends on none of them
        try:
            outcome = value.run(norm_of(norm), given, context)
        except Interrupted:
            state = handed_out(journal.stored, workers, Path(folder) / f"state {len(left)}")
            continue
        except Diverged as error:
            return {"diverged": str(error)}
        metrics, history, _, evidence = results(outcome)
        weights = {k: v.numpy() for k, v in outcome.trained.weights.items()}
        return {"metrics": metrics, "history": history, "evidence": evidence, "weights": weights}


def handed_out(state, workers, file):
    """The first worker's state, on all of them."""
    if not workers.rank:
        torch.save(state, file)
    workers.total(torch.zeros(()))  # nobody reads it before it is there
    return torch.load(file, weights_only=True)


def all_made(rank, size, cases, folder):
    """`made` of each (task, norm, options, stops) with so many workers."""
    torch.use_deterministic_algorithms(True)
    with pytest.MonkeyPatch.context() as patch:
        patched(patch)
        return [
            made(task, norm, {**options, "workers": size}, Workers(rank, size, options.get("sync_norms", False)), stops,
                 folder)
            for task, norm, options, stops in cases
        ]  # fmt: skip


def steps_and_the_rest(rank, size, steps):
    """What the fast tests look at, in one start of the processes."""
    return all_trained(rank, size, steps), met(rank, size)


def met(rank, size):
    """What workers do together beside forwards, each in one call: see tests/tasks/test_workers.py."""
    from tasks import workers as together
    from tasks.evaluate import evaluate

    workers = Workers(rank, size)
    found = {}
    one, two, three = (nn.Parameter(torch.zeros(2, 3).double()) for _ in range(3))
    one.grad = torch.full((2, 3), rank + 1.0).double()
    if rank == size - 1:
        two.grad = torch.arange(6.0).view(2, 3).double()
    single = nn.Parameter(torch.zeros(2))
    single.grad = torch.ones(2)
    together.sum_gradients([one, two, three, single, one], workers)
    found["gradients"] = [None if p.grad is None else p.grad.flatten().tolist() for p in (one, two, three, single)]

    numbers = torch.arange(30.0).view(10, 3)
    own = numbers.split(4)[rank::size]
    found["rows"] = together.rows(own, 4, 10, workers, torch.device("cpu")).tolist()
    found["no rows"] = together.rows(numbers.split(10)[rank::size], 10, 10, workers, torch.device("cpu")).tolist()

    net = nn.Linear(3, 2).double()
    with torch.no_grad():
        net.weight.copy_(torch.arange(6.0).view(2, 3))
        net.bias.zero_()
    images, labels = torch.randn(23, 3, generator=torch.Generator().manual_seed(0)).double(), torch.arange(23) % 2
    batches = list(zip(images.split(5), labels.split(5), strict=True))
    whole, split = evaluate(net, batches), evaluate(net, batches[rank::size], workers=workers)
    found["evaluation"] = [(e.top1, e.loss, e.constant) for e in (whole, split)]
    same = [(torch.zeros_like(x) + 1, y) for x, y in batches]
    found["constant"] = [e.constant for e in (evaluate(net, same), evaluate(net, same[rank::size], workers=workers))]
    # every worker for itself sees one class, and all of them together two
    apart = [(torch.ones(4, 3).double() * (1 if i % size else -1), torch.zeros(4).long()) for i in range(2 * size)]
    found["apart"] = evaluate(net, apart[rank::size], workers=workers).constant
    broken = [(x * (float("nan") if i in (3, 4) else 1), y) for i, (x, y) in enumerate(batches)]
    found["diverged"] = []
    for given, told in ((broken, ALONE), (broken[rank::size], workers)):
        try:
            evaluate(net, given, what="a test", workers=told)
        except Diverged as error:
            found["diverged"].append(str(error))

    found["step"] = []
    for told in (ALONE, workers):
        net = network("none")
        x, y = batch(1)
        x[5] = float("inf")  # in the part of one worker
        optimizer = Descent(net, 0.1)
        before = copy.deepcopy(net.state_dict())
        try:
            train_step(net, optimizer, told.share(x), told.share(y), StepOptions(1, workers=told), step=5)
        except Diverged as error:
            found["step"].append(str(error))
        assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    found["loss of nothing"] = of_nothing(workers)
    return found


def of_nothing(workers):
    """Loss and gradient where only the first worker has a sample."""
    from tasks.workers import shared_loss, sum_gradients

    weight = nn.Parameter(torch.ones(3, 3).double())
    x = torch.ones(0 if workers.rank else 1, 3).double()
    loss = F.cross_entropy(x @ weight, torch.zeros(len(x)).long())
    own, whole = shared_loss(loss, len(x), workers)
    own.backward()
    sum_gradients([weight], workers)
    return [float(whole), weight.grad.flatten().tolist()]
