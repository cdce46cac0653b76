"""Options of the task `domain_generalization`."""

from __future__ import annotations

from typing import Any

from pydantic import model_validator

from norms.values import nearest
from tasks import data as datasets
from tasks.options import Batch
from tasks.supervised import SupervisedOptions


class DomainGeneralizationOptions(SupervisedOptions):
    """Options of one run: those of SupervisedOptions, and

    Attributes:
        dataset: one with domains.
        domains: the domains that take part; null: all of a built-in set or of torchvision's. Of a folder they are named
            here, since a norm is built for a number of domains before any data is read.
        held_out: one of them, for the test.

    Of SupervisedOptions, `batch_size` and `norm_batch_size` count images of each source domain: a batch holds so many
    of every one, and so does every norm batch (a norm that mixes samples shares statistics over all of these; the rule
    of `bgn` for its groups goes by the images of one). `learning_rate` is per 128 images of all. `epochs` are passes
    over as many images as the sources have together.
    """

    dataset: str = "digits"
    domains: tuple[str, ...] | None = None
    held_out: str = "blend"
    batch_size: Batch[int] = 32

    @model_validator(mode="before")
    @classmethod
    def _all_domains(cls, given: Any) -> Any:
        if not isinstance(given, dict) or given.get("domains") is not None:
            return given
        dataset = given.get("dataset", cls.model_fields["dataset"].default)
        # what is no name at all, the field itself refuses
        return (
            given | {"domains": datasets.dataset_info(dataset).domains or None} if isinstance(dataset, str) else given
        )

    @model_validator(mode="after")
    def _sources_are_left(self) -> DomainGeneralizationOptions:
        if (
            self.domains is None and datasets.dataset_info(self.dataset).num_classes is not None
        ):  # known without reading
            others = ", ".join(name for name in datasets.dataset_names() if datasets.dataset_info(name).domains)
            raise ValueError(f'data set "{self.dataset}" has no domains; {others} have, and folders')
        if self.domains is None:
            raise ValueError(f'domains: those of data set "{self.dataset}" are not known before it is read; name them')
        if len(set(self.domains)) < len(self.domains):
            raise ValueError(f"domains names one twice: {', '.join(self.domains)}")
        if self.held_out not in self.domains:
            raise ValueError(
                f'held_out "{self.held_out}" is not among the domains; allowed: {", ".join(self.domains)}'
                f"{nearest(self.held_out, self.domains)}"
            )
        if len(self.sources) < 2:
            raise ValueError(
                f'with "{self.held_out}" held out of {", ".join(self.domains)}, generalization has '
                f"{len(self.sources)} source domain{'s' * (len(self.sources) != 1)}"
                f"{f' ({self.sources[0]})' if self.sources else ''}; two or more are needed"
            )
        return self

    @property
    def sources(self) -> tuple[str, ...]:
        """The domains that are trained on; norms know them by their position here."""
        return tuple(domain for domain in self.domains or () if domain != self.held_out)

    @property
    def peak_learning_rate(self) -> float:
        return super().peak_learning_rate * (len(self.sources) if self.scale_learning_rate else 1)
