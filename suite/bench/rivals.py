"""Training steps of our tasks beside the same steps in the code of the libraries below them."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from norms.registry import make_norm
from suite.bench.timing import alternate, ratio


def attacks(rounds: int = 9) -> Iterator[str]:
    """Seconds of a PGD-10 training step of `adversarial` beside the same step with torchattacks' own PGD."""
    from tasks.adversarial.networks import Standardized
    from tasks.adversarial.options import AdversarialOptions
    from tasks.adversarial.training import adversarial_step, draw_start
    from tasks.nets.models import build_net
    from tasks.schedule import sgd
    from tasks.step import StepOptions, train_step
    from tasks.third_party import import_legacy

    library = import_legacy("torchattacks", "bench attacks")
    draw = torch.Generator().manual_seed(0)
    images = torch.rand(64, 1, 32, 32, generator=draw).contiguous(memory_format=torch.channels_last)
    labels = torch.arange(64) % 10
    yield f"attacks: PGD-10 training step, resnet18_narrow, batch 64, 32x32, {torch.get_num_threads()} thread(s)"
    options = AdversarialOptions.model_validate({"model": "resnet18_narrow", "batch_size": 64})

    def contestant(norm: Any, theirs: bool) -> Callable[[], Any]:
        net = build_net("resnet18_narrow", norm, num_classes=10, in_channels=1)
        net = Standardized(net, (0.3,), (0.3,), "cpu").to(memory_format=torch.channels_last)
        optimizer = sgd(net, learning_rate=0.01, momentum=0.9, weight_decay=5e-4)
        if not theirs:
            start = draw_start(images, options, draw)
            return lambda: adversarial_step(net, optimizer, images, labels, start, options)
        # it sets evaluation mode itself
        attack = library.PGD(net, eps=options.radius, alpha=options.training_step_size, steps=options.steps)
        return lambda: train_step(net, optimizer, attack(images, labels), labels, StepOptions())

    cases: tuple[tuple[str, dict[str, Any]], ...] = (("bn", {}), ("gn", {"num_groups": 8}), ("bgn", {"num_groups": 8}))
    for name, norm_options in cases:
        norm = make_norm(name, **norm_options)
        seconds = alternate({str(theirs): contestant(norm, theirs) for theirs in (False, True)}, rounds)
        ours, other = (statistics.median(seconds[key]) for key in ("False", "True"))
        label = name + "".join(f"({k}={v})" for k, v in norm_options.items())
        times = ratio(seconds["True"], seconds["False"])
        yield f"  {label:<20}{ours:7.3f} s   torchattacks' PGD {other:7.3f} s   {times:.2f} x as fast"


WAY, SHOT, QUERIES, WIDTH = 5, 1, 5, 32


