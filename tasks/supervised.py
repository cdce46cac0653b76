"""What training one classifier with SGD is told, whatever else a task does with it: options, optimizer, length."""

from __future__ import annotations

import torch
from pydantic import model_validator
from torch import nn

from tasks.base import Batch, Classes, Epochs, Fraction, NotNegative, Options, Positive, Steps, Width, divisors
from tasks.data import Augmentation
from tasks.fit import Schedule, sgd
from tasks.nets import check_model

REFERENCE_BATCH = 128
"""`learning_rate` is per this many images where `scale_learning_rate` is on."""


class SupervisedOptions(Options):
    """Options that the tasks which train one classifier share.

    Attributes:
        dataset: a name from `run_suite.py data list`; of `digits` its domain mnist.
        num_classes: use the first so many classes only; None: all.
        model: one of tasks.nets.MODELS.
        width: channels of the first stage of our own nets; None: the model's own.
        epochs: passes over the training part; its last images that fill no batch are left out of each.
        max_steps: end (and the schedule's end) after so many updates at the latest; None: no limit.
        batch_size: images per update.
        norm_batch_size: images that share statistics in training; None: the SGD batch. It must divide batch_size.
        learning_rate: the schedule's peak, per 128 images.
        scale_learning_rate: multiply the rate by batch_size / 128 (linear scaling); off: take it as it is.
        momentum: Nesterov.
        weight_decay: of weights; never of biases.
        norm_weight_decay: decay every parameter of every norm, too.
        schedule: see tasks.fit.learning_rate_at.
        warmup: fraction of all steps before the peak.
        augmentation: of training images, see tasks.data.batches.augment.
        channels_last: memory format of images and weights.
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
    schedule: Schedule = "cosine"
    warmup: Fraction[float] = 0.1
    augmentation: Augmentation = "crop"
    channels_last: bool = True

    @model_validator(mode="after")
    def _trainable(self) -> SupervisedOptions:
        check_model(self.model, self.width)
        if self.norm_batch_size is not None and self.batch_size % self.norm_batch_size:
            raise ValueError(
                f"norm_batch_size {self.norm_batch_size} does not divide batch_size {self.batch_size}; "
                f"allowed: {divisors(self.batch_size, self.norm_batch_size)}"
            )
        return self

    @property
    def shared(self) -> int:
        """Images that share statistics: the norm batch."""
        return self.norm_batch_size or self.batch_size

    @property
    def slices(self) -> int:
        """Norm batches in an SGD batch."""
        return self.batch_size // self.shared

    @property
    def peak_learning_rate(self) -> float:
        return self.learning_rate * (self.batch_size / REFERENCE_BATCH if self.scale_learning_rate else 1)

    @property
    def memory_format(self) -> torch.memory_format:
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def total_steps(self, images: int) -> int:
        """Updates on so many training images."""
        whole = self.epochs * (images // self.batch_size)
        return whole if self.max_steps is None else min(whole, self.max_steps)

    def optimizer(self, net: nn.Module) -> torch.optim.SGD:
        return sgd(
            net,
            learning_rate=self.peak_learning_rate,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            norm_weight_decay=self.norm_weight_decay,
        )
