"""Architecture search: DARTS (Liu et al. 2019, arXiv:1806.09055) with any norm, in search and in retraining.

A run searches once, derives a genotype, trains its network from scratch `retrain_runs` times, and trains as many random
architectures of the same space in the same way: without that control an accuracy says nothing about the search. The
random architectures, like the halves, the order of images and all initial weights, depend on the seed alone, so they
are the same for every norm.

The search space, its networks, the optimizers and the loops are in the modules beside this one. No selection: search
and retraining report their last epoch, and test images decide nothing.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from norms.factory import NormFactory, factory_info
from norms.generators import forked_generators
from norms.protocol import NormInfo, equivalent
from tasks import data as datasets
from tasks.admission import Host, expected, lacking, refusal
from tasks.architecture_search.genotype import CHOICES, Genotype, random_genotype
from tasks.architecture_search.networks import DerivedNetwork, SearchNetwork, check_size
from tasks.architecture_search.options import ArchitectureSearchOptions
from tasks.architecture_search.training import (
    Retrained,
    Searched,
    derived,
    retrain,
    retrain_steps,
    retraining_name,
    search,
    search_steps,
)
from tasks.base import Diverged, Outcome, RunContext, Setting, Trained
from tasks.data.images import ImageData, shrink, shrunk
from tasks.inputs import Prepare, facts_of, preparation

FEW_STEPS = 300
"""Searches of fewer steps show that the machinery works, and nothing about norms: tables then say so."""
GENOTYPE, DRAWINGS, CONTROLS = "genotype.json", ("genotype.png", "genotype.svg"), "random_genotypes.json"
_EVERY = [(CHOICES[i % len(CHOICES)], i % 2) for i in range(8)]
EVERY_OPERATION = Genotype(normal=tuple(_EVERY), reduce=tuple(_EVERY))
"""The architecture that planning tries a norm in, before it is known what the search will find."""


class ArchitectureSearch:
    """The task's value (tasks.base.Task).

    Metrics, accuracies as fractions:
        top1, test_loss, top1_recalibrated: the test part, after the last epoch of retraining the found architecture;
            means over `retrain_runs`. Recalibrated as in classification, with augmented images.
        random_top1: the same mean of top1 over the random architectures. None without them, or where training one of
            them diverged (the evidence says why): a mean over the others would flatter them.
        gain_over_random: top1 - random_top1.
        val_top1: as top1, on the validation part.
        search_val_top1: the search network with the last architecture, on the validation part, which neither half of
            its training images contains.
        parameters: of the retrained network, without the auxiliary head.
        skip_connections: among the 16 operations of the two cells.
        composition_shift: the largest over the retrained networks, see tasks.evaluate.composition_shift.
        search_seconds: wall time of the search, in all processes of an interrupted run, without validation.
        step_seconds, peak_memory_mb: of a search step, and of the first epoch of search steps.
        norm_parameters, norm_buffers: numbers of values in all norms of the search network.

    With a given `genotype` nothing is searched, and what only a search has is None.

    The history has the search's epochs first (`retraining` 0) with every mixing weight after it, named as
    "normal.2.0.sep_conv_3x3" (cell, to state, from state, operation); then those of each retraining (`retraining` 1,
    2, ..., `random` 1 for a random architecture).

    Artifacts: genotype.json (which `genotype` reads), genotype.png, genotype.svg, random_genotypes.json.
    """

    name = "architecture_search"
    version = 1
    options = ArchitectureSearchOptions
    metrics = (
        "top1",
        "random_top1",
        "gain_over_random",
        "top1_recalibrated",
        "val_top1",
        "search_val_top1",
        "test_loss",
        "parameters",
        "skip_connections",
        "composition_shift",
        "search_seconds",
        "step_seconds",
        "peak_memory_mb",
        "norm_parameters",
        "norm_buffers",
    )
    headline = "top1"
    validation = "val_top1"
    always_shown: tuple[str, ...] = ()
    folds_over = ""

    def setting(self, options: ArchitectureSearchOptions) -> Setting:
        size = options.search_batch_size if options.genotype is None else options.retrain_batch_size
        return Setting(options.norm_batch(size), 1, options.image_shape)

    def data_checksum(self, options: ArchitectureSearchOptions, data_dir: Path) -> str:
        """Identity of the data. Raises ValueError where it can not be searched or retrained on."""
        datasets.check_classifiable(options.dataset, data_dir, options.num_classes)
        checksum = datasets.checksum(options.dataset, data_dir)
        train, shape = _facts(options.dataset, data_dir, options.num_classes, options.image_size, checksum)
        check_size(shape, options.auxiliary_weight > 0)
        if options.genotype is None and options.search_batch_size > train // 2:
            raise ValueError(
                f'data set "{options.dataset}": its {train} training images are too few for two halves: '
                f"search_batch_size {options.search_batch_size} exceeds the {train // 2} images of a half"
            )
        if options.retrain_batch_size > train:
            raise ValueError(
                f'data set "{options.dataset}": retrain_batch_size {options.retrain_batch_size} exceeds its {train} '
                "training images"
            )
        return checksum

    def why_not(self, norm: NormFactory, info: NormInfo, options: ArchitectureSearchOptions) -> str | None:
        """None if this norm, and the one of retraining, can be trained here, else the reason in one line."""
        retraining, retrains = norm, "in retraining"
        if options.retrain_norm is not None:  # beside the reason stands the name of the other norm
            retraining, retrains = options.retrain_norm.factory(), f'retrain_norm "{options.retrain_norm.label}"'
        if reason := lacking(info, self.name):
            return reason
        if reason := lacking(factory_info(retraining), self.name):
            return f"{retrains}: {reason}"
        if options.genotype is None:
            # poolings are followed by a norm there, and have no weight to pass to it
            if reason := lacking(info, "a search network", ("conv_weight",)):
                return reason
            if reason := refusal(norm, info, _host_of_search(options)):
                return f"in search: {reason}"
        if reason := refusal(retraining, factory_info(retraining), _host_of_retraining(options)):
            return f"{retrains}: {reason}"
        return None

    def steps(self, options: ArchitectureSearchOptions, data_dir: Path) -> int:
        """Updates of a run: of the search, of every retraining and of every control."""
        counts = datasets.class_counts(options.dataset, data_dir, options.num_classes)["train"]
        train = int(counts.sum())
        searching = search_steps(options, train) if options.genotype is None else 0
        return searching + (options.retrain_runs + options.controls) * retrain_steps(options, train)

    def network(
        self, norm: NormFactory, options: ArchitectureSearchOptions, facts: Mapping[str, Any]
    ) -> tuple[nn.Module, Prepare]:
        """See tasks.base.Telling: the first retrained network of the found architecture, with the auxiliary head that
        it had in training. Images of the data set's own size are averaged down as the option `image_size` says."""
        genotype = Genotype.model_validate(facts["genotype"])
        net = derived(genotype, _retraining(norm, options), facts["in_channels"], facts["num_classes"], options)
        prepare, side = preparation(facts["mean"], facts["std"], options.memory_format), options.image_size

        def prepared(images: Tensor) -> Tensor:
            return prepare(images if side in (None, images.shape[-1]) else shrunk(images, side))

        return net, prepared

    def run(self, norm: NormFactory, options: ArchitectureSearchOptions, context: RunContext) -> Outcome:
        data = _load(options.dataset, context.data_dir, options.num_classes, options.image_size).to(context.device)
        # nothing here draws from the global generators; what a norm of one's own draws is the same in every run
        with forked_generators(context.device):
            torch.manual_seed(context.generator("training").initial_seed())
            try:
                return self._run(norm, data, options, context)
            except Diverged as error:
                error.evidence = _scale(options, data)
                raise

    def _run(
        self, norm: NormFactory, data: ImageData, options: ArchitectureSearchOptions, context: RunContext
    ) -> Outcome:
        searched: Searched | None = None
        genotype = options.genotype
        if genotype is None:
            searched = Searched(
                **context.journal.once("the search", lambda: vars(search(norm, data, options, context)))
            )
            genotype = Genotype.model_validate_json(searched.genotype)
        retraining = _retraining(norm, options)
        numbers = range(1, options.controls + 1)
        controls = [random_genotype(context.generator(f"random architecture {number}")) for number in numbers]
        # in every process of the run: each may have a folder of its own
        artifacts = _write(genotype, controls, context.folder)

        def attempt(architecture: Genotype, number: int, control: bool) -> dict[str, Any] | str:
            """The fields of its Retrained, or the reason for which a control diverged."""
            try:
                return vars(retrain(architecture, retraining, data, options, context, number, control))
            except Diverged as error:
                if not control:
                    raise
                return str(error)

        results: dict[bool, list[Retrained]] = {False: [], True: []}
        diverged: list[str] = []
        for control, chosen in ((False, [genotype] * options.retrain_runs), (True, controls)):
            for number, each in enumerate(chosen, 1):
                once = functools.partial(attempt, each, number, control)
                left = context.journal.once(retraining_name(number, control), once)
                if isinstance(left, str):
                    diverged.append(left)
                else:
                    results[control].append(Retrained(**left))
        found, random = results[False], results[True]
        metrics = _metrics(found, [] if diverged else random, genotype, searched)
        evidence: dict[str, Any] = {
            "data": data.kind,
            "selection": "last epoch",
            "mixes_samples": any(factory_info(each).mixes_samples for each in (norm, retraining)),
            # the search network's too: without affine, `in` leaves nothing for global average pooling
            "constant_output": any(each.constant_output for each in found)
            or (searched is not None and searched.constant_output),
            "retrain_runs": len(found),
            "random_architectures": len(controls),
            "random_diverged": diverged,
            "retrained_top1": [each.top1 for each in found],
            "random_retrained_top1": [each.top1 for each in random],
            "train_images": len(data.train),
            "test_images": len(data.test),
            "equals": _equals(norm, retraining, genotype, data, options),
            **_scale(options, data),
        }
        trained = None
        if found[0].weights is not None:
            facts = facts_of(data) | {"genotype": genotype.model_dump(mode="json")}
            trained = Trained(found[0].weights, facts)
        named = {name: metrics[name] for name in self.metrics}
        return Outcome(named, context.journal.rows, artifacts, evidence, trained)