def episodes(rounds: int = 60) -> Iterator[str]:
    """Training episodes per second of `few_shot` beside learn2learn's examples, the drawing of episodes included.

    Theirs: learn2learn's own Conv-4 with torch's batch norm, its TaskDataset, and the steps of its examples
    (prototypical networks; MAML, first order and second). Ours: the task's own step and drawing, with bn. Both: glyphs
    as float tensors without augmentation, 5 ways, 1 shot, 5 queries, 32 channels, Adam.
    """
    from tasks.few_shot.options import FewShotOptions
    from tasks.third_party import import_legacy

    library, threads = import_legacy("learn2learn", "bench episodes"), torch.get_num_threads()
    yield f"episodes: glyphs, Conv-4 of {WIDTH}, 5-way 1-shot: training episodes per second, {threads} thread(s)"
    cases: tuple[tuple[str, dict[str, Any]], ...] = (
        ("prototypical", {"method": "prototypical"}),
        ("maml, first order", {"method": "maml", "order": "first"}),
        ("maml, second order", {"method": "maml", "order": "second"}),
    )
    for name, given in cases:
        options = FewShotOptions.model_validate(
            {
                **given,
                "width": WIDTH,
                "train_queries": QUERIES,
                "query_augmentation": "none",
                "inner_steps": 3,
                "meta_batch_size": 1 if given["method"] == "prototypical" else 2,
            }
        )
        contestants = {"ours": _our_episodes(options), "theirs": _their_episodes(library, options)}
        seconds = alternate(contestants, rounds if options.method == "prototypical" else rounds // 3)
        ours, theirs = (options.episodes_per_step / statistics.median(seconds[key]) for key in contestants)
        times = ratio(seconds["theirs"], seconds["ours"])
        yield f"  {name:<20}{ours:7.1f} /s   learn2learn's example {theirs:7.1f} /s   {times:.2f} x as fast"


def _our_episodes(options: Any) -> Callable[[], Any]:
    from tasks import data as datasets
    from tasks.base import RunContext
    from tasks.few_shot import maml as adapting
    from tasks.few_shot import networks, prototypical, training

    context = RunContext(torch.device("cpu"), 0, Path("data"), Path())
    data = datasets.load_disjoint("glyphs", context.data_dir)
    net = networks.build(
        make_norm("bn"), options, data.image_shape, networks.outputs(data, options), generator=context.generator
    )
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    drawn, maml = training.training_episodes(data, options, context), adapting.learner(net, options)

    def step() -> None:
        batch = list(itertools.islice(drawn, options.episodes_per_step))
        if maml is None:
            prototypical.prototypical_step(net, optimizer, batch, WAY)
        else:
            adapting.maml_step(maml, optimizer, batch)

    return step


def _their_episodes(library: Any, options: Any) -> Callable[[], Any]:
    from tasks import data as datasets
    from tasks.data.batches import normalize

    data = datasets.load_disjoint("glyphs", Path("data"))
    images = normalize(data.train.images, data.mean, data.std)
    source = torch.utils.data.TensorDataset(images, data.train.labels)
    pairs = library.data.MetaDataset(source)
    transforms = library.data.transforms
    tasks = library.data.TaskDataset(
        pairs,
        task_transforms=[
            transforms.NWays(pairs, WAY),
            transforms.KShots(pairs, SHOT + QUERIES),
            transforms.LoadData(pairs),
            transforms.RemapLabels(pairs),
            transforms.ConsecutiveLabels(pairs),
        ],
    )
    is_support = torch.arange(WAY * (SHOT + QUERIES)) % (SHOT + QUERIES) < SHOT
    backbone = library.vision.models.CNN4Backbone(hidden_size=WIDTH, channels=1, max_pool=True)

    if options.method == "prototypical":
        optimizer = torch.optim.Adam(backbone.parameters(), lr=1e-3)

        def prototypical() -> None:
            batch, labels = tasks.sample()
            embedded = backbone(batch)
            prototypes = embedded[is_support].reshape(WAY, SHOT, -1).mean(1)
            query = embedded[~is_support]
            shape = (len(query), WAY, query.shape[1])
            distances = (query.unsqueeze(1).expand(shape) - prototypes.unsqueeze(0).expand(shape)).pow(2).sum(2)
            loss = F.cross_entropy(-distances, labels[~is_support])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        return prototypical

    net = nn.Sequential(backbone, nn.Flatten(), nn.Linear(WIDTH * 4, WAY))
    maml = library.algorithms.MAML(net, lr=options.inner_learning_rate, first_order=options.order == "first")
    meta = torch.optim.Adam(maml.parameters(), lr=1e-3)

    def step() -> None:
        meta.zero_grad()
        for _ in range(options.episodes_per_step):
            learner = maml.clone()
            batch, labels = tasks.sample()
            for _ in range(options.inner_steps):
                learner.adapt(F.cross_entropy(learner(batch[is_support]), labels[is_support]))
            loss: Tensor = F.cross_entropy(learner(batch[~is_support]), labels[~is_support])
            loss.backward()
        for parameter in maml.parameters():
            parameter.grad.mul_(1.0 / options.episodes_per_step)
        meta.step()

    return step
