"""What evaluation leaves alone, what norms are told, what a run hands on to its parts; variants of queries."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from norms.protocol import norm_modules
from norms.registry import make_norm, norm_names, norm_option_defaults, register
from norms.situation import situation
from tasks.base import RunContext
from tasks.data.episodes import EpisodeSampler, query_pool
from tasks.data.images import Split
from tasks.few_shot import options as told
from tasks.few_shot import task as few_shot
from tasks.few_shot.episodic import forward_alone
from tasks.few_shot.evaluation import Pool, evaluate_episodes
from tasks.few_shot.heads import prototypical
from tasks.few_shot.maml import Maml, StepStatistics, maml_step
from tasks.few_shot.networks import build_few_shot_net
from tasks.few_shot.prototypical import prototypical_step
from tasks.few_shot.task import FewShotOptions

RATE, STEPS, WAY, SHAPE = 0.3, 2, 3, (1, 16, 16)
NORM_OPTIONS = {n: {"num_groups": 4} for n in norm_names() if "num_groups" in norm_option_defaults(n)}
KINDS = ("shared", "per_step", "none")


def build(name):
    return build_few_shot_net(
        "conv4", "maml", make_norm(name, **NORM_OPTIONS.get(name, {})), image_shape=SHAPE, num_classes=WAY, width=8,
        generator=lambda purpose: torch.Generator().manual_seed(len(purpose)),
    )  # fmt: skip


def problem(count=2):
    g = torch.Generator().manual_seed(0)
    part = Split(torch.randn(40, *SHAPE, generator=g), torch.arange(5).repeat_interleave(8))
    episodes = EpisodeSampler(part.labels, WAY, 2, 4).draw_many(count, g)
    return episodes, Pool(part, query_pool(part, 1, "none", g), lambda images: images)


def trained(name, kind):
    """A learner whose statistics, all sets of them, differ from the initial ones and from one another."""
    net = build(name)
    runner = Maml(net, RATE, STEPS, True, kind, StepStatistics(net, STEPS) if kind == "per_step" else None)
    g = torch.Generator().manual_seed(7)
    labels = torch.arange(6) % WAY
    for _ in range(3):
        support, query = 2 * torch.randn(6, *SHAPE, generator=g) + 1, torch.randn(6, *SHAPE, generator=g)
        runner.meta_loss(support, labels, query, labels)
    return runner


@pytest.mark.parametrize("name", norm_names(without=["domain"]))
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("support_statistics", [False, True], ids=["running", "support"])
def test_evaluation_leaves_weights_statistics_and_modes_as_they_were(name, kind, support_statistics):
    runner, (episodes, pool) = trained(name, kind), problem()
    net = runner.net
    net.embedding.layers[1].eval()
    state, modes = copy.deepcopy(net.state_dict()), [part.training for part in net.modules()]
    sets = copy.deepcopy([] if runner.sets is None else runner.sets.sets)
    runner.evaluate(episodes, pool, STEPS, True, support_statistics)
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())
    assert [part.training for part in net.modules()] == modes
    assert all(p.grad is None for p in net.parameters())
    for before, now in zip(sets, [] if runner.sets is None else runner.sets.sets, strict=True):
        assert all(torch.equal(b, now[part][key]) for part in before for key, b in before[part].items())


@pytest.fixture
def noting():
    """Two norms of the test: one notes what it is told, one uses batch statistics in evaluation mode, too."""
    told = []

    @register(name="noting", source="test", mixes_samples=False, keeps_stats=False)
    class Noting(nn.Module):
        def __init__(self, num_channels: int, *, affine: bool = True):
            super().__init__()

        def forward(self, x):
            told.append(self.situation.part)
            return x

    @register(name="always", source="test", mixes_samples=True, keeps_stats=False, mixes_samples_in_eval=True)
    class Always(nn.Module):
        def __init__(self, num_channels: int, *, affine: bool = True):
            super().__init__()

        def forward(self, x):
            return x - x.mean(dim=(0, 2, 3), keepdim=True)

    return told


def test_norms_are_told_the_support_of_every_step_and_then_the_queries(noting):
    episodes, pool = problem(1)
    runner = Maml(build("noting"), RATE, STEPS, True, "shared", None)
    support, query = pool.support(episodes[0]), pool.query(episodes[0])
    noting.clear()
    runner.meta_loss(support, episodes[0].support_labels, query, episodes[0].query_labels)
    assert noting == ["context"] * 4 * STEPS + ["query"] * 4
    noting.clear()
    runner.evaluate(episodes, pool, STEPS, True, False)
    assert noting == ["context"] * 4 * STEPS + ["query"] * 4


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("first_order", [True, False], ids=["first", "second"])
def test_maml_normalizes_queries_by_the_support_at_the_adapted_weights(kind, first_order):
    """Loss and gradients against MAML written with torch.func, two episodes in a row."""
    net = build("tasknorm").double()
    runner = Maml(net, RATE, STEPS, first_order, kind, StepStatistics(net, STEPS) if kind == "per_step" else None)
    plain = copy.deepcopy(net)

    def forward(parameters, images, part):
        with situation(plain, part=part):
            return functional_call(plain, parameters, (images,))

    episodes, pool = problem(2)
    for episode in episodes:
        support, query = pool.support(episode).double(), pool.query(episode).double()
        loss, logits = runner.meta_loss(support, episode.support_labels, query, episode.query_labels)
        found = torch.autograd.grad(loss, list(net.parameters()))
        parameters = start = {name: p.detach().clone().requires_grad_() for name, p in plain.named_parameters()}
        for _ in range(STEPS):
            inner = F.cross_entropy(forward(parameters, support, "context"), episode.support_labels)
            slopes = torch.autograd.grad(inner, list(parameters.values()), create_graph=not first_order)
            parameters = {k: p - RATE * s for (k, p), s in zip(parameters.items(), slopes, strict=True)}
        forward(parameters, support, "context")
        expected = forward(parameters, query, "query")
        torch.testing.assert_close(logits, expected)
        loss = F.cross_entropy(expected, episode.query_labels)
        torch.testing.assert_close(found, torch.autograd.grad(loss, list(start.values())))
    kept = [b for _, norm in norm_modules(net) for b in norm.buffers()]
    kept += (
        [] if runner.sets is None else [b for one in runner.sets.sets for part in one.values() for b in part.values()]
    )
    assert not any(b.requires_grad for b in kept)


def test_queries_are_forwarded_one_by_one_where_a_norm_mixes_them_in_evaluation(noting):
    net, (episodes, pool) = build("always").eval(), problem(1)
    query = pool.query(episodes[0])
    with torch.no_grad():
        single = torch.cat([net(image[None]) for image in query])
        assert float((net(query) - single).abs().max()) > 1e-2
        assert torch.equal(forward_alone(net, query), single)


def test_a_run_adapts_with_the_test_steps_and_measures_cost_after_the_import(tmp_path, monkeypatch):
    done, real_import, real_memory = [], few_shot.import_legacy, few_shot.PeakMemory
    real_evaluate, real_shift = Maml.evaluate, few_shot.composition_shift

    def noting_evaluate(self, episodes, pool, steps, *facts, **kept):
        done.append(f"{steps} of {self.steps} steps")
        return real_evaluate(self, episodes, pool, steps, *facts, **kept)

    def noting_shift(net, images, precision):
        seen = {int(norm.num_batches_tracked) for _, norm in norm_modules(net)}
        done.append(f"shift with statistics of {seen} batches")
        return real_shift(net, images, precision)

    real_pool = few_shot.query_pool

    def noting_pool(part, variants, kind, generator):
        done.append(f"pool of {variants} {kind}")
        return real_pool(part, variants, kind, generator)

    monkeypatch.setattr(few_shot, "query_pool", noting_pool)
    monkeypatch.setattr(few_shot, "import_legacy", lambda *a: done.append("import") or real_import(*a))
    monkeypatch.setattr(few_shot, "PeakMemory", lambda *a: done.append("memory") or real_memory(*a))
    monkeypatch.setattr(few_shot, "composition_shift", noting_shift)
    monkeypatch.setattr(Maml, "evaluate", noting_evaluate)
    spec = FewShotOptions(
        method="maml", width=4, way=2, queries=15, steps=2, inner_steps=3, test_inner_steps=2, meta_batch_size=1,
        test_episodes=2, val_episodes=2, inner_statistics="per_step",
    )  # fmt: skip
    few_shot.TASK.run(make_norm("bn"), spec, RunContext(torch.device("cpu"), 0, tmp_path, tmp_path))
    measured = ["pool of 2 affine", "2 of 3 steps"]
    assert done == ["import", "memory", *measured, *measured, "shift with statistics of {2} batches"]


def test_every_variant_of_a_query_has_its_own_embedding():
    part = Split(
        (torch.rand(40, *SHAPE, generator=torch.Generator().manual_seed(1)) * 255).to(torch.uint8),
        torch.arange(5).repeat_interleave(8),
    )
    g = torch.Generator().manual_seed(0)
    episodes = EpisodeSampler(part.labels, WAY, 1, 10, 2).draw_many(3, g)
    pool = Pool(part, query_pool(part, 2, "affine", g), lambda images: images.float() / 255)
    net, seen = build("ln").embedding, []

    def noting_head(support, labels, query, way):
        seen.append((support, query))
        return prototypical(support, labels, query, way)

    evaluate_episodes(net, noting_head, episodes, pool, WAY)
    with torch.no_grad():
        for (support, query), episode in zip(seen, episodes, strict=True):
            torch.testing.assert_close(support, net(pool.support(episode)), rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(query, net(pool.query(episode)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["prototypical", "maml"])
def test_norms_are_told_of_every_update_and_may_look_again(method, noting):
    net = build("noting")
    heard = []
    for _, norm in norm_modules(net):
        norm.after_update = heard.append
        norm.norm_info = replace(norm.norm_info, needs=frozenset({"second_look"}))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    labels, images = torch.arange(6) % WAY, torch.randn(6, *SHAPE, generator=torch.Generator().manual_seed(0))
    episodes = [(images, labels, images, labels)]
    noting.clear()
    if method == "maml":
        maml_step(Maml(net, RATE, 1, True, "shared", None), optimizer, episodes, progress=0.25)
    else:
        prototypical_step(net, optimizer, episodes, WAY, progress=0.25)
    assert heard == [0.25] * 4
    assert len(noting) == {"maml": 3, "prototypical": 2}[method] * 4


@pytest.mark.parametrize("decay", [False, True])
def test_norms_have_weight_decay_only_where_asked(decay, tmp_path, monkeypatch):
    given, real = [], told.parameter_groups
    monkeypatch.setattr(told, "parameter_groups", lambda net, **facts: given.append(facts) or real(net, **facts))
    spec = FewShotOptions(
        width=4, way=2, queries=2, steps=1, test_episodes=2, val_episodes=2, weight_decay=0.25, norm_weight_decay=decay
    )
    few_shot.TASK.run(make_norm("bn"), spec, RunContext(torch.device("cpu"), 0, tmp_path, tmp_path))
    assert given == [{"weight_decay": 0.25, "norm_weight_decay": decay}]