TASK = ArchitectureSearch()


def _retraining(norm: NormFactory, options: ArchitectureSearchOptions) -> NormFactory:
    """The norm of the networks that are retrained."""
    return norm if options.retrain_norm is None else options.retrain_norm.factory()


def _scale(options: ArchitectureSearchOptions, data: ImageData) -> dict[str, Any]:
    """The evidence of the search's length, for runs that end and for runs that diverge."""
    if options.genotype is not None:
        return {"search_steps": 0}
    steps = search_steps(options, len(data.train))
    return {"search_steps": steps} | ({"budget": "machinery-only"} if steps < FEW_STEPS else {})


def _metrics(
    found: list[Retrained], random: list[Retrained], genotype: Genotype, searched: Searched | None
) -> dict[str, float | None]:
    def mean(of: list[Retrained], name: str) -> float:
        return statistics.fmean(getattr(each, name) for each in of)

    top1 = mean(found, "top1")
    random_top1 = mean(random, "top1") if random else None
    metrics: dict[str, float | None] = {
        "top1": top1,
        "random_top1": random_top1,
        "gain_over_random": None if random_top1 is None else top1 - random_top1,
        **{name: mean(found, name) for name in ("top1_recalibrated", "val_top1", "test_loss")},
        "parameters": float(found[0].parameters),
        "skip_connections": float(genotype.skip_connections),
        "composition_shift": max(each.composition_shift for each in found),
    }
    of_search = {"search_val_top1": "val_top1", "search_seconds": "seconds", "step_seconds": "step_seconds"}
    of_search |= {name: name for name in ("peak_memory_mb", "norm_parameters", "norm_buffers")}
    return metrics | {
        name: None if searched is None else float(getattr(searched, field)) for name, field in of_search.items()
    }


