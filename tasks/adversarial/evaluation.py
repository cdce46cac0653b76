"""All attacks on one fixed, ordered set of images: what is left correct under each, and under the worst for an image.

An attack's figure is the fraction of images that are classified correctly as they are *and* as the attack returns them
(the ball holds the image itself), so every attack is shown the correctly classified images only, all of them. The
verdict on an example is the network's own, in the same fixed batches, and never the attack's.

Several workers of a run share the batches, batch i being that of worker i % W; every batch has draws of its own, so
that the figures do not depend on who attacks it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from norms.situation import predict
from norms.workers import ALONE
from tasks.adversarial.crafting import check_examples, crafting
from tasks.adversarial.ensemble import BLACK_BOX, Part, Scale, attack
from tasks.adversarial.pgd import cross_entropy, input_gradient, pgd, uniform_start
from tasks.evaluate import EVALUATION_BATCH, evaluating
from tasks.step import StepOptions, told
from tasks.workers import rows

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Attacks:
    """The attacks of an evaluation and their strength; epsilon and step sizes in units of [0, 1] images.

    Args:
        epsilon: radius of the ball.
        pgd_steps, pgd_step_size, pgd_restarts: of PGD on the cross entropy, each restart from its own uniform start.
        parts: of AutoAttack.
        scale: the effort of the parts.
    """

    epsilon: float
    pgd_step_size: float
    pgd_steps: int = 20
    pgd_restarts: int = 1
    parts: Sequence[Part] = ()
    scale: Scale = field(default_factory=Scale)


@dataclass(frozen=True)
class Robustness:
    """The images that stay right without and under each attack, bool (N,) each.

    Args:
        clean: without any attack.
        attacks: name ("fgsm", "pgd", a part of AutoAttack) -> right without and under it.
        useless_gradients: the cross entropy's gradient at the image is zero everywhere, or not finite somewhere.
    """

    clean: Tensor
    attacks: dict[str, Tensor]
    useless_gradients: Tensor

    def top1(self, *names: str) -> float:
        """Fraction of images right without an attack and under all the named ones."""
        return self._count(names) / len(self.clean)

    @property
    def robust_top1(self) -> float:
        """Worst case per image over all attacks."""
        return self.top1(*self.attacks)

    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval (Wilson 1927) of the worst case's fraction, from the images alone: not over seeds."""
        from scipy.stats import binomtest  # here: it takes half a second to import, which planning does not need

        found = binomtest(self._count(self.attacks), len(self.clean))
        low, high = found.proportion_ci(CONFIDENCE, method="wilson")
        return float(low), float(high)

    def signs_of_masking(self) -> list[str]:
        """Signs of masked gradients, which make robustness look larger than it is (Athalye et al. 2018,
        arXiv:1802.00420)."""
        signs = []
        if useless := int((self.useless_gradients & self.clean).sum()):
            signs.append(
                f"zero or non-finite gradients at {useless} of {int(self.clean.sum())} correctly classified images"
            )
        white = {name: self._count([name]) for name in self.attacks if name != BLACK_BOX}
        if BLACK_BOX in self.attacks and white and (black := self._count([BLACK_BOX])) < min(white.values()):
            signs.append(
                f"a black-box attack leaves {black} images right, the best white-box one {min(white.values())}"
            )
        if {"fgsm", "pgd"} <= white.keys() and white["fgsm"] < white["pgd"]:
            signs.append(f"one step leaves {white['fgsm']} images right, many steps {white['pgd']}")
        return signs

    def _count(self, names: Sequence[str] | dict[str, Tensor]) -> int:
        right = self.clean.clone()
        for name in names:
            right &= self.attacks[name]
        return int(right.sum())


PLAIN = StepOptions()
"""Options of forwards without a domain, in float32."""
Once = Callable[[str, Callable[[], Tensor]], Tensor]
"""(name, measure) -> measure(), or what it gave in an earlier process (Journal.once)."""


