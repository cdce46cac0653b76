"""Few-shot learning: train on some classes, tell others apart from a few images of each.

The statistics of the test are stated: the headline is inductive (each query is predicted without the others); the
transductive figure, with the statistics of support and queries together, has its own column, and the difference is the
leak. Episodes, their images and all training draws depend on the seed alone, so they are the same for every norm.

No selection: the reported checkpoint is the last step. Test classes decide nothing.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from norms.factory import NormFactory
from norms.generators import forked_generators
from norms.protocol import NormInfo, equivalent
from tasks import data as datasets
from tasks.admission import Host, expected, refusal
from tasks.base import Outcome, RunContext, Setting, Trained
from tasks.cost import PeakMemory
from tasks.data.episodes import EpisodeSampler, check_episodes, query_pool, variants_needed
from tasks.data.images import ImageData, Split
from tasks.evaluate import SHIFT_PROBE, composition_shift, evaluating, keeps_stats
from tasks.few_shot.episodic import forward_inductive, forward_together, needs_context
from tasks.few_shot.evaluation import Accuracy, Pool, evaluate_episodes
from tasks.few_shot.heads import head_of
from tasks.few_shot.maml import Maml, learner
from tasks.few_shot.networks import FewShotNet, build, build_few_shot_net, outputs
from tasks.few_shot.options import FewShotOptions
from tasks.few_shot.training import train
from tasks.inputs import Prepare, preparation
from tasks.third_party import check_installed, import_legacy


class FewShot:
    """The task's value (tasks.base.Task).

    Metrics, accuracies as fractions, means over `test_episodes` episodes of test classes:
        acc_inductive: no query is seen beside another: evaluation mode, with running statistics or those of the
            support (`inductive_statistics`).
        acc_transductive: norms use the batch statistics of support and queries together (maml: of the queries); equal
            to acc_inductive for norms that do not mix samples, or are shown the support as a context.
        leak: acc_transductive - acc_inductive.
        ci95: half width of the 95 % interval of acc_inductive over episodes, which ignores that they share images.
        val_acc: as acc_inductive, over `val_episodes` episodes of validation classes.
        composition_shift: see tasks.evaluate; of the network's outputs (embeddings, where a method has no classifier)
            on the first 64 test images. Not measured for norms that need a context.
        step_seconds, peak_memory_mb: of an update, without data and augmentation; of the first tenth of them.
        norm_parameters, norm_buffers: numbers of values in all norms.

    Training is in training mode: prototypical networks forward support and queries of an episode as one batch, as the
    published code does, MAML each by itself (tasks.few_shot.maml), imprinting trains a classifier of the training
    classes. Norms that need a context are shown the support as that, before the queries and apart from them: in every
    training step, again after MAML's adaptation, and in every test episode; a batch of imprinting's training is the
    context of its own images. The history has a row for every tenth of the steps.
    """

    name = "few_shot"
    version = 1
    options = FewShotOptions
    metrics = (
        "acc_inductive",
        "acc_transductive",
        "leak",
        "ci95",
        "val_acc",
        "composition_shift",
        "step_seconds",
        "peak_memory_mb",
        "norm_parameters",
        "norm_buffers",
    )
    headline = "acc_inductive"
    validation = "val_acc"
    always_shown: tuple[str, ...] = ()
    folds_over = ""

    def setting(self, options: FewShotOptions) -> Setting:
        return Setting(options.norm_batch, 1, datasets.dataset_info(options.dataset).image_shape)

    def data_checksum(self, options: FewShotOptions, data_dir: Path) -> str:
        """Identity of the data. Raises ValueError where these episodes can not be drawn from it."""
        if options.method == "maml":
            check_installed("learn2learn", "few_shot: method maml")
        datasets.check_disjoint(options.dataset, data_dir)
        checksum = datasets.checksum(options.dataset, data_dir)
        for part, labels in _labels(options.dataset, data_dir, checksum).items():
            _check_part(part, labels, options)
        return checksum

    def why_not(self, norm: NormFactory, info: NormInfo, options: FewShotOptions) -> str | None:
        """None if this norm can be trained here, else the reason in one line."""
        shape, _ = expected(options.dataset, options.way)
        host = Host(
            f"{self.name} ({options.method})",
            build_few_shot_net,
            {
                "model": options.model,
                "method": options.method,
                "width": options.width,
                "image_shape": shape,
                "num_classes": options.way,
            },
            shape,
            options.norm_batch,
            absent=("domain",),
            forward=forward_episode,
        )
        return refusal(norm, info, host)

    def steps(self, options: FewShotOptions, data_dir: Path) -> int:
        """Updates of a run."""
        return options.steps

    def network(
        self, norm: NormFactory, options: FewShotOptions, facts: Mapping[str, Any]
    ) -> tuple[nn.Module, Prepare]:
        """See tasks.base.Telling. Of its `embedding` (N, D) new classes are told apart, by prototypes or imprinted
        weights (tasks.few_shot.heads). The network itself gives, of images (N, C, H, W):

            prototypical: the embedding.
            imprinting: logits of the training classes, in the order of their labels.
            maml: logits (N, way) at the weights that adaptation begins with, which tell nothing before a network is
                adapted to a support; with inner_statistics "per_step" the statistics are those of the queries' step.

        Statistics are those of training, whatever `inductive_statistics`. A norm that needs a context has to be shown
        the support first: `situation(net, part="context")`, then queries with part="query".
        """
        net = build(norm, options, tuple(facts["image_shape"]), facts["classes"])
        return net, preparation(facts["mean"], facts["std"], options.memory_format)

    def run(self, norm: NormFactory, options: FewShotOptions, context: RunContext) -> Outcome:
        data = datasets.load_disjoint(options.dataset, context.data_dir).to(context.device)
        if options.method == "maml":
            import_legacy("learn2learn", "few_shot: method maml")  # here, or the first steps' cost would hold it
        memory = PeakMemory(context.device)
        classes = outputs(data, options)
        net = build(norm, options, data.image_shape, classes, device=context.device, generator=context.generator)
        # no draw here is from the global generators; what a norm of one's own draws is the same in every run
        with forked_generators(context.device):
            torch.manual_seed(context.generator("training").initial_seed())
            maml = learner(net, options)
            loop = train(net, maml, data, options, context, memory)
            measured = {
                part: _measure(net, maml, part, getattr(data, part), data, options, context) for part in ("val", "test")
            }
        test, alone = measured["test"], float(measured["test"].inductive.mean())
        probe = preparation(data.mean, data.std, options.memory_format)(data.test.images[:SHIFT_PROBE])
        # with statistics per step the network's own were never trained
        of_queries = contextlib.nullcontext() if maml is None else maml.statistics_of(net, maml.steps)
        with of_queries:
            # without a context there is nothing to ask a norm that needs one
            shift = None if needs_context(net) else composition_shift(net, probe, options.precision)
            weights = net.state_dict()
        metrics: dict[str, float | None] = {
            **loop.costs(net),
            "acc_inductive": alone,
            "acc_transductive": float(test.transductive.mean()),
            "leak": float((test.transductive - test.inductive).mean()),
            "ci95": test.ci95,
            "val_acc": float(measured["val"].inductive.mean()),
            "composition_shift": shift,
        }
        evidence: dict[str, Any] = {
            "data": data.kind,
            "selection": "last step",
            "equals": equivalent(net),
            "statistics": options.inductive_statistics if keeps_stats(net) else "none",
            "inner_statistics": options.inner_statistics if maml is not None and keeps_stats(net) else None,
            "test_episodes": options.test_episodes,
            "test_classes": len(data.test.labels.unique()),
            "train_images": len(data.train),
            "query_variants": _variants(data.test.labels, options),
        }
        facts = {"image_shape": list(data.image_shape), "classes": classes, "mean": data.mean, "std": data.std}
        named = {name: metrics[name] for name in self.metrics}
        return Outcome(named, context.journal.rows, evidence=evidence, trained=Trained(weights, facts))


TASK = FewShot()


def _measure(
    net: FewShotNet,
    maml: Maml | None,
    name: str,
    part: Split,
    data: ImageData,
    options: FewShotOptions,
    context: RunContext,
) -> Accuracy:
    """Accuracies on the validation or test classes; the transductive way for test classes only."""
    what, labels = f"{name} episodes", part.labels.cpu()
    count = options.test_episodes if name == "test" else options.val_episodes
    variants = _variants(labels, options)
    sampler = EpisodeSampler(labels, options.way, options.shot, options.queries, variants)
    episodes = sampler.draw_many(count, context.generator(what))
    draws = context.generator(f"{name} query variants")
    pool = Pool(
        part,
        query_pool(part, variants, options.query_augmentation, draws),
        preparation(data.mean, data.std, options.memory_format),
    )
    by_support = options.inductive_statistics == "support" and keeps_stats(net)
    both = name == "test"
    kept: dict[str, Any] = {"journal": context.journal, "name": what}
    if maml is not None:
        return maml.evaluate(episodes, pool, options.adaptation, both, by_support, **kept)
    return evaluate_episodes(
        net.embedding,
        head_of(net, options.method),
        episodes,
        pool,
        options.way,
        transductive=both,
        support_statistics=by_support,
        precision=options.precision,
        **kept,
    )


def _variants(labels: Tensor, options: FewShotOptions) -> int:
    """Variants of every stored image as a query, in validation and test."""
    return 1 if options.query_augmentation == "none" else variants_needed(labels, options.shot, options.queries)


def _check_part(part: str, labels: Tensor, options: FewShotOptions) -> None:
    if part != "train":
        variants = 1 if options.query_augmentation == "none" else None
        check_episodes(labels, part, way=options.way, shot=options.shot, queries=options.queries, variants=variants)
    elif options.method == "imprinting":
        if options.norm_batch > len(labels):
            raise ValueError(f"imprinting_batch_size {options.norm_batch} exceeds the {len(labels)} training images")
    else:
        way, queries = options.training_way, options.training_queries
        variants = 1 if options.training_augmentation == "none" else None
        names = ("train_way" if options.train_way else "way", "train_queries" if options.train_queries else "queries")
        check_episodes(labels, part, way=way, shot=options.shot, queries=queries, variants=variants, names=names)


@functools.lru_cache(maxsize=16)
def _labels(dataset: str, data_dir: Path, checksum: str) -> dict[str, Tensor]:
    """Labels of every part. Cached: a plan asks for each of its settings; `checksum` is part of the key."""
    data = datasets.load_disjoint(dataset, data_dir)
    return {"train": data.train.labels, "val": data.val.labels, "test": data.test.labels}


def forward_episode(net: nn.Module, images: Tensor, slices: int) -> None:
    """Forward images (N, C, H, W), N >= 2, as an episode in both modes: the first is the support."""
    support, query = images.tensor_split([1])
    forward_together(net, support, query)
    with evaluating(net):
        forward_inductive(net, support, query)
