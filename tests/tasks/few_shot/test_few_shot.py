"""The few-shot task: known answers, what a query may depend on, equal episodes for every norm, planning, bad input."""

import importlib.util
import math

import pytest
import torch
import torch.nn.functional as F
from parts import few_shot as few
from parts.few_shot import COST, METHODS, PARTS, SHAPE, context, episode_images, network, norm, options, planted, warmed
from pydantic import ValidationError
from torch import nn

from norms import registry
from norms.factory import factory_info
from norms.registry import make_norm, norm_info, norm_names, register
from norms.situation import hold
from results.metrics import METRICS
from tasks import get_task
from tasks.base import Diverged
from tasks.cost import PeakMemory
from tasks.data.episodes import Episode, EpisodeSampler, query_pool
from tasks.data.images import Split, make_data
from tasks.few_shot import task as few_shot
from tasks.few_shot import training
from tasks.few_shot.episodic import batch_statistics, forward_inductive, forward_together
from tasks.few_shot.evaluation import Accuracy, Pool, evaluate_episodes
from tasks.few_shot.heads import imprinted, prototypical
from tasks.few_shot.maml import Maml, learner, maml_step
from tasks.few_shot.networks import build, build_few_shot_net, outputs
from tasks.few_shot.task import TASK, FewShotOptions
from tasks.options import LeftOut, newer_options
from tasks.step import train_step

pytestmark = pytest.mark.usefixtures("one_thread")
data = few.data

# Known answers


@pytest.mark.parametrize("method", ["prototypical", "imprinting"])
def test_separable_classes_are_told_apart_without_a_mistake(method, tmp_path):
    outcome = TASK.run(norm("bn"), options(method=method, steps=100, shot=2, learning_rate=3e-3), context(tmp_path))
    assert outcome.metrics["acc_inductive"] == 1.0
    assert outcome.metrics["ci95"] == 0.0


@pytest.mark.parametrize("method", METHODS)
def test_noise_is_at_chance_within_its_interval(method, tmp_path, data):
    data.value = planted(noise=True, test_classes=25)
    spec = options(method=method, test_episodes=150)
    metrics = TASK.run(norm("bn"), spec, context(tmp_path)).metrics
    for name in ("acc_inductive", "acc_transductive"):
        assert abs(metrics[name] - 1 / 3) < 2 * metrics["ci95"]
    assert 0.01 < metrics["ci95"] < 0.05


def test_a_prototype_is_the_mean_and_a_logit_the_negative_squared_distance():
    support = torch.tensor([[0.0, 0.0], [2.0, 0.0], [5.0, 5.0], [5.0, 7.0]])
    logits = prototypical(support, torch.tensor([0, 0, 1, 1]), torch.tensor([[1.0, 1.0]]), 2)
    assert torch.equal(logits, torch.tensor([[-1.0, -41.0]]))


def test_an_imprinted_weight_is_the_normalized_mean_of_normalized_embeddings():
    g = torch.Generator().manual_seed(0)
    support, query = torch.randn(6, 5, generator=g), torch.randn(4, 5, generator=g)
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    logits = imprinted(torch.tensor(7.0))(support, labels, query, 3)
    unit = support / support.norm(dim=1, keepdim=True)
    for k in range(3):
        mean = unit[labels == k].mean(0)
        torch.testing.assert_close(logits[:, k], 7 * F.cosine_similarity(query, mean[None], dim=1))


def test_the_interval_is_the_normal_one_over_episodes():
    accuracy = Accuracy.of([(v, None) for v in (0.2, 0.4, 0.4, 0.8)])
    assert accuracy.ci95 == pytest.approx(1.96 * math.sqrt(0.19 / 3) / 2, rel=1e-3)
    assert torch.equal(accuracy.inductive, accuracy.transductive)


# What a query may depend on


@pytest.mark.parametrize("name", norm_names(without=["domain"]))
def test_an_inductive_prediction_does_not_change_when_other_queries_change(name):
    net = warmed(name).eval()
    support, query = episode_images()
    changed = torch.cat([query[:1], 5 * query[1:] - 2])
    first, second = (forward_inductive(net, support, images)[1][0] for images in (query, changed))
    torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", norm_names(without=["domain"]))