def _write(genotype: Genotype, controls: list[Genotype], folder: Path) -> list[str]:
    """The run's artifacts; their names."""
    from tasks.architecture_search.drawing import draw  # here: matplotlib takes half a second to import

    (folder / GENOTYPE).write_text(genotype.text + "\n", encoding="utf-8")
    draw(genotype, [folder / name for name in DRAWINGS])
    if not controls:
        return [GENOTYPE, *DRAWINGS]
    (folder / CONTROLS).write_text("[" + ",\n".join(each.text for each in controls) + "]\n", encoding="utf-8")
    return [GENOTYPE, *DRAWINGS, CONTROLS]


def _equals(
    norm: NormFactory,
    retraining: NormFactory,
    genotype: Genotype,
    data: ImageData,
    options: ArchitectureSearchOptions,
) -> str | None:
    """The norm that every layer of both networks equals (bgn with one group per channel: bn), or None."""
    facts: dict[str, Any] = {
        "in_channels": data.image_shape[0],
        "num_classes": data.num_classes,
        "device": "meta",
    }
    nets: list[nn.Module] = [
        DerivedNetwork(genotype, options.retrain_channels, options.retrain_cells, norm=retraining, **facts)
    ]
    if options.genotype is None:
        nets.append(SearchNetwork(options.search_channels, options.search_cells, norm=norm, **facts))
    names = {equivalent(net) for net in nets}
    return names.pop() if len(names) == 1 and options.retrain_norm is None else None


