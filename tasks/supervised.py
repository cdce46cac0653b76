"""The training of one classifier, as four tasks share it: its options, and the optimizer, rate and length they mean."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, Self

import torch
from pydantic import AfterValidator, ModelWrapValidatorHandler, model_validator
from torch import nn

from norms.workers import Workers
from tasks.data import Augmentation
from tasks.nets.models import check_model
from tasks.options import (
    NEWER,
    Batch,
    Betas,
    Classes,
    Epochs,
    Fraction,
    Milestones,
    NotNegative,
    Options,
    Positive,
    Steps,
    Width,
    WorkerCount,
    divisors,
    newer_options,
)
from tasks.schedule import (
    BETAS,
    MILESTONES,
    Schedule,
    adamw,
    check_optimizer,
    learning_rate_at,
    registered_optimizer,
    sgd,
)
from tasks.step import Precision, StepOptions

REFERENCE_BATCH = 128
"""`learning_rate` is per this many images where `scale_learning_rate` is on."""


class SupervisedOptions(Options):
    """Options shared by every task that trains one classifier.

    Attributes:
        dataset: a name from `run_suite.py data list`; of `digits` its domain mnist.
        num_classes: use the first so many classes only; None: all.
        model: one of tasks.nets.models.MODELS, one that a plugin registered, or timm:NAME.
        width: channels of the first stage of our own nets; None: the model's own.
        epochs: passes over the training part; its last images that fill no batch are left out of each.
        max_steps: end (and the schedule's end) after so many updates at the latest; None: no limit.
        batch_size: images per update, of all workers.
        norm_batch_size: images that share statistics in training; None: the SGD batch, or a worker's part of it. It
            must divide that.
        learning_rate: the schedule's peak, per 128 images.
        scale_learning_rate: multiply the rate by batch_size / 128 (linear scaling); off: take it as it is.
        optimizer: "sgd", "adamw" (Loshchilov & Hutter 2019), whose decay is decoupled from the gradient, or one that a
            plugin registered (tasks.schedule.register_optimizer).
        momentum: of sgd, Nesterov; 0.9, whatever was given, for any other.
        betas: of adamw; null: (0.9, 0.999), or it is not adamw.
        weight_decay: of weights; never of biases.
        norm_weight_decay: decay every parameter of every norm, too.
        schedule: see tasks.schedule.learning_rate_at.
        warmup: fraction of all steps before the peak.
        milestones: of the schedule "steps", rising fractions of all steps; null: (0.5, 0.75).
        gradient_clip: largest norm of an update's gradient; null: no limit.
        precision: "bfloat16" runs forwards under autocast, in training and in evaluation.
        compile: torch.compile for the network. Sums are then rounded in another order.
        augmentation: of training images, see tasks.data.batches.augment.
        channels_last: memory format of images and weights.
        workers: processes that train the network together, each on batch_size / workers images of every update: worker
            r has x[r::workers] of a batch x. Statistics are each worker's own ("images per GPU"). The run's
            step_seconds and peak_memory_mb are those of the first one.
        sync_norms: statistics are those of all workers together: the norm batch is the SGD batch. False where one
            process trains, whatever was given.
    """

    dataset: str = "fashion_mnist_mini"
    num_classes: Classes[int | None] = None
    model: str = "resnet8"
    width: Width[int | None] = None
    epochs: Epochs[int] = 10
    max_steps: Steps[int | None] = None
    batch_size: Batch[int] = 128
    norm_batch_size: Batch[int | None] = None
    learning_rate: Positive[float] = 0.1
    scale_learning_rate: bool = True
    momentum: Fraction[float] = 0.9
    weight_decay: NotNegative[float] = 5e-4
    norm_weight_decay: bool = False
    optimizer: Annotated[str, AfterValidator(check_optimizer), NEWER] = "sgd"
    betas: Annotated[Betas | None, NEWER] = None
    schedule: Schedule = "cosine"
    warmup: Fraction[float] = 0.1
    milestones: Annotated[Milestones, NEWER] = None
    gradient_clip: Annotated[Positive[float | None], NEWER] = None
    precision: Annotated[Precision, NEWER] = "float32"
    compile: Annotated[bool, NEWER] = False
    augmentation: Augmentation = "crop"
    channels_last: bool = True
    workers: Annotated[WorkerCount[int], NEWER] = 1
    sync_norms: Annotated[bool, NEWER] = False

    @model_validator(mode="wrap")
    @classmethod
    def _of_use(cls, given: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        """Options that the optimizer or the schedule does not use go back to their defaults, so that a grid over them
        repeats no run."""
        checked = handler(given)  # what is not used may not be wrong either
        if not isinstance(given, dict):
            return checked
        used_by = {"momentum": "sgd", "betas": "adamw"}
        unused = {option for option, optimizer in used_by.items() if checked.optimizer != optimizer}
        if checked.workers == 1:
            unused.add("sync_norms")
        if checked.betas == BETAS:
            unused.add("betas")
        spelt_out = "milestones" not in newer_options(cls)  # a task's own field, which its records hold
        if checked.schedule != "steps" or (checked.milestones == MILESTONES and not spelt_out):
            unused.add("milestones")
        return handler({key: value for key, value in given.items() if key not in unused})

    @model_validator(mode="after")
    def _trainable(self) -> SupervisedOptions:
        check_model(self.model, self.width)
        if self.workers > 1:
            self._check_workers()
        part = self.batch_size // self.workers
        if self.norm_batch_size is not None and not self.sync_norms and part % self.norm_batch_size:
            of = f" / workers = {part}" if self.workers > 1 else f" {part}"
            raise ValueError(
                f"norm_batch_size {self.norm_batch_size} does not divide batch_size{of}; "
                f"allowed: {divisors(part, self.norm_batch_size)}"
            )
        return self

    def _check_workers(self) -> None:
        if self.compile:
            raise ValueError(
                f"compile: true with workers: {self.workers}: within a forward the norms of several workers ask each "
                "other, which can not be compiled; leave one of the two out"
            )
        if self.sync_norms:
            if self.norm_batch_size not in (None, self.batch_size):
                raise ValueError(
                    f"norm_batch_size {self.norm_batch_size} with sync_norms: statistics are those of all workers, of "
                    f"batch_size {self.batch_size} images; leave norm_batch_size out, or sync_norms"
                )
        elif self.batch_size % self.workers:
            raise ValueError(
                f"workers {self.workers} do not divide batch_size {self.batch_size}, and each needs as many images as "
                f"the others unless sync_norms is set; allowed: {divisors(self.batch_size, self.workers)}"
            )

    @property
    def norm_batch(self) -> int:
        """The images that share statistics in a training forward."""
        return self.norm_batch_size or (self.batch_size if self.sync_norms else self.batch_size // self.workers)

    @property
    def slices(self) -> int:
        """The number of norm batches in an SGD batch, or in a worker's part of it."""
        return 1 if self.sync_norms else self.batch_size // self.workers // self.norm_batch

    @property
    def asked_workers(self) -> Workers:
        """The workers as the first of them sees them, for questions whether a norm can train with them."""
        return Workers(0, self.workers, self.sync_norms)

    @property
    def design(self) -> str:
        """The norm batch beside the SGD batch, in words."""
        if self.sync_norms:
            return f"statistics of all {self.workers} workers"
        if self.workers > 1:
            return f"norm batch {self.norm_batch} on each of {self.workers} workers"
        return "norm batch < SGD batch" if self.slices > 1 else "norm batch = SGD batch"

    @property
    def design_of_workers(self) -> dict[str, str]:
        """The evidence "design" of a task that says it of workers alone."""
        return {"design": self.design} if self.workers > 1 else {}

    @property
    def peak_learning_rate(self) -> float:
        return self.learning_rate * (self.batch_size / REFERENCE_BATCH if self.scale_learning_rate else 1)

    @property
    def memory_format(self) -> torch.memory_format:
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def backbone(self, classes: int, channels: int) -> dict[str, Any]:
        """The arguments of tasks.nets.models.build_net for images of so many classes and channels."""
        return {"model": self.model, "width": self.width, "num_classes": classes, "in_channels": channels}

    def total_steps(self, images: int) -> int:
        """The number of updates of a training on so many images."""
        whole = self.epochs * (images // self.batch_size)
        return whole if self.max_steps is None else min(whole, self.max_steps)

    def trained_by(self, net: nn.Module) -> torch.optim.Optimizer:
        """The optimizer of a network, or of a part of one; its rate is set by the loop."""
        groups: dict[str, Any] = {"weight_decay": self.weight_decay, "norm_weight_decay": self.norm_weight_decay}
        if self.optimizer == "adamw":
            return adamw(net, learning_rate=self.peak_learning_rate, betas=self.betas or BETAS, **groups)
        if self.optimizer != "sgd":
            return registered_optimizer(self.optimizer, net, learning_rate=self.peak_learning_rate, **groups)
        return sgd(net, learning_rate=self.peak_learning_rate, momentum=self.momentum, **groups)

    def rate(self, progress: float) -> float:
        """The learning rate after this fraction of all steps."""
        milestones = MILESTONES if self.milestones is None else self.milestones
        return learning_rate_at(progress, self.peak_learning_rate, self.schedule, self.warmup, milestones)

    @property
    def told(self) -> StepOptions:
        """The options of an update; a task adds its domains."""
        return StepOptions(self.slices, precision=self.precision, gradient_clip=self.gradient_clip)

    def told_with(self, workers: Workers) -> StepOptions:
        """The options of an update that these workers make together."""
        return replace(self.told, workers=workers)

    def ready(self, net: nn.Module) -> nn.Module:
        """`net` itself in the options' memory format, compiled at its first forward where that is asked for."""
        net = net.to(memory_format=self.memory_format)
        if self.compile:
            net.compile()
        return net