def test_an_inductive_prediction_of_maml_does_not_change_when_other_queries_change(name):
    net = warmed(name, "maml")
    support, query = episode_images()
    changed = torch.cat([query[:1], 5 * query[1:] - 2])
    right = []
    for images in (query, changed):
        pool = pool_of(support, images)
        maml = Maml(net, 0.05, 2, True, "shared", None)
        # every label in turn, so that the accuracy of the first query alone tells its prediction
        episodes = [episode_of(len(support), len(images), truth) for truth in range(3)]
        right.append([hits_of_first(maml, episode, pool) for episode in episodes])
    assert right[0] == right[1]
    assert sum(right[0]) == 1


def pool_of(support, query):
    images = torch.cat([support, query])
    part = Split(images, torch.zeros(len(images), dtype=torch.long))
    return Pool(part, query_pool(part, 1, "none", torch.Generator()), lambda x: x)


def episode_of(support, queries, truth=0):
    """Supports 0.., then queries; all queries carry `truth`."""
    return Episode(
        torch.arange(support),
        torch.arange(support) % 3,
        torch.arange(support, support + queries),
        torch.zeros(queries, dtype=torch.long),
        torch.full((queries,), truth),
    )


def hits_of_first(maml, episode, pool):
    """Whether the first query is right: its accuracy with the other queries' truth made impossible."""
    truth = torch.full_like(episode.query_labels, -1)
    truth[0] = episode.query_labels[0]
    alone = Episode(episode.support, episode.support_labels, episode.query, episode.variant, truth)
    accuracy = maml.evaluate([alone, alone], pool, 2, False, False)
    return round(float(accuracy.inductive[0]) * len(truth))