def _host_of_search(options: ArchitectureSearchOptions) -> Host:
    size = {"channels": options.search_channels, "cells": options.search_cells}
    return _host("search", SearchNetwork, size, options.search_batch_size, options)


def _host_of_retraining(options: ArchitectureSearchOptions) -> Host:
    size = {"channels": options.retrain_channels, "cells": options.retrain_cells}
    facts = {"genotype": EVERY_OPERATION, "auxiliary": options.auxiliary_weight > 0}
    return _host("retraining", DerivedNetwork, size | facts, options.retrain_batch_size, options)


def _host(
    phase: str,
    build: Callable[..., nn.Module],
    network: dict[str, Any],
    batch_size: int,
    options: ArchitectureSearchOptions,
) -> Host:
    shape, classes = expected(options.dataset, options.num_classes)
    shape, norm_batch = options.image_shape or shape, options.norm_batch(batch_size)
    network = network | {"in_channels": shape[0], "num_classes": classes}
    return Host(phase, build, network, shape, norm_batch, batch_size // norm_batch)


def _load(dataset: str, data_dir: Path, classes: int | None, size: int | None) -> ImageData:
    if not datasets.in_memory(dataset, data_dir):
        raise ValueError(
            f'data set "{dataset}" is too large for memory, and architecture_search needs one that fits; '
            "prepare it with a smaller --size and --force"
        )
    data = datasets.load(dataset, data_dir, classes=classes)
    return data if size is None else shrink(data, size)


@functools.lru_cache(maxsize=64)
def _facts(
    dataset: str, data_dir: Path, classes: int | None, size: int | None, checksum: str
) -> tuple[int, tuple[int, int, int]]:
    """Training images and (C, H, W). Cached: a plan asks for each of its settings; `checksum` is part of the key."""
    data = _load(dataset, data_dir, classes, size)
    return len(data.train), data.image_shape
