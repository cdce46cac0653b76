"""The options of the task `architecture_search`. Their defaults are the published settings for CIFAR-10."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

import torch
from pydantic import Field, ModelWrapValidatorHandler, ValidationInfo, field_validator, model_validator
from torch import nn

from tasks import data as datasets
from tasks.architecture_search.genotype import PUBLISHED, Genotype, read_genotype
from tasks.architecture_search.networks import check_size, places
from tasks.base import Setting
from tasks.data import Augmentation
from tasks.options import (
    NEWER,
    Batch,
    Cells,
    Classes,
    Epochs,
    Fraction,
    Images,
    LeftOut,
    Milestones,
    NormChoice,
    NotNegative,
    Options,
    Pixels,
    Positive,
    Steps,
    Width,
    divisors,
)
from tasks.schedule import BETAS, MILESTONES, Schedule, adamw, learning_rate_at, sgd
from tasks.step import Precision, StepOptions

Optimizer = Literal["sgd", "adamw"]
Phase = Literal["search", "retrain"]


class ArchitectureSearchOptions(Options):
    """Options of one run: a search, then retraining of what it found and of random architectures.

    Attributes:
        dataset: a name from `run_suite.py data list`.
        num_classes: use the first so many classes only; None: all.
        image_size: side that images are averaged down to, an integer fraction of theirs; None: as they are.
        norm_batch_size: images that share statistics in training, in search and in retraining; None: the SGD batch of
            each (which stays None in the key where samples mix and the two batches differ). It must divide both.
        norm_weight_decay: decay every parameter of every norm, too.
        momentum: of sgd over weights, in both phases; 0.9, whatever was given, where no phase has sgd.
        betas: of adamw over weights, in both phases; null: (0.9, 0.999), or no phase has adamw.
        weight_decay: of weights, in both phases; biases are not decayed.
        gradient_clip: largest norm of the weights' gradient.
        precision: "bfloat16" runs forwards under autocast, in both phases and in evaluation.
        compile: torch.compile for both networks. Sums are then rounded in another order.
        augmentation: of training images in both phases, see tasks.data.batches.augment.
        channels_last: memory format of images and weights.
        genotype: None: search. Else no search: a file, or "DARTS_V1", "DARTS_V2"; its content stands in the key, the
            options of the search go back to their defaults, and the run's norm is the one of retraining.
        search_channels: channels of the search network's first cell.
        search_cells: its cells, at least 3.
        search_epochs: passes over one half of the training part; images that fill no batch are left out of each.
        search_max_steps: end (and the schedule's end) after so many steps at the latest; None: no limit.
        search_batch_size: images of each half per step.
        search_optimizer: of the weights, "sgd" or "adamw" (Loshchilov & Hutter 2019); "adamw" only with the order
            "first", since the unrolled step is one of SGD.
        search_learning_rate: of the weights, the schedule's peak.
        search_learning_rate_min: what the schedule's 0 is: the rate starts from it (with a warm-up) and falls towards
            it; 0.001, whatever was given, where the rate is constant from the start.
        search_schedule: see tasks.schedule.learning_rate_at.
        search_warmup: fraction of the search's steps before the peak.
        search_milestones: of the schedule "steps", rising fractions of the search's steps; null: (0.5, 0.75).
        search_cutout: side of the square that is cut out of training images, in pixels; 0: none.
        order: "first": the architecture's gradient at the weights as they are; "second": at the weights after one
            unrolled step.
        architecture_learning_rate, architecture_weight_decay: of Adam over the architecture, betas (0.5, 0.999).
        architecture_steps_move_statistics: architecture steps move the norms' running statistics, as in the published
            code; off: they leave them untouched.
        retrain_norm: the norm of the retrained networks; None: the run's own, with the options that it has in search.
        retrain_runs: networks of the found architecture that are retrained, each from its own seed.
        random_architectures: random architectures, retrained in the same way; None: as many as `retrain_runs`.
        retrain_channels, retrain_cells: size of the retrained network.
        retrain_epochs: passes over the whole training part.
        retrain_max_steps: as search_max_steps.
        retrain_batch_size: images per update.
        retrain_optimizer: "sgd" or "adamw".
        retrain_learning_rate: the schedule's peak.
        retrain_schedule, retrain_warmup, retrain_milestones: as those of the search.
        auxiliary_weight: of the auxiliary head's loss; 0: no such head.
        drop_path: probability that a path is dropped, reached linearly over the training.
        retrain_cutout: as search_cutout.
        recalibration_images: training images that statistics are re-estimated on.
    """

    dataset: str = "fashion_mnist_mini"
    num_classes: Classes[int | None] = None
    image_size: Annotated[Pixels[int | None], Field(ge=4)] = None
    norm_batch_size: Batch[int | None] = None
    norm_weight_decay: bool = False
    momentum: Fraction[float] = 0.9
    betas: Annotated[tuple[Fraction[float], Fraction[float]] | None, NEWER] = None
    weight_decay: NotNegative[float] = 3e-4
    gradient_clip: Positive[float] = 5.0
    precision: Annotated[Precision, NEWER] = "float32"
    compile: Annotated[bool, NEWER] = False
    augmentation: Augmentation = "crop_flip"
    channels_last: bool = True

    genotype: Genotype | None = None
    search_channels: Width[int] = 16
    search_cells: Cells[int] = 8
    search_epochs: Epochs[int] = 50
    search_max_steps: Steps[int | None] = None
    search_batch_size: Batch[int] = 64
    search_optimizer: Annotated[Optimizer, NEWER] = "sgd"
    search_learning_rate: Positive[float] = 0.025
    search_learning_rate_min: NotNegative[float] = 0.001
    search_schedule: Annotated[Schedule, NEWER] = "cosine"
    search_warmup: Annotated[Fraction[float], NEWER] = 0.0
    search_milestones: Annotated[Milestones, NEWER] = None
    search_cutout: Pixels[int] = 0
    order: Literal["first", "second"] = "second"
    architecture_learning_rate: Positive[float] = 3e-4
    architecture_weight_decay: NotNegative[float] = 1e-3
    architecture_steps_move_statistics: bool = False

    retrain_runs: int = Field(1, ge=1, le=1000)
    random_architectures: int | None = Field(None, ge=0, le=1000)
    retrain_channels: Width[int] = 36
    retrain_cells: Cells[int] = 20
    retrain_epochs: Epochs[int] = 600
    retrain_max_steps: Steps[int | None] = None
    retrain_batch_size: Batch[int] = 96
    retrain_optimizer: Annotated[Optimizer, NEWER] = "sgd"
    retrain_learning_rate: Positive[float] = 0.025
    retrain_schedule: Annotated[Schedule, NEWER] = "cosine"
    retrain_warmup: Annotated[Fraction[float], NEWER] = 0.0
    retrain_milestones: Annotated[Milestones, NEWER] = None
    auxiliary_weight: NotNegative[float] = 0.4
    drop_path: Fraction[float] = 0.2
    retrain_cutout: Pixels[int] = 16
    recalibration_images: Images[int] = 2000
    # last, since completing it needs the fields above
    retrain_norm: NormChoice | None = None

    @model_validator(mode="before")
    @classmethod
    def _no_search_options_without_a_search(cls, given: Any) -> Any:
        """Else a grid over them would make the same retraining again and again."""
        if not isinstance(given, dict) or given.get("genotype") is None:
            return given
        if given.get("retrain_norm") is not None:
            raise ValueError(
                "genotype and retrain_norm are both given: nothing is searched then, so name the norms of retraining "
                "in norms"
            )
        unused = {name for name in cls.model_fields if name.startswith(("search_", "architecture_")) or name == "order"}
        return {key: value for key, value in given.items() if key not in unused}

    @model_validator(mode="wrap")
    @classmethod
    def _of_use(cls, given: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        """Options that no optimizer and no schedule uses go back to their defaults, so that a grid over them repeats no
        run."""
        checked = handler(given)  # what is not used may not be wrong either
        if not isinstance(given, dict):
            return checked
        optimizers = {getattr(checked, f"{phase}_optimizer") for phase in checked.phases}
        unused = set() if "sgd" in optimizers else {"momentum"}
        if "adamw" not in optimizers or checked.betas == BETAS:
            unused.add("betas")
        for phase in checked.phases:
            milestones = f"{phase}_milestones"
            if getattr(checked, f"{phase}_schedule") != "steps" or getattr(checked, milestones) == MILESTONES:
                unused.add(milestones)
        if not checked._search_rate_moves:
            unused.add("search_learning_rate_min")
        return handler({key: value for key, value in given.items() if key not in unused})

    @field_validator("genotype", mode="before")
    @classmethod
    def _from_file(cls, given: Any) -> Any:
        if not isinstance(given, str):
            return given
        return PUBLISHED[given] if given in PUBLISHED else read_genotype(given)

    @field_validator("search_cells", "retrain_cells")
    @classmethod
    def _buildable(cls, cells: int) -> int:
        places(1, cells)
        return cells

    @field_validator("retrain_norm")
    @classmethod
    def _resolved(cls, choice: NormChoice | None, info: ValidationInfo) -> NormChoice | None:
        if choice is None:
            return None
        given = info.data
        if not {"dataset", "image_size", "norm_batch_size", "retrain_batch_size"} <= given.keys():
            return choice  # one of them is wrong, which is reported already
        shape = _image_shape(given["dataset"], given["image_size"])
        return choice.resolved(Setting(given["norm_batch_size"] or given["retrain_batch_size"], 1, shape))

    @model_validator(mode="after")
    def _consistent(self) -> ArchitectureSearchOptions:
        phases = {"search": self.search_batch_size, "retrain": self.retrain_batch_size}
        if self.genotype is not None:
            del phases["search"]
        for phase, size in phases.items():
            if self.norm_batch_size is not None and size % self.norm_batch_size:
                raise ValueError(
                    f"norm_batch_size {self.norm_batch_size} does not divide {phase}_batch_size {size}; allowed: "
                    f"{divisors(size, self.norm_batch_size)}"
                )
        if self.search_optimizer == "adamw" and self.order == "second":
            raise LeftOut(
                'search_optimizer "adamw" and order "second": the unrolled step is one of SGD; allowed: '
                'search_optimizer "sgd", or order "first"'
            )
        if self._search_rate_moves and self.search_learning_rate_min > self.search_learning_rate:
            raise ValueError(
                f"search_learning_rate_min {self.search_learning_rate_min:g} is above search_learning_rate "
                f"{self.search_learning_rate:g}"
            )
        if self.recalibration_images < self.norm_batch(self.retrain_batch_size):
            raise ValueError(
                f"recalibration_images {self.recalibration_images} is below the norm batch of "
                f"{self.norm_batch(self.retrain_batch_size)} images"
            )
        shape = self.image_shape
        if shape is not None:
            check_size(shape, self.auxiliary_weight > 0)
        return self

    def norm_batch(self, batch_size: int) -> int:
        """Images that share statistics in SGD batches of this size."""
        return self.norm_batch_size or batch_size

    @property
    def phases(self) -> tuple[Phase, ...]:
        """Those of the run that train."""
        return ("search", "retrain") if self.genotype is None else ("retrain",)

    @property
    def _search_rate_moves(self) -> bool:
        return self.search_schedule != "constant" or self.search_warmup > 0

    def rate(self, phase: Phase, progress: float) -> float:
        """The learning rate of weights after this fraction of a phase's steps."""
        if phase == "search":
            least, peak, schedule = self.search_learning_rate_min, self.search_learning_rate, self.search_schedule
            warmup, milestones = self.search_warmup, self.search_milestones
            least = least if self._search_rate_moves else 0.0
        else:
            least, peak, schedule = 0.0, self.retrain_learning_rate, self.retrain_schedule
            warmup, milestones = self.retrain_warmup, self.retrain_milestones
        return least + learning_rate_at(
            progress, peak - least, schedule, warmup, MILESTONES if milestones is None else milestones
        )

    def trained_by(self, net: nn.Module, phase: Phase) -> torch.optim.Optimizer:
        """The optimizer of a network's weights; its rate is set by the loop."""
        groups: dict[str, Any] = {"weight_decay": self.weight_decay, "norm_weight_decay": self.norm_weight_decay}
        groups["learning_rate"] = self.search_learning_rate if phase == "search" else self.retrain_learning_rate
        if (self.search_optimizer if phase == "search" else self.retrain_optimizer) == "adamw":
            return adamw(net, betas=self.betas or BETAS, **groups)
        return sgd(net, momentum=self.momentum, nesterov=False, **groups)

    def told(self, batch_size: int) -> StepOptions:
        """The options of an update on a batch of this size."""
        slices = batch_size // self.norm_batch(batch_size)
        return StepOptions(slices, precision=self.precision, gradient_clip=self.gradient_clip)

    @property
    def memory_format(self) -> torch.memory_format:
        return torch.channels_last if self.channels_last else torch.contiguous_format

    @property
    def batch_size(self) -> int | None:
        """The SGD batch, where there is one: both phases have it, or nothing is searched."""
        same = self.genotype is not None or self.search_batch_size == self.retrain_batch_size
        return self.retrain_batch_size if same else None

    @property
    def controls(self) -> int:
        """The number of random architectures that are retrained."""
        return self.retrain_runs if self.random_architectures is None else self.random_architectures

    @property
    def image_shape(self) -> tuple[int, int, int] | None:
        """(C, H, W) of the images that networks see; None where the data set's name does not tell."""
        return _image_shape(self.dataset, self.image_size)


def _image_shape(dataset: str, size: int | None) -> tuple[int, int, int] | None:
    try:
        shape = datasets.dataset_info(dataset).image_shape
    except ValueError:  # an unknown name is reported where the data is looked up
        return None
    return shape if shape is None or size is None else (shape[0], size, size)