@pytest.mark.parametrize("name", norm_names(without=["domain"]))
@pytest.mark.parametrize("support_statistics", [False, True], ids=["running", "support"])
def test_permuting_queries_permutes_inductive_predictions(name, support_statistics):
    net = warmed(name).eval()
    support, query = episode_images()
    order = torch.randperm(len(query), generator=torch.Generator().manual_seed(1))
    outputs = []
    for images in (query, query[order]):
        pool = pool_of(support, images)
        with torch.no_grad(), hold(net), pool.statistics(net, support if support_statistics else None):
            outputs.append(forward_inductive(net, support, images)[1])
    changed = torch.cat([query[:1], 5 * query[1:] - 2])
    with torch.no_grad(), hold(net), pool.statistics(net, support if support_statistics else None):
        alone = forward_inductive(net, support, changed)[1][0]
    torch.testing.assert_close(outputs[0][0], alone, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(outputs[0][order], outputs[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", norm_names(without=["domain"]))
@pytest.mark.parametrize("support_statistics", [False, True], ids=["running", "support"])
def test_evaluation_leaves_the_network_as_it_was(name, support_statistics):
    net = warmed(name)
    net.embedding.layers[1].eval()
    state = {k: v.clone() for k, v in net.state_dict().items()}
    modes = [m.training for m in net.modules()]
    part = planted().test
    episodes = EpisodeSampler(part.labels, 3, 1, 4).draw_many(2, torch.Generator().manual_seed(0))
    pool = Pool(part, query_pool(part, 1, "none", torch.Generator()), lambda x: x.float() / 255)
    facts = {"transductive": True, "support_statistics": support_statistics}
    evaluate_episodes(net, prototypical, episodes, pool, 3, **facts)
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
    assert [m.training for m in net.modules()] == modes


@pytest.mark.parametrize("name", norm_names(without=["domain"]))
def test_only_norms_that_mix_queries_tell_the_two_ways_apart(name):
    net = warmed(name)
    support, query = episode_images()
    with torch.no_grad():
        with batch_statistics(net):
            together = forward_together(net, support, query)[1]
        alone = forward_inductive(net.eval(), support, query)[1]
    differs = float((together - alone).abs().max()) > 1e-3
    info = factory_info(norm(name))
    assert differs is (info.mixes_samples and "context" not in info.needs)


@pytest.mark.parametrize("support_statistics", [False, True], ids=["running", "support"])
def test_embedding_once_is_the_same_as_a_forward_per_episode(support_statistics):
    net = warmed("bn")
    part = planted().test
    episodes = EpisodeSampler(part.labels, 3, 1, 4).draw_many(6, torch.Generator().manual_seed(0))
    pool = Pool(part, query_pool(part, 2, "affine", torch.Generator().manual_seed(2)), lambda x: x.float() / 255)
    found = evaluate_episodes(net, prototypical, episodes, pool, 3, support_statistics=support_statistics)
    for number, episode in enumerate(episodes):
        support, query = pool.support(episode), pool.query(episode)
        by_hand = warmed("bn")
        if support_statistics:
            for module in by_hand.modules():
                if hasattr(module, "reset_running_stats"):
                    module.reset_running_stats()
                    module.momentum = None
            by_hand(support)
        by_hand.eval()
        logits = prototypical(by_hand(support), episode.support_labels, by_hand(query), 3)
        expected = (logits.argmax(1) == episode.query_labels).double().mean()
        assert float(found.inductive[number]) == pytest.approx(float(expected), abs=1e-6)


def test_dropout_stays_off_while_norms_use_the_batch():
    net = nn.Sequential(make_norm("bn")(1), nn.Dropout(0.5))
    with batch_statistics(net):
        assert net[0].training
        assert not net[1].training
    assert net.training


@pytest.fixture
def contextual():
    """A norm that has to see the support first; it notes which part it was told."""
    told = []

    @register(name="ctx", source="test", mixes_samples=False, keeps_stats=False, needs=("context",))
    class Contextual(nn.Module):
        def __init__(self, num_channels: int, *, affine: bool = True):
            super().__init__()

        def forward(self, x):
            told.append((self.situation.part, len(x)))
            return x

    return told


@pytest.mark.parametrize(
    ("method", "training", "episode"),
    [
        ("prototypical", "cq", "cq"),
        ("maml", "ccq", "ccq"),  # the inner step, and once more with the adapted weights
        ("imprinting", "c", "cq"),
    ],
)
def test_a_norm_that_needs_context_sees_the_support_and_then_the_queries(
    method, training, episode, contextual, tmp_path
):
    spec = options(method=method, steps=1, test_episodes=2, val_episodes=2, meta_batch_size=1, inner_steps=1)
    assert TASK.why_not(make_norm("ctx"), factory_info(make_norm("ctx")), spec) is None
    contextual.clear()
    TASK.run(make_norm("ctx"), spec, context(tmp_path))
    blocks = training + 4 * episode  # of the four norms each
    assert "".join(part[0] for part, _ in contextual) == "".join(letter * 4 for letter in blocks)
    sizes = [size for part, size in contextual if part == "context"]
    assert set(sizes[4:]) == {3}
    assert sizes[0] == (16 if method == "imprinting" else 3)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shot", [1, 3])
def test_tasknorm_runs_with_every_method_and_repeats_itself_bit_for_bit(method, shot, tmp_path):
    # running statistics or those of the support: it has none of its own
    specs = [options(method=method, shot=shot, inductive_statistics=kind) for kind in ("running", "support")]
    first, second = (TASK.run(make_norm("tasknorm"), spec, context(tmp_path)) for spec in specs)
    for name in set(TASK.metrics) - set(COST):
        assert first.metrics[name] == second.metrics[name], name
    assert first.metrics["leak"] == 0  # its queries never see each other
    assert first.metrics["composition_shift"] is None
    assert first.evidence["statistics"] == "none"


@pytest.mark.parametrize("method", METHODS)
def test_tasknorm_tells_separable_classes_apart(method, tmp_path):
    spec = options(method=method, steps=100, shot=2, learning_rate=3e-3)
    assert TASK.run(make_norm("tasknorm"), spec, context(tmp_path)).metrics["acc_inductive"] > 0.95


@pytest.mark.parametrize("method", METHODS)
def test_divergence_with_a_context_is_a_result_too(method, tmp_path, monkeypatch):
    real = build

    def spoiled(*arguments, **where):
        net = real(*arguments, **where)
        with torch.no_grad():
            next(net.parameters()).fill_(math.nan)
        return net

    monkeypatch.setattr(few_shot, "build", spoiled)
    with pytest.raises(Diverged, match=r"step 1: the loss is nan"):
        TASK.run(make_norm("tasknorm"), options(method=method), context(tmp_path))


def test_queries_after_a_context_are_forwarded_together():
    net, (support, query) = warmed("tasknorm").eval(), episode_images()
    sizes = []
    net.embedding.register_forward_hook(lambda module, inputs, output: sizes.append(len(output)))
    with torch.no_grad():
        together = forward_inductive(net, support, query)[1]
        single = [forward_inductive(net, support, image[None])[1] for image in query]
    assert sizes[:2] == [len(support), len(query)]
    torch.testing.assert_close(together, torch.cat(single))


@pytest.mark.parametrize("method", ["prototypical", "maml"])
def test_an_episode_leaves_nothing_for_the_next_one(method):
    net = warmed("tasknorm", method)
    part = planted(noise=True).test
    episodes = EpisodeSampler(part.labels, 3, 1, 4).draw_many(8, torch.Generator().manual_seed(0))
    pool = Pool(part, query_pool(part, 1, "none", torch.Generator()), lambda x: x.float() / 255)

    def accuracies(chosen):
        if method == "maml":
            return Maml(net, 0.1, 2, True, "shared", None).evaluate(chosen, pool, 2, True, False).inductive
        return evaluate_episodes(net, prototypical, chosen, pool, 3).inductive

    forwards, backwards = accuracies(episodes), accuracies(episodes[::-1])
    assert len(forwards.unique()) > 1
    assert torch.equal(forwards, backwards.flip(0))


def test_an_update_of_imprinting_is_that_of_every_classifier():
    images, labels = torch.randn(16, *SHAPE, generator=torch.Generator().manual_seed(0)), torch.arange(16) % 3
    nets = [network("bn", "imprinting") for _ in range(2)]
    for net, step in zip(nets, (training.imprinting_step, train_step), strict=True):
        optimizer = torch.optim.Adam(net.parameters())
        results = [step(net, optimizer, images, labels) for _ in range(3)]
        net.result = results
    assert nets[0].result == nets[1].result
    states = [net.state_dict() for net in nets]
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())


# Runs


@pytest.mark.parametrize("method", METHODS)
def test_a_run_returns_the_declared_metrics_and_repeats_itself_bit_for_bit(method, tmp_path):
    spec = options(method=method)
    first, second = (TASK.run(norm("bgn"), spec, context(tmp_path)) for _ in range(2))
    assert get_task("few_shot") is TASK
    assert tuple(first.metrics) == TASK.metrics
    assert set(TASK.metrics) <= METRICS.keys()
    assert {TASK.headline, TASK.validation} <= set(TASK.metrics)
    for name in set(TASK.metrics) - set(COST):
        assert first.metrics[name] == second.metrics[name], name
    assert first.evidence == second.evidence
    assert first.evidence["statistics"] == "running"
    assert first.evidence["inner_statistics"] == ("shared" if method == "maml" else None)
    assert [row["step"] for row in first.history] == list(range(1, 11))
    m = first.metrics
    assert m["leak"] == pytest.approx(m["acc_transductive"] - m["acc_inductive"], abs=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_the_two_columns_are_equal_for_a_norm_that_does_not_mix(method, tmp_path):
    metrics = TASK.run(norm("ln"), options(method=method), context(tmp_path)).metrics
    assert metrics["acc_inductive"] == metrics["acc_transductive"]
    assert metrics["leak"] == 0


def test_test_statistics_of_the_support_alone_are_another_run_and_stated(tmp_path):
    running, support = (
        TASK.run(norm("bn"), options(inductive_statistics=kind), context(tmp_path)) for kind in ("running", "support")
    )
    assert running.metrics["acc_transductive"] == support.metrics["acc_transductive"]
    assert support.evidence["statistics"] == "support"
    assert TASK.run(norm("ln"), options(), context(tmp_path)).evidence["statistics"] == "none"


def test_every_norm_gets_the_same_weights_training_and_test_episodes(tmp_path, monkeypatch):
    seen = {}
    real_step, real_evaluate = training.prototypical_step, few_shot.evaluate_episodes

    def noting_step(net, optimizer, episodes, way, **facts):
        seen[current].append([t.clone() for episode in episodes for t in episode])
        return real_step(net, optimizer, episodes, way, **facts)

    def noting_evaluate(net, head, episodes, pool, way, **facts):
        seen[current].append([pool.query(e) for e in episodes] + [pool.support(e) for e in episodes])
        return real_evaluate(net, head, episodes, pool, way, **facts)

    monkeypatch.setattr(training, "prototypical_step", noting_step)
    monkeypatch.setattr(few_shot, "evaluate_episodes", noting_evaluate)
    spec = options(steps=3, query_augmentation="affine")
    for current in norm_names(without=["domain"]):
        seen[current] = []
        TASK.run(norm(current), spec, context(tmp_path))
        assert len(seen[current]) == 5
        for ours, theirs in zip(seen[current], seen["none"], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    weights = [
        {
            k: v
            for k, v in build(norm(n), spec, SHAPE, 3, generator=context(tmp_path).generator).state_dict().items()
            if "conv" in k
        }
        for n in ("bn", "ln")
    ]
    assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])


def test_training_lowers_the_loss_of_every_method(tmp_path):
    for method in METHODS:
        spec = options(method=method, steps=60, learning_rate=3e-3)
        history = TASK.run(norm("bn"), spec, context(tmp_path)).history
        assert history[-1]["train_loss"] < history[0]["train_loss"], method


def test_divergence_is_a_result_that_names_the_step(tmp_path):
    with pytest.raises(Diverged, match=r"step \d+: the loss is"):
        TASK.run(norm("none"), options(learning_rate=1e30), context(tmp_path))


@pytest.mark.parametrize("method", ["maml", "prototypical"])
def test_logits_that_are_not_finite_diverge_and_are_no_accuracy_at_chance(method, tmp_path, monkeypatch):
    net_step = maml_step if method == "maml" else training.prototypical_step

    def spoil(net, *arguments, **facts):
        loss, correct = net_step(net, *arguments, **facts)
        inner = net.net if method == "maml" else net
        with torch.no_grad():
            next(inner.parameters()).fill_(math.nan)
        return loss, correct

    monkeypatch.setattr(training, f"{method}_step", spoil)
    run = context(tmp_path)
    with pytest.raises(Diverged, match=r"episode 0 of the evaluation: logits are not finite"):
        TASK.run(norm("bn"), options(method=method, steps=1), run)
    assert len(run.journal.rows) == 1


def test_colour_images_train_in_every_network_and_method(tmp_path, data):
    data.value = colour = planted()
    parts = {p: Split(getattr(colour, p).images.expand(-1, 3, -1, -1), getattr(colour, p).labels) for p in PARTS}
    facts = {"kind": "synthetic", "checksum": "0", "num_classes": 40, "disjoint_classes": True}
    data.value = make_data("planted", "planted", parts, **facts)
    for model in ("conv4", "resnet12"):
        for method in METHODS:
            spec = options(model=model, method=method, steps=2, test_episodes=2, val_episodes=2)
            assert TASK.run(norm("bn"), spec, context(tmp_path)).metrics["acc_inductive"] > 0


# Networks


@pytest.mark.parametrize(("model", "parameters"), [("conv4", 112_832), ("resnet12", 12_424_320)])
def test_known_parameter_counts(model, parameters):
    net = build_few_shot_net(
        model, "prototypical", make_norm("bn"), image_shape=(3, 84, 84), num_classes=5, device="meta"
    )
    assert sum(p.numel() for p in net.parameters()) == parameters
    out = net(torch.empty(2, 3, 84, 84, device="meta"))
    assert out.shape == (2, {"conv4": 1600, "resnet12": 640}[model])


def why_not(name, **given):
    factory = norm(name)
    return TASK.why_not(factory, factory_info(factory), options(**given))


CENTRE_FILTERS = [n for n in norm_names() if hasattr(norm(n)(8), "transform_weight")]


@pytest.mark.parametrize("name", norm_names(without=["domain"]))
@pytest.mark.parametrize("model", ["conv4", "resnet12"])
@pytest.mark.parametrize("method", METHODS)
def test_every_norm_can_be_planned_in_every_network(name, model, method):
    # in colour, where a filter of a 1x1 convolution has more than one weight
    dataset = "folder:colour" if model == "resnet12" and name in CENTRE_FILTERS else "glyphs"
    assert why_not(name, model=model, method=method, dataset=dataset) is None


@pytest.mark.parametrize("method", METHODS)
def test_norms_that_can_not_serve_are_skipped_with_the_reason(method):
    for name in norm_names():
        needs = "domain" in norm_info(name).needs
        reason = f"needs domain, which few_shot ({method}) has not" if needs else None
        assert why_not(name, method=method, dataset="glyphs") == reason
    # the first shortcut of resnet12 is a 1x1 convolution, and an image of glyphs has one channel
    for name in CENTRE_FILTERS:
        reason = why_not(name, method=method, model="resnet12", dataset="glyphs")
        assert reason is not None
        assert name not in reason
        assert "given" in reason
        assert "(8, 1, 1, 1)" in reason


def test_a_network_trains_on_the_meta_device():
    net = build_few_shot_net(
        "resnet12", "prototypical", make_norm("bgn", num_groups=4), image_shape=SHAPE, num_classes=3, width=8,
        device="meta",
    )  # fmt: skip
    optimizer = torch.optim.Adam(net.parameters())
    labels = torch.zeros(6, dtype=torch.long, device="meta")
    support, query = (torch.zeros(6, *SHAPE, device="meta") for _ in range(2))
    loss, correct = training.prototypical_step(net, optimizer, [(support, labels, query, labels)], 3)
    assert loss.device.type == correct.device.type == "meta"


# Options and planning


def test_a_grid_over_options_that_a_method_has_not_repeats_no_run():
    assert options(method="prototypical", order="second", inner_steps=9) == options(method="prototypical")
    assert options(method="maml", train_way=9, imprinting_batch_size=7) == options(method="maml")
    assert options(method="imprinting", meta_batch_size=3, train_queries=7) == options(method="imprinting")
    assert options(method="maml", inner_steps=4) != options(method="maml")
    assert options(train_way=9) != options()
    assert (options().inner_steps, options().order, options(method="imprinting").meta_batch_size) == (None, None, None)
    assert (FewShotOptions(method="maml").meta_batch_size, FewShotOptions().meta_batch_size) == (4, 1)
    for method in METHODS:
        resolved = options(method=method)
        assert FewShotOptions.model_validate(resolved.model_dump(mode="json")) == resolved


def test_options_of_another_optimizer_or_schedule_are_null_and_those_at_their_default_are_not_named():
    assert options(momentum=0.5, milestones=(0.2,)) == options()
    assert options(betas=(0.9, 0.999)) == options()
    assert options(optimizer="sgd", betas=(0.5, 0.9)) == options(optimizer="sgd")
    assert options(schedule="steps", milestones=(0.5, 0.75)) == options(schedule="steps")
    assert (options(optimizer="sgd").momentum, options(optimizer="sgd", momentum=0.0).momentum) == (0.9, 0.0)
    for given in ({"betas": (0.5, 0.9)}, {"optimizer": "adamw"}, {"schedule": "steps", "milestones": (0.2, 0.4)}):
        changed = options(**given)
        assert changed != options(schedule=given.get("schedule", "cosine"))
        assert FewShotOptions.model_validate(changed.model_dump(mode="json")) == changed
    newer = newer_options(FewShotOptions)
    assert newer.items() <= FewShotOptions().model_dump(mode="json").items()
    assert set(newer) == {"optimizer", "momentum", "betas", "milestones", "gradient_clip", "precision", "compile"}


@pytest.mark.parametrize(
    ("given", "kind", "facts"),
    [
        ({}, torch.optim.Adam, {"betas": (0.9, 0.999), "lr": 0.5, "foreach": None}),
        ({"betas": (0.5, 0.9)}, torch.optim.Adam, {"betas": (0.5, 0.9), "weight_decay": 0.25}),
        ({"optimizer": "adamw", "betas": (0.5, 0.9)}, torch.optim.AdamW, {"betas": (0.5, 0.9), "weight_decay": 0.25}),
        ({"optimizer": "sgd", "momentum": 0.5}, torch.optim.SGD, {"momentum": 0.5, "nesterov": True, "lr": 0.5}),
    ],
)
def test_the_optimizer_is_the_one_that_was_asked_for(given, kind, facts):
    optimizer = options(learning_rate=0.5, weight_decay=0.25, **given).trained_by(network("bn"))
    assert type(optimizer) is kind
    assert facts.items() <= optimizer.param_groups[0].items()
    assert optimizer.param_groups[1]["weight_decay"] == 0


def test_milestones_lower_the_rate():
    rate = options(schedule="steps", milestones=(0.2, 0.4), learning_rate=1.0).rate
    assert [rate(at) for at in (0.1, 0.3, 0.6)] == pytest.approx([1, 0.1, 0.01])


@pytest.mark.parametrize("method", METHODS)
def test_every_forward_of_a_run_is_in_its_precision(method, tmp_path, monkeypatch):
    seen = {}
    real = few_shot.build

    def watched(*arguments, **where):
        net = real(*arguments, **where)
        for layer in net.modules():
            if isinstance(layer, nn.Conv2d):
                layer.register_forward_hook(lambda module, inputs, output: seen[kind].append(output.dtype))
        return net

    monkeypatch.setattr(few_shot, "build", watched)
    outcomes = {}
    for kind in ("float32", "bfloat16"):
        seen[kind] = []
        for name, statistics in (("bn", "support"), ("bn", "running"), ("tasknorm", "running"), ("mbn", "running")):
            spec = options(method=method, precision=kind, inductive_statistics=statistics, steps=2, test_episodes=2)
            outcomes[kind] = TASK.run(norm(name), spec, context(tmp_path))
    assert {kind: set(dtypes) for kind, dtypes in seen.items()} == {k: {getattr(torch, k)} for k in seen}
    assert len(seen["float32"]) == len(seen["bfloat16"])
    losses = [outcome.history[-1]["train_loss"] for outcome in outcomes.values()]
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.1)


@pytest.mark.parametrize("method", METHODS)
def test_the_gradient_of_an_update_is_clipped(method, tmp_path):
    def moved(**given):
        spec = options(method=method, optimizer="sgd", momentum=0.0, weight_decay=0.0, learning_rate=0.5, **given)
        spec = FewShotOptions.model_validate(
            spec.model_dump() | {"steps": 1, "schedule": "constant", "test_episodes": 2, "val_episodes": 2}
        )
        data, run = planted(), context(tmp_path)
        net = build(norm("gn"), spec, data.image_shape, outputs(data, spec), generator=run.generator)
        before = torch.cat([p.detach().clone().flatten() for p in net.parameters()])
        training.train(net, learner(net, spec), data, spec, run, PeakMemory(torch.device("cpu")))
        return float((torch.cat([p.detach().flatten() for p in net.parameters()]) - before).norm())

    assert moved() > 1e-2
    assert moved(gradient_clip=1e-3) == pytest.approx(0.5e-3, rel=1e-2)


def test_compile_compiles_the_embedding_and_is_refused_for_maml(monkeypatch):
    compiled = []
    monkeypatch.setattr(nn.Module, "compile", lambda self: compiled.append(type(self).__name__))
    for method in ("prototypical", "imprinting"):
        for wanted in (False, True):
            build(norm("bn"), options(method=method, compile=wanted), SHAPE, 3)
    assert compiled == ["Conv4", "Conv4"]
    with pytest.raises(ValidationError, match=r"method maml trains clones .* compile: false") as caught:
        options(method="maml", compile=True)
    (error,) = caught.value.errors()
    assert isinstance(error["ctx"]["error"], LeftOut)  # a grid over methods goes without it


@pytest.mark.slow
def test_a_compiled_run_learns_as_the_other_does(tmp_path):
    for method in ("prototypical", "imprinting"):
        plain, fast = (
            TASK.run(norm("bn"), options(method=method, steps=5, compile=wanted), context(tmp_path))
            for wanted in (False, True)
        )
        losses = [run.history[-1]["train_loss"] for run in (plain, fast)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-2)


@pytest.mark.parametrize(
    ("given", "norm_batch"),
    [
        ({"shot": 2, "train_way": 7, "train_queries": 5}, 49),
        ({"method": "maml", "shot": 2}, 6),
        ({"method": "imprinting"}, 16),
    ],
)
def test_the_norm_batch_of_the_setting_is_that_of_a_training_forward(given, norm_batch):
    assert TASK.setting(options(**given)).norm_batch_size == norm_batch


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"way": 1}, "way"),
        ({"shot": 0}, "shot"),
        ({"method": "mamal"}, "method"),
        ({"model": "conv5"}, "model"),
        ({"method": "maml", "inner_statistics": "per_step", "test_inner_steps": 9}, "test_inner_steps 9 exceeds"),
        ({"ways": 5}, "ways"),
        ({"order": "thrid"}, "order"),
        ({"inner_steps": 0}, "inner_steps"),
        ({"optimizer": "adamw", "betas": (0.9, 1.0)}, "betas"),
        ({"milestones": (0.6, 0.3)}, "rising fractions"),
        ({"gradient_clip": 0.0}, "gradient_clip"),
    ],
)
def test_a_wrong_option_is_named(given, message):
    with pytest.raises(ValidationError, match=message):
        options(**given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"way": 7}, "way 7 exceeds the 4 classes of the val part"),
        ({"way": 3, "train_way": 11}, "train_way 11 exceeds the 10 classes of the train part"),
        ({"shot": 8}, "shot 8 leaves no query: class 0 of the train part has 8 images, so shot is at most 7"),
        ({"queries": 8}, "shot 1 and queries 8 exceed the 8 images"),
        ({"method": "imprinting", "imprinting_batch_size": 100}, "exceeds the 80 training images"),
    ],
)
def test_episodes_that_can_not_be_drawn_are_said_while_planning(given, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        TASK.data_checksum(options(**given), tmp_path)


def test_a_set_whose_parts_share_classes_is_refused(tmp_path):
    with pytest.raises(ValueError, match="parts share classes; allowed: glyphs, omniglot"):
        TASK.data_checksum(options(dataset="fashion_mnist_mini"), tmp_path)


def test_without_learn2learn_planning_names_the_command_unless_nothing_needs_it(tmp_path, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "learn2learn" else real(name, *a))
    with pytest.raises(ValueError, match=r"needs learn2learn.*pip install --no-deps -r requirements-legacy\.txt"):
        TASK.data_checksum(options(method="maml"), tmp_path)
    assert TASK.data_checksum(options(), tmp_path)


def test_a_norm_that_needs_a_domain_is_skipped_with_the_reason():
    info = registry.NormInfo("dom", "test", 1, False, False, needs=frozenset({"domain"}))
    assert TASK.why_not(make_norm("ln"), info, options()) == "needs domain, which few_shot (prototypical) has not"


def test_images_that_are_too_small_are_refused():
    with pytest.raises(ValueError, match="needs 16x16 at least"):
        build_few_shot_net("conv4", "maml", make_norm("bn"), image_shape=(1, 8, 8), num_classes=3)
