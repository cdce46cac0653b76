"""The options of the task `few_shot`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, ModelWrapValidatorHandler, model_validator

from tasks.base import (
    Batch,
    Classes,
    Fraction,
    NotNegative,
    Options,
    Positive,
    Repeats,
    Steps,
    Width,
    only_used,
)
from tasks.data import Augmentation
from tasks.fit import Schedule

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
"""What each method's training is told, with defaults; options of other methods are null."""


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
        learning_rate: of Adam, the schedule's peak.
        schedule, warmup: see tasks.fit.learning_rate_at.
        weight_decay: of weights; never of biases.
        norm_weight_decay: decay every parameter of every norm, too.
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
    shot: Repeats[int] = 1
    queries: Repeats[int] = 15
    train_way: Classes[int | None] = None
    train_queries: Repeats[int | None] = None
    test_episodes: Annotated[Repeats[int], Field(ge=2)] = 600
    val_episodes: Annotated[Repeats[int], Field(ge=2)] = 200

    steps: Steps[int] = 2000
    meta_batch_size: Repeats[int | None] = None
    learning_rate: Positive[float] = 1e-3
    schedule: Schedule = "cosine"
    warmup: Fraction[float] = 0.0
    weight_decay: NotNegative[float] = 5e-4
    norm_weight_decay: bool = False
    augmentation: Augmentation | None = None
    query_augmentation: Literal["none", "affine"] = "affine"
    inductive_statistics: Literal["running", "support"] = "running"
    channels_last: bool | None = None

    order: Literal["first", "second"] | None = None
    inner_learning_rate: Positive[float | None] = None
    inner_steps: Repeats[int | None] = None
    test_inner_steps: Repeats[int | None] = None
    inner_statistics: Literal["shared", "per_step", "none"] | None = None
    imprinting_batch_size: Annotated[Batch[int | None], Field(ge=2)] = None

    @model_validator(mode="wrap")
    @classmethod
    def _null_where_unused(cls, given: Any, handler: ModelWrapValidatorHandler[FewShotOptions]) -> FewShotOptions:
        checked = handler(given)  # what is not used may not be wrong either
        if not isinstance(given, dict):
            return checked
        conditional = {name for names in OF_METHODS.values() for name in names}
        return handler(only_used(given, OF_METHODS[checked.method], conditional))

    @model_validator(mode="after")
    def _consistent(self) -> FewShotOptions:
        for way, queries in ((self.way, self.queries), (self.training_way, self.training_queries)):
            if (images := way * (self.shot + queries)) > LARGEST_EPISODE:
                raise ValueError(
                    f"{way} classes of {self.shot} support and {queries} query images make an episode of {images}; "
                    f"at most {LARGEST_EPISODE} are forwarded together"
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
    def shared(self) -> int:
        """Images that share statistics in a training forward; of MAML's two forwards the smaller, the support's."""
        if self.method == "imprinting":
            return self.imprinting_batch_size or 0
        if self.method == "maml":
            return self.way * self.shot
        return self.training_way * (self.shot + self.training_queries)
