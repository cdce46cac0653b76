"""Options of the task `classification`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

from pydantic import model_validator

from tasks.options import Batch, Fraction, Images, divisors
from tasks.step import Precision, StepOptions
from tasks.supervised import SupervisedOptions


class ClassificationOptions(SupervisedOptions):
    """Options of one classification run: those of SupervisedOptions, and

    Attributes:
        label_smoothing: of the training loss; test_loss is without.
        zero_init_last_gamma: residual blocks begin as the identity.
        recalibration_images: training images that statistics are re-estimated on.
        single_class_groups: images x[k::groups] of every training batch x are of one class; None: shuffled. With
            norm_batch_size = batch_size / groups every norm batch is of one class.
        final_pass: "class_sorted": after training, running averages move over the training images once more, sorted
            by class, in norm batches; no weight changes. "none": no such pass.

    The last two are wrong on purpose: they show what a norm's statistics depend on (configs/known_answers.yaml).
    """

    label_smoothing: Fraction[float] = 0.0
    zero_init_last_gamma: bool = False
    # declared once more since it is older here than the other tasks' field: records hold it
    precision: Precision = "float32"
    recalibration_images: Images[int] = 2000
    single_class_groups: Batch[int | None] = None
    final_pass: Literal["none", "class_sorted"] = "none"

    def backbone(self, classes: int, channels: int) -> dict[str, Any]:
        return {**super().backbone(classes, channels), "zero_init_last_gamma": self.zero_init_last_gamma}

    @property
    def told(self) -> StepOptions:
        return replace(super().told, label_smoothing=self.label_smoothing)

    @model_validator(mode="after")
    def _consistent(self) -> ClassificationOptions:
        if self.recalibration_images < self.norm_batch:
            raise ValueError(
                f"recalibration_images {self.recalibration_images} is below the norm batch of {self.norm_batch} images"
            )
        if self.single_class_groups is not None and self.batch_size % self.single_class_groups:
            raise ValueError(
                f"single_class_groups {self.single_class_groups} does not divide batch_size {self.batch_size}; "
                f"allowed: {divisors(self.batch_size, self.single_class_groups)}"
            )
        return self