def evaluate_robustness(
    net: nn.Module,
    images: Tensor,
    labels: Tensor,
    attacks: Attacks,
    generator: Callable[[str], torch.Generator],
    options: StepOptions = PLAIN,
    once: Once = lambda name, measure: measure(),
) -> Robustness:
    """Attack every correctly classified image with everything.

    Args:
        net: images in [0, 1] -> logits (N, K); every attack meets it in evaluation mode.
        images: (N, C, H, W) in [0, 1], attacked in this order, EVALUATION_BATCH at a time.
        labels: (N,).
        attacks: all attacks, with their strength.
        generator: purpose -> CPU generator (RunContext.generator). Starts of PGD are drawn for all images at once, so
            that an image has the same start whichever others are still right.
        options: domain and precision of every forward, of attacked images and of others: one network is attacked. Of
            its workers each has all images, and returns the whole.
        once: keeps what each attack left right, so that an interrupted run repeats none that is finished. Their names:
            "attack fgsm", "attack pgd 0", ..., "attack square", and "attack clean" and "attack gradients" around them.

    Raises:
        RuntimeError: an attack returned an example outside of its ball or changed the network.
        ValueError: no gradient reaches the images; torchattacks is missing.
    """
    epsilon = attacks.epsilon
    seeds = part_seeds(attacks, generator)

    def fgsm(net: nn.Module, x: Tensor, y: Tensor, start: Tensor | None) -> Tensor:
        return pgd(net, x, cross_entropy(y), epsilon=epsilon, step_size=epsilon, steps=1)

    def pgd_from(net: nn.Module, x: Tensor, y: Tensor, start: Tensor | None) -> Tensor:
        step = attacks.pgd_step_size
        return pgd(net, x, cross_entropy(y), epsilon=epsilon, step_size=step, steps=attacks.pgd_steps, start=start)

    def part_of(part: Part) -> Attack:
        def run(net: nn.Module, x: Tensor, y: Tensor, start: Tensor | None) -> Tensor:
            return attack(part, net, x, y, epsilon=epsilon, seed=seeds[part], scale=attacks.scale)

        return run

    def kept(name: str, measure: Callable[[], Tensor]) -> Tensor:
        return once(f"attack {name}", measure).to(images.device)

    def surviving(name: str, which: Tensor, run: Attack, what: str, started: bool = False) -> Tensor:
        def measure() -> Tensor:
            start = uniform_start(images, epsilon, generator(f"attack {name}")) if started else None
            return which & _survivors(net, images, labels, which, run, epsilon, what, options, start)

        return kept(name, measure)

    clean = left = kept("clean", lambda: _right(net, images, labels, options))
    found = {"fgsm": surviving("fgsm", clean, fgsm, "FGSM")}
    for restart in range(attacks.pgd_restarts):
        left = surviving(f"pgd {restart}", left, pgd_from, "PGD", started=True)
    found["pgd"] = left
    for part in attacks.parts:
        found[part] = surviving(part, clean, part_of(part), part)
    useless = kept("gradients", lambda: _useless(net, images, labels, options))
    return Robustness(clean.cpu(), {name: right.cpu() for name, right in found.items()}, useless.cpu())


def part_seeds(attacks: Attacks, generator: Callable[[str], torch.Generator]) -> dict[str, int]:
    """The seed of each part of AutoAttack, derived from its name and the run's seed."""
    return {part: generator(f"attack {part}").initial_seed() % 2**31 for part in attacks.parts}


def pgd_only(attacks: Attacks) -> Attacks:
    """The same without AutoAttack and with one restart: what validation images are attacked with."""
    return dataclasses.replace(attacks, parts=(), pgd_restarts=1)


Attack = Callable[[nn.Module, Tensor, Tensor, Tensor | None], Tensor]
"""(net, images, labels, starts or None) -> examples"""


def _survivors(
    net: nn.Module,
    images: Tensor,
    labels: Tensor,
    which: Tensor,
    run: Attack,
    epsilon: float,
    what: str,
    options: StepOptions,
    start: Tensor | None = None,
) -> Tensor:
    """Bool (N,): right under the attack; images that are not in `which` are not attacked."""
    examples = images.clone()
    for index in _own(torch.arange(len(images), device=images.device), options):
        index = index[which[index]]
        if not len(index):
            continue
        x = images[index]
        with _attacking(net, options, what):
            made = run(net, x, labels[index], None if start is None else start[index])
        examples[index] = check_examples(made, x, epsilon, what)
    return _right(net, examples, labels, options)


def _attacking(net: nn.Module, options: StepOptions, what: str) -> AbstractContextManager[None]:
    return crafting(net, "eval", what=what, domain=options.domain, precision=options.precision)


@torch.no_grad()
def _right(net: nn.Module, images: Tensor, labels: Tensor, options: StepOptions) -> Tensor:
    with evaluating(net), told(net, images, replace(options, workers=ALONE)):
        found = [predict(net, x).argmax(1, keepdim=True) for x in _own(images, options)]
    return _of_all(found, images, options) == labels


def _useless(net: nn.Module, images: Tensor, labels: Tensor, options: StepOptions) -> Tensor:
    found = []
    for x, y in zip(_own(images, options), _own(labels, options), strict=True):
        with _attacking(net, options, "the gradient check"):
            gradient = input_gradient(net, x.clone().requires_grad_(), cross_entropy(y))
        size = gradient.flatten(1).abs().amax(1)
        found.append(((size == 0) | ~torch.isfinite(size))[:, None])
    return _of_all(found, images, options).bool()


def _own(x: Tensor, options: StepOptions) -> Sequence[Tensor]:
    """The batches of x (N, *) that are this worker's."""
    return x.split(EVALUATION_BATCH)[options.workers.rank :: options.workers.size]


def _of_all(found: Sequence[Tensor], images: Tensor, options: StepOptions) -> Tensor:
    """(N,) of all images, from the (n, 1) of this worker's batches."""
    return rows(found, EVALUATION_BATCH, len(images), options.workers, images.device).flatten()
