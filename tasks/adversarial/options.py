"""The options of the task `adversarial`. Epsilon and step sizes are in units of 1/255 of a [0, 1] image."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, ModelWrapValidatorHandler, field_validator, model_validator

from tasks.adversarial.ensemble import MOST_TARGETS, PARTS, TARGETED_CLASSES, Part, Scale
from tasks.adversarial.evaluation import Attacks
from tasks.options import Count, Images, Milestones, Positive, only_used
from tasks.schedule import MILESTONES
from tasks.step import StepOptions
from tasks.supervised import SupervisedOptions

LEVELS = 255.0
_N = TypeVar("_N")
Level = Annotated[_N, Field(gt=0, le=LEVELS, allow_inf_nan=False)]
"""A distance between images in units of 1/255."""
SMALLEST_EPSILON = 0.5
"""The smallest radius in use is half a level (robust ImageNet classifiers); what is below was meant for [0, 1]."""
OF_METHODS: dict[str, dict[str, Any]] = {
    "pgd": {"crafting_mode": "eval", "step_size": None, "steps": 10},
    "trades": {"crafting_mode": "eval", "step_size": None, "steps": 10, "trades_beta": 6.0},
    "fgsm_rs": {"crafting_mode": "eval", "step_size": None},
    "standard": {},
}
"""method -> the options of its crafting, with defaults; options of other methods are null."""
OF_PARTS: dict[str, tuple[Any, tuple[Part, ...]]] = {
    "apgd_steps": (100, ("apgd_ce", "apgd_t")),
    "fab_steps": (100, ("fab_t",)),
    "targets": (None, ("apgd_t", "fab_t")),
    "square_queries": (5000, ("square",)),
}
"""Options of AutoAttack's parts: default, and the parts that have it; without such a part they are null."""
CLEAN, ADVERSARIAL = 0, 1
"""Domains of images, for norms that tell them apart (dual_bn), where a method trains on both kinds."""


