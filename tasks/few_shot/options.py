"""The options of the task `few_shot`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from pydantic import Field, ModelWrapValidatorHandler, model_validator
from torch import nn

from tasks.data import Augmentation
from tasks.options import (
    NEWER,
    Batch,
    Betas,
    Classes,
    Count,
    Fraction,
    LeftOut,
    Milestones,
    NotNegative,
    Options,
    Positive,
    Steps,
    Width,
    only_used,
)
from tasks.schedule import BETAS, MILESTONES, Schedule, adamw, learning_rate_at, parameter_groups, sgd
from tasks.step import Precision, StepOptions

LARGEST_EPISODE = 2**17
"""Images, as many as of a batch."""
OF_METHODS: dict[str, dict[str, Any]] = {
    "prototypical": {"train_way": None, "train_queries": None, "meta_batch_size": 1},
    "maml": {
        "train_queries": None,
        "meta_batch_size": 4,
        "order": "first",
        "inner_learning_rate": 0.1,
        "inner_steps": 5,
        "test_inner_steps": None,
        "inner_statistics": "shared",
    },
    "imprinting": {"imprinting_batch_size": 64},
}
"""method -> the options of its training, with defaults; options of other methods are null."""
MOMENTUM = 0.9
PLAIN = StepOptions()
"""The options of an update without precision, clipping or domain."""


class FewShotOptions(Options):
    """Options of one run: training on some classes, then episodes of others.

    Attributes:
        dataset: glyphs, omniglot, or a folder whose splits share no class (mini-ImageNet, CUB).
        method: "prototypical" (Snell et al. 2017), "maml" (Finn et al. 2017), "imprinting" (Qi et al. 2018).
        model: "conv4" or "resnet12".
        width: channels of the first stage; None: 64.
        way, shot, queries: classes of an episode, support and query images of each class.
        train_way: classes of a training episode; None: way. Prototypical only: a MAML head has `way` outputs.
        train_queries: None: queries.
        test_episodes, val_episodes: the same for every norm.
        steps: updates.
        meta_batch_size: training episodes per update; None: 1, with maml 4.
        learning_rate: the schedule's peak.
        schedule, warmup: see tasks.schedule.learning_rate_at.
        weight_decay: of weights; never of biases.
        norm_weight_decay: decay every parameter of every norm, too.
        optimizer: "adam" (Kingma & Ba 2015, whose decay is part of the gradient), "adamw" (Loshchilov & Hutter 2019,
            whose decay is not) or "sgd"; of MAML the outer loop's, the inner one takes plain steps.
        momentum: of sgd, Nesterov, 0.9 unless given; else null.
        betas: of adam and adamw; null: (0.9, 0.999), and for sgd.
        milestones: of the schedule "steps", rising fractions of all steps; null: (0.5, 0.75).
        gradient_clip: largest norm of an update's gradient; null: no limit.
        precision: "bfloat16" runs forwards under autocast, in training and in evaluation; distances, cosines and losses
            are float32.
        compile: torch.compile for the embedding. Sums are then rounded in another order. Not for maml, which trains
            clones of the network.
        augmentation: of all training images, see tasks.data.batches.augment; None: training is as the test is, with
            supports as stored and queries (imprinting: all images) as `query_augmentation` makes them.
        query_augmentation: of queries: "affine" makes each a random affine of a stored image, in validation and test
            drawn once by name; "none" takes stored images as they are.
        inductive_statistics: what norms with running statistics use for inductive accuracy: "running", those of
            training, or "support", re-estimated on the support of each episode alone.
        channels_last: memory format of images and weights; None: what is faster on a CPU, which is off for maml (its
            batches are small and are differentiated twice) and on for the others.
        order: of MAML's gradient: "first" (unless given) or "second".
        inner_learning_rate, inner_steps: of MAML's adaptation; 0.1 and 5 unless given.
        test_inner_steps: steps of adaptation in validation and test; None: inner_steps.
        inner_statistics: what MAML's inner loop does to running statistics: "shared" (unless given): its forwards move
            the one set that the forwards of queries move, too; "per_step": every step has a set of its own (Antoniou
            et al. 2019), the forward of queries the last; "none": it moves nothing, queries alone do.
            The last two differ only for norms that use running statistics in training.
        imprinting_batch_size: images per update of the base classifier, 64 unless given.

    What the method does not use is null, whatever was given, so that a grid over it repeats no run and no table shows
    it.
    """

    dataset: str = "glyphs"
    method: Literal["prototypical", "maml", "imprinting"] = "prototypical"
    model: Literal["conv4", "resnet12"] = "conv4"
    width: Annotated[Width[int | None], Field(ge=2)] = None
    way: Classes[int] = 5
    shot: Count[int] = 1
    queries: Count[int] = 15
    train_way: Classes[int | None] = None
    train_queries: Count[int | None] = None
    test_episodes: Annotated[Count[int], Field(ge=2)] = 600
    val_episodes: Annotated[Count[int], Field(ge=2)] = 200

    steps: Steps[int] = 2000
    meta_batch_size: Count[int | None] = None
    learning_rate: Positive[float] = 1e-3
    schedule: Schedule = "cosine"
    warmup: Fraction[float] = 0.0
    weight_decay: NotNegative[float] = 5e-4
    norm_weight_decay: bool = False
    augmentation: Augmentation | None = None
    query_augmentation: Literal["none", "affine"] = "affine"
    inductive_statistics: Literal["running", "support"] = "running"
    channels_last: bool | None = None
    optimizer: Annotated[Literal["adam", "adamw", "sgd"], NEWER] = "adam"
    momentum: Annotated[Fraction[float | None], NEWER] = None
    betas: Annotated[Betas | None, NEWER] = None
    milestones: Annotated[Milestones, NEWER] = None
    gradient_clip: Annotated[Positive[float | None], NEWER] = None
    precision: Annotated[Precision, NEWER] = "float32"
    compile: Annotated[bool, NEWER] = False

    order: Literal["first", "second"] | None = None
    inner_learning_rate: Positive[float | None] = None
    inner_steps: Count[int | None] = None
    test_inner_steps: Count[int | None] = None
    inner_statistics: Literal["shared", "per_step", "none"] | None = None
    imprinting_batch_size: Annotated[Batch[int | None], Field(ge=2)] = None

    @model_validator(mode="wrap")
    @classmethod
    def _null_where_unused(cls, given: Any, handler: ModelWrapValidatorHandler[FewShotOptions]) -> FewShotOptions:
        checked = handler(given)  # what is not used may not be wrong either
        if not isinstance(given, dict):
            return checked
        conditional = {name for names in OF_METHODS.values() for name in names}
        return handler(only_used(given, checked._used, conditional | {"momentum", "betas", "milestones"}))

    @property
    def _used(self) -> dict[str, Any]:
        """The options in use of those that may be without -> default."""
        used = dict(OF_METHODS[self.method])
        if self.optimizer == "sgd":
            used["momentum"] = MOMENTUM
        elif self.betas != BETAS:
            used["betas"] = None
        if self.schedule == "steps" and self.milestones != MILESTONES:
            used["milestones"] = None
        return used

    @model_validator(mode="after")
    def _consistent(self) -> FewShotOptions:
        for way, queries in ((self.way, self.queries), (self.training_way, self.training_queries)):
            if (images := way * (self.shot + queries)) > LARGEST_EPISODE:
                raise ValueError(
                    f"{way} classes of {self.shot} support and {queries} query images make an episode of {images}; "
                    f"at most {LARGEST_EPISODE} are forwarded together"
                )
        if self.compile and self.method == "maml":
            raise LeftOut(
                "method maml trains clones of its network, which torch.compile does not reach: compile: false"
            )
        steps = self.inner_steps
        if steps is not None and self.inner_statistics == "per_step" and self.adaptation > steps:
            raise ValueError(
                f"test_inner_steps {self.adaptation} exceeds inner_steps {self.inner_steps}: with inner_statistics "
                "per_step there are no statistics for the steps beyond"
            )
        return self

    @property
    def support_augmentation(self) -> str:
        """Of training supports."""
        return self.augmentation or "none"

    @property
    def training_augmentation(self) -> str:
        """Of training queries, and of imprinting's training images."""
        return self.augmentation or self.query_augmentation

    @property
    def training_way(self) -> int:
        return self.train_way or self.way

    @property
    def training_queries(self) -> int:
        return self.train_queries or self.queries

    @property
    def episodes_per_step(self) -> int:
        return self.meta_batch_size or 1

    @property
    def adaptation(self) -> int:
        """Steps of adaptation in validation and test."""
        return self.test_inner_steps or self.inner_steps or 0

    @property
    def norm_batch(self) -> int:
        """Images that share statistics in a training forward; of MAML's two forwards the smaller, the support's."""
        if self.method == "imprinting":
            return self.imprinting_batch_size or 0
        if self.method == "maml":
            return self.way * self.shot
        return self.training_way * (self.shot + self.training_queries)

    @property
    def memory_format(self) -> torch.memory_format:
        wanted = self.method != "maml" if self.channels_last is None else self.channels_last
        return torch.channels_last if wanted else torch.contiguous_format

    @property
    def told(self) -> StepOptions:
        """The options of an update."""
        return StepOptions(precision=self.precision, gradient_clip=self.gradient_clip)

    def trained_by(self, net: nn.Module) -> torch.optim.Optimizer:
        """The optimizer of a network; its rate is set by the loop."""
        decay: dict[str, Any] = {"weight_decay": self.weight_decay, "norm_weight_decay": self.norm_weight_decay}
        if self.optimizer == "sgd":
            return sgd(net, learning_rate=self.learning_rate, momentum=self.momentum or 0.0, **decay)
        betas = self.betas or BETAS
        if self.optimizer == "adamw":
            return adamw(net, learning_rate=self.learning_rate, betas=betas, **decay)
        return torch.optim.Adam(parameter_groups(net, **decay), lr=self.learning_rate, betas=betas)

    def rate(self, progress: float) -> float:
        """The learning rate after this fraction of all steps."""
        milestones = MILESTONES if self.milestones is None else self.milestones
        return learning_rate_at(progress, self.learning_rate, self.schedule, self.warmup, milestones)
