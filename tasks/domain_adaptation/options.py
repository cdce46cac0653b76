"""The options of the task `domain_adaptation`."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, ModelWrapValidatorHandler, model_validator

from tasks.options import Batch, Count, Images, LeftOut, Positive, only_used
from tasks.supervised import SupervisedOptions

SOURCE, TARGET = 0, 1
"""Domains as norms are told them."""

_ADVERSARIAL: dict[str, Any] = {"forward": "joint", "trade_off": 1.0, "discriminator_width": 128}
OF_METHODS: dict[str, dict[str, Any]] = {
    "source_only": {},
    "dann": _ADVERSARIAL,
    "cdan_e": _ADVERSARIAL,
    "mcd": {"forward": "joint", "mcd_steps": 4},
}
"""method -> its options beside the common ones, with defaults; options of other methods are null."""
CONDITIONAL = {name for names in OF_METHODS.values() for name in names}


class DomainAdaptationOptions(SupervisedOptions):
    """Options of one run, from one domain of a data set to another: those of SupervisedOptions, and

    Attributes:
        dataset: one with domains.
        source, target: two of its domains.
        method: "source_only", the baseline, never sees the target; "dann" (Ganin et al. 2016), "cdan_e" (Long et al.
            2018), "mcd" (Saito et al. 2018).
        forward: "joint" forwards source and target as one batch, so that they share statistics in norms that mix
            samples; "separate" one after the other, source first.
        trade_off: weight of the domain loss (dann, cdan_e).
        discriminator_width: of its two hidden layers (dann, cdan_e).
        mcd_steps: updates of the features per batch (mcd).
        adabn_images: target training images, at most, that statistics are re-estimated on.

    Of SupervisedOptions, `epochs` are passes over the source's training part, and `batch_size` and `norm_batch_size`
    count images of each domain: a joint forward holds twice as many, half of every norm batch from either domain. (The
    rule of `bgn` for its groups goes by the images of one domain, so that a method's gain is not one of groups.)
    """

    dataset: str = "digits"
    source: str = "mnist"
    target: str = "blend"
    method: Literal["source_only", "dann", "mcd", "cdan_e"] = "dann"
    forward: Literal["joint", "separate"] | None = None
    trade_off: Positive[float | None] = None
    discriminator_width: int | None = Field(None, ge=1, le=2**14)
    mcd_steps: Count[int | None] = None
    adabn_images: Images[int] = 2000
    batch_size: Batch[int] = 64

    @model_validator(mode="wrap")
    @classmethod
    def _null_where_unused(
        cls, given: Any, handler: ModelWrapValidatorHandler[DomainAdaptationOptions]
    ) -> DomainAdaptationOptions:
        checked = handler(given)  # what is not used may not be wrong either
        if not isinstance(given, dict):
            return checked
        return handler(only_used(given, OF_METHODS[checked.method], CONDITIONAL))

    @model_validator(mode="after")
    def _two_domains(self) -> DomainAdaptationOptions:
        if self.source == self.target:
            raise LeftOut(f'source and target are both "{self.source}"; two domains are needed')
        if self.adabn_images < self.norm_batch:
            raise ValueError(f"adabn_images {self.adabn_images} is below the norm batch of {self.norm_batch} images")
        return self

    @property
    def source_only(self) -> DomainAdaptationOptions:
        """These options without adaptation."""
        common = {name: value for name, value in self if name not in CONDITIONAL}
        return DomainAdaptationOptions(**{**common, "method": "source_only"})

    @property
    def num_domains(self) -> int:
        """Domains that are trained on. Without the target, its images are later forwarded as if of the source."""
        return 1 if self.method == "source_only" else 2

    @property
    def target_domain(self) -> int:
        """The domain of target images, as norms are told it."""
        return TARGET if self.num_domains == 2 else SOURCE