class AdversarialOptions(SupervisedOptions):
    """Options of one run, adversarial training and then every attack on a fixed set of test images: those of
    SupervisedOptions, and

    Attributes:
        method: "pgd" (Madry et al. 2018) trains on attacked images; "trades" (Zhang et al. 2019) on the images and
            on how far predictions move under attack; "fgsm_rs" (Wong et al. 2020) as pgd with one step from a random
            start; "standard" crafts nothing: the control.
        epsilon: radius of the ball, in training and in evaluation.
        step_size: of crafting in training; None: epsilon / 4, and 1.25 epsilon for fgsm_rs.
        steps: of crafting in training, 10 unless given; fgsm_rs has one.
        crafting_mode: of the network while training examples are crafted: "eval" (running statistics) or "train" (the
            batch's own). Nothing that a norm keeps moves either way. It changes results, so it stands in a column.
        trades_beta: weight of the second term of trades, 6 unless given.
        milestones: of the schedule "steps", fractions of all steps, (0.5, 0.75) unless given.
        attack_images: test images that are attacked, the same for every norm and seed.
        pgd_steps, pgd_step_size, pgd_restarts: of PGD in evaluation; step size None: epsilon / 4.
        autoattack: which of AutoAttack's parts.
        apgd_steps, fab_steps, square_queries: see tasks.adversarial.ensemble.Scale; 100, 100 and 5,000 unless given.
        targets: wrong classes that the targeted parts try; None: all, but at most 9.

    What the method, the schedule or the chosen parts do not use is null, whatever was given, so that a grid over it
    repeats no run and no table shows it.
    """

    method: Literal["pgd", "trades", "fgsm_rs", "standard"] = "pgd"
    epsilon: Level[float] = 8.0
    step_size: Level[float | None] = None
    steps: Count[int | None] = None
    crafting_mode: Literal["eval", "train"] | None = None
    trades_beta: Positive[float | None] = None

    # declared once more since it is older here than the other tasks' field: records hold it as it is used
    milestones: Milestones = None
    attack_images: Annotated[Images[int], Field(ge=2)] = 1000
    pgd_steps: Count[int] = 20
    pgd_step_size: Level[float | None] = None
    pgd_restarts: Count[int] = 5
    autoattack: tuple[Part, ...] = PARTS
    apgd_steps: Count[int | None] = None
    fab_steps: Count[int | None] = None
    targets: Count[int | None] = None
    square_queries: Count[int | None] = None

    @field_validator("autoattack")
    @classmethod
    def _each_part_once(cls, parts: tuple[Part, ...]) -> tuple[Part, ...]:
        if len(set(parts)) < len(parts):
            raise ValueError(f"autoattack names a part twice: {', '.join(parts)}")
        return parts

    @field_validator("epsilon")
    @classmethod
    def _in_levels(cls, epsilon: float) -> float:
        if epsilon < SMALLEST_EPSILON:
            raise ValueError(
                f"epsilon {epsilon:g} is in units of 1/255, at least {SMALLEST_EPSILON:g}; "
                f"{epsilon:g} of a [0, 1] image is epsilon: {epsilon * LEVELS:.3g}"
            )
        return epsilon

    @model_validator(mode="after")
    def _steps_reach_somewhere(self) -> AdversarialOptions:
        """A step size of a [0, 1] image, taken for levels, hardly moves an image."""
        of_method = OF_METHODS[self.method]
        used = self.step_size if "step_size" in of_method else None
        for option, size, steps in (
            ("step_size", used, self.steps or of_method.get("steps", 1)),
            ("pgd_step_size", self.pgd_step_size, self.pgd_steps),
        ):
            if size is not None and size < 1 and size * steps < self.epsilon / 10:
                raise ValueError(
                    f"{option} {size:g} is in units of 1/255, and {steps} such steps go {size * steps:.3g} of epsilon "
                    f"{self.epsilon:g}; {size:g} of a [0, 1] image is {option}: {size * LEVELS:.3g}"
                )
        return self

    @model_validator(mode="wrap")
    @classmethod
    def _null_where_unused(
        cls, given: Any, handler: ModelWrapValidatorHandler[AdversarialOptions]
    ) -> AdversarialOptions:
        checked = handler(given)  # what is not used may not be wrong either
        if not isinstance(given, dict):
            return checked
        parts = tuple(part for part in PARTS if part in checked.autoattack)  # in one order, so that it is one key
        used = dict(OF_METHODS[checked.method])
        used |= {name: default for name, (default, of) in OF_PARTS.items() if set(of) & set(parts)}
        used |= {"milestones": MILESTONES} if checked.schedule == "steps" else {}
        conditional = {"milestones", *OF_PARTS, *(name for names in OF_METHODS.values() for name in names)}
        return handler(only_used({**given, "autoattack": parts}, used, conditional))

    def check_classes(self, classes: int) -> None:
        """ValueError where AutoAttack's targeted parts can not attack a network of so many classes."""
        targeted = [part for part in self.autoattack if part.endswith("_t")]
        if "apgd_t" in targeted and classes < TARGETED_CLASSES:
            raise ValueError(
                f"autoattack: apgd_t needs at least {TARGETED_CLASSES} classes, here are {classes}; name other parts, "
                f"such as autoattack: [{', '.join(part for part in PARTS if part != 'apgd_t')}]"
            )
        if targeted and self.targets is not None and self.targets > classes - 1:
            raise ValueError(f"targets {self.targets}: a network of {classes} classes has {classes - 1} wrong ones")

    @property
    def num_domains(self) -> int:
        """Kinds of images that are trained on: 2 where clean and adversarial ones are forwarded apart, else 1."""
        return 2 if self.method == "trades" else 1

    @property
    def deployed(self) -> int | None:
        """The domain of examples in training and of every image afterwards, since no one tells a deployed network which
        of its inputs were attacked; None where there is one kind."""
        return ADVERSARIAL if self.num_domains == 2 else None

    @property
    def told(self) -> StepOptions:
        return replace(super().told, domain=self.deployed)

    @property
    def told_deployed(self) -> StepOptions:
        """The options of every forward of the deployed network, of attacked images and of others."""
        return StepOptions(domain=self.deployed, precision=self.precision)

    @property
    def radius(self) -> float:
        """Epsilon in units of [0, 1] images."""
        return self.epsilon / LEVELS

    @property
    def training_step_size(self) -> float:
        """Of crafting in training, in units of [0, 1] images."""
        usual = self.epsilon * (1.25 if self.method == "fgsm_rs" else 0.25)
        return (self.step_size or usual) / LEVELS

    def attacks(self, classes: int) -> Attacks:
        """The attacks that evaluate a network of so many classes."""
        targets = min(classes - 1, MOST_TARGETS) if self.targets is None else self.targets
        return Attacks(
            epsilon=self.radius,
            pgd_step_size=(self.pgd_step_size or self.epsilon / 4) / LEVELS,
            pgd_steps=self.pgd_steps,
            pgd_restarts=self.pgd_restarts,
            parts=self.autoattack,
            # a part that is not run needs no scale
            scale=Scale(self.apgd_steps or 1, self.fab_steps or 1, targets, self.square_queries or 1),
        )
