"""The options of the task `architecture_search`. Their defaults are the published settings for CIFAR-10."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from tasks.base import (
    Batch,
    Cells,
    Classes,
    Epochs,
    Fraction,
    Images,
    NormChoice,
    NotNegative,
    Options,
    Pixels,
    Positive,
    Setting,
    Steps,
    Width,
    divisors,
)
from tasks.darts.genotype import PUBLISHED, Genotype, read_genotype
from tasks.darts.networks import check_size, places
from tasks.data import Augmentation, dataset_info


class ArchitectureSearchOptions(Options):
    """Options of one run: a search, then retraining of what it found and of random architectures.

    Attributes:
        dataset: a name from `run_suite.py data list`.
        num_classes: use the first so many classes only; None: all.
        image_size: side that images are averaged down to, an integer fraction of theirs; None: as they are.
        norm_batch_size: images that share statistics in training, in search and in retraining; None: the SGD batch of
            each (which stays None in the key where samples mix and the two batches differ). It must divide both.
        norm_weight_decay: decay every parameter of every norm, too.
        momentum, weight_decay: of the SGD over weights, in both phases; biases are not decayed.
        gradient_clip: largest norm of the weights' gradient.
        augmentation: of training images in both phases, see tasks.data.batches.augment.
        channels_last: memory format of images and weights.
        genotype: None: search. Else no search: a file, or "DARTS_V1", "DARTS_V2"; its content stands in the key, the
            options of the search go back to their defaults, and the run's norm is the one of retraining.
        search_channels: channels of the search network's first cell.
        search_cells: its cells, at least 3.
        search_epochs: passes over one half of the training part; images that fill no batch are left out of each.
        search_max_steps: end (and the schedule's end) after so many steps at the latest; None: no limit.
        search_batch_size: images of each half per step.
        search_learning_rate: of the weights; it falls to `search_learning_rate_min` along half a cosine.
        search_learning_rate_min: see there.
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
        retrain_learning_rate: it falls to 0 along half a cosine.
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
    weight_decay: NotNegative[float] = 3e-4
    gradient_clip: Positive[float] = 5.0
    augmentation: Augmentation = "crop_flip"
    channels_last: bool = True

    genotype: Genotype | None = None
    search_channels: Width[int] = 16
    search_cells: Cells[int] = 8
    search_epochs: Epochs[int] = 50
    search_max_steps: Steps[int | None] = None
    search_batch_size: Batch[int] = 64
    search_learning_rate: Positive[float] = 0.025
    search_learning_rate_min: NotNegative[float] = 0.001
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
    retrain_learning_rate: Positive[float] = 0.025
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
        if self.search_learning_rate_min > self.search_learning_rate:
            raise ValueError(
                f"search_learning_rate_min {self.search_learning_rate_min:g} is above search_learning_rate "
                f"{self.search_learning_rate:g}"
            )
        if self.recalibration_images < self.shared(self.retrain_batch_size):
            raise ValueError(
                f"recalibration_images {self.recalibration_images} is below the norm batch of "
                f"{self.shared(self.retrain_batch_size)} images"
            )
        shape = self.image_shape
        if shape is not None:
            check_size(shape, self.auxiliary_weight > 0)
        return self

    def shared(self, batch_size: int) -> int:
        """Images that share statistics in SGD batches of this size."""
        return self.norm_batch_size or batch_size

    @property
    def batch_size(self) -> int | None:
        """The SGD batch, where there is one: both phases have it, or nothing is searched."""
        same = self.genotype is not None or self.search_batch_size == self.retrain_batch_size
        return self.retrain_batch_size if same else None

    @property
    def controls(self) -> int:
        """How many random architectures are retrained."""
        return self.retrain_runs if self.random_architectures is None else self.random_architectures

    @property
    def image_shape(self) -> tuple[int, int, int] | None:
        """(C, H, W) of the images that networks see; None where the data set's name does not tell."""
        return _image_shape(self.dataset, self.image_size)


def _image_shape(dataset: str, size: int | None) -> tuple[int, int, int] | None:
    try:
        shape = dataset_info(dataset).image_shape
    except ValueError:  # an unknown name is reported where the data is looked up
        return None
    return shape if shape is None or size is None else (shape[0], size, size)
