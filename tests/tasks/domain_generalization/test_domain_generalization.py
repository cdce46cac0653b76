"""The task domain_generalization: nothing of the held-out domain is used, domain-balanced batches, bne, bad input."""

import math
from dataclasses import replace

import pytest
import torch
from parts import domain_generalization as generalized
from parts.domain_generalization import NAMES, NEEDS_KNOWN_DOMAIN, context, norm, options, planted
from parts.norm_choices import one_of_each_kind
from pydantic import ValidationError

from norms.factory import factory_info
from norms.registry import make_norm, norm_info, norm_names
from norms.situation import situation
from norms.workers import ALONE
from results.metrics import METRICS
from tasks import get_task
from tasks.base import Diverged, RunContext
from tasks.data.batches import normalize
from tasks.data.images import Split, channel_moments
from tasks.domain_generalization import task as domain_generalization
from tasks.domain_generalization import training
from tasks.domain_generalization.options import DomainGeneralizationOptions
from tasks.domain_generalization.task import TASK
from tasks.nets.models import build_net

pytestmark = pytest.mark.usefixtures("one_thread")
domains = generalized.domains


def run(name, spec, tmp_path, monkeypatch, seed=0):
    """The outcome, and the network that training ended with."""
    built = []

    def keep(*args, **kwargs):
        built.append(build_net(*args, **kwargs))
        return built[0]

    monkeypatch.setattr(domain_generalization, "build_net", keep)
    outcome = TASK.run(norm(name), spec, context(tmp_path, seed))
    return outcome, built[0]


def equal(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.parametrize("name", ["bn", "bne", "bgn", "gn"])
def test_nothing_of_the_held_out_domain_touches_anything_but_its_scores(name, domains, tmp_path, monkeypatch):
    """Weights, running statistics, every choice and every figure of the sources, bit for bit."""
    spec = options(held_out="fonts")
    true, net = run(name, spec, tmp_path, monkeypatch)
    draw = torch.Generator().manual_seed(9)
    noise = {
        part: Split(
            torch.randint(256, getattr(domains["fonts"], part).images.shape, generator=draw).to(torch.uint8),
            getattr(domains["fonts"], part).labels.flip(0),
        )
        for part in ("train", "val", "test")
    }
    domains["fonts"] = replace(domains["fonts"], **noise, mean=(0.9,) * 3, std=(0.01,) * 3)
    other, same = run(name, spec, tmp_path, monkeypatch)
    assert equal(net.state_dict(), same.state_dict())
    for key in ("source_top1", "val_top1", "norm_parameters", "norm_buffers"):
        assert true.metrics[key] == other.metrics[key]
    for one, two in zip(true.history, other.history, strict=True):
        for key in one.keys() - {"target_top1", "seconds"}:
            assert one[key] == two[key]
    assert true.evidence["chosen_epochs"] == other.evidence["chosen_epochs"]
    assert [h["target_top1"] for h in true.history] != [h["target_top1"] for h in other.history]


def test_a_source_does_touch_everything(domains, tmp_path, monkeypatch):
    """The test above can fail: the same change to a source is seen."""
    spec = options(held_out="fonts")
    _, net = run("bn", spec, tmp_path, monkeypatch)
    domains["uci"] = planted(0.3, 8, 80)
    _, other = run("bn", spec, tmp_path, monkeypatch)
    assert not equal(net.state_dict(), other.state_dict())


@pytest.mark.parametrize("norm_batch", [None, 4])
def test_batches_hold_equally_many_images_of_every_source_and_say_whose(norm_batch, domains, tmp_path, monkeypatch):
    seen = []
    real = training.train_step

    def noting(net, optimizer, images, labels, told, **rest):
        seen.append((images.clone(), told))
        return real(net, optimizer, images, labels, told, **rest)

    monkeypatch.setattr(training, "train_step", noting)
    run("bne", options(held_out="uci", norm_batch_size=norm_batch, augmentation="none"), tmp_path, monkeypatch)
    # (96 + 64 + 48) / 3 = 69 images of each, 4 batches of 16, twice
    assert len(seen) == 8
    brightness = []
    for images, told in seen:
        assert told.domain.tolist() == [0] * 16 + [1] * 16 + [2] * 16
        assert told.slices == (1 if norm_batch is None else 4)
        for k in range(told.slices):
            assert told.domain[k :: told.slices].bincount().tolist() == [16 // told.slices] * 3
        brightness.append([images[told.domain == d].mean().item() for d in range(3)])
    for row in brightness:  # mnist, fonts, blend have contrast 1, 0.6, 0.4
        assert row[0] > row[1] > row[2]


def test_every_norm_meets_the_same_images_in_the_same_order(domains, tmp_path, monkeypatch):
    seen = {}
    real = training.train_step

    def noting(net, optimizer, images, labels, told, **rest):
        seen.setdefault(name, []).append(images.clone())
        return real(net, optimizer, images, labels, told, **rest)

    monkeypatch.setattr(training, "train_step", noting)
    for name in ("bn", "gn", "bne"):
        run(name, options(), tmp_path, monkeypatch)
    for name in ("gn", "bne"):
        assert all(torch.equal(a, b) for a, b in zip(seen["bn"], seen[name], strict=True))


def test_bne_keeps_statistics_of_each_source_apart(domains, tmp_path, monkeypatch):
    """Weights as at the start: what the stem keeps of a domain lies next to that domain's own mean."""
    spec = options(epochs=3, augmentation="none", learning_rate=1e-9)
    _, net = run("bne", spec, tmp_path, monkeypatch)
    kept = net.stem.norm.running_mean / (1 - 0.9**12)  # 4 batches in each of 3 epochs, from 0
    mean, std = channel_moments(torch.cat([domains[d].train.images for d in spec.sources]))
    own = torch.stack(
        [net.stem.conv(normalize(domains[d].train.images, mean, std)).mean((0, 2, 3)) for d in spec.sources]
    )
    assert torch.cdist(kept, own).argmin(1).tolist() == [0, 1, 2]


def test_sources_are_forwarded_as_of_their_domain_and_the_unseen_as_of_none(domains, tmp_path, monkeypatch):
    told = []
    real = training.evaluate

    def noting(net, batches, precision, what, domain=None, workers=ALONE):
        told.append(domain)
        return real(net, batches, precision, what, domain, workers)

    monkeypatch.setattr(training, "evaluate", noting)
    run("bne", options(epochs=1), tmp_path, monkeypatch)
    assert told == [0, 1, 2, None, 0, 1, 2, None]


@pytest.mark.parametrize(
    "name", one_of_each_kind([n for n in norm_names(without=["context"]) if n not in NEEDS_KNOWN_DOMAIN])
)
def test_every_declared_metric_is_returned_finite_and_nothing_else(name, domains, tmp_path, monkeypatch):
    outcome, net = run(name, options(epochs=1), tmp_path, monkeypatch)
    assert tuple(outcome.metrics) == TASK.metrics
    assert all(isinstance(v, float) and v == v and abs(v) != float("inf") for v in outcome.metrics.values())
    assert set(TASK.metrics) <= set(METRICS)
    assert outcome.metrics["target_top1"] == outcome.history[-1]["target_top1"]
    assert outcome.evidence["test_images"] == 48 + 40 + 60
    assert net.training


def test_the_earliest_of_equally_good_epochs_is_the_one_that_validation_chooses(domains, tmp_path, monkeypatch):
    monkeypatch.setattr(domain_generalization, "over_sources", lambda *given: 0.5)
    outcome, _ = run("bn", options(epochs=3), tmp_path, monkeypatch)
    assert outcome.evidence["chosen_epochs"] == {"source_val": 1}
    assert outcome.metrics["target_top1_source_val"] == outcome.history[0]["target_top1"]


def test_the_rate_is_per_128_images_of_all_sources():
    assert options().peak_learning_rate == pytest.approx(0.8 * 3 * 16 / 128)
    assert options(scale_learning_rate=False).peak_learning_rate == 0.8


def test_precision_optimizer_clip_and_milestones_reach_the_training(domains, tmp_path, monkeypatch):
    def losses(**given):
        spec = options(learning_rate=0.04, schedule="steps", **given)
        outcome, net = run("bne", spec, tmp_path, monkeypatch)
        assert all(math.isfinite(value) for row in outcome.history for value in row.values())
        assert all(weight.dtype == torch.float32 for weight in net.parameters())
        return tuple(row["train_loss"] for row in outcome.history)

    told = [{}, {"precision": "bfloat16"}, {"optimizer": "adamw"}, {"gradient_clip": 0.1}, {"milestones": (0.3,)}]
    assert len({losses(**given) for given in told}) == len(told)


def test_bfloat16_reaches_every_forward_that_is_measured(domains, tmp_path, monkeypatch):
    seen = []

    def watched(*args, **kwargs):
        net = build_net(*args, **kwargs)
        net.head.register_forward_hook(lambda module, given, output: seen.append((module.training, output.dtype)))
        return net

    monkeypatch.setattr(domain_generalization, "build_net", watched)
    TASK.run(norm("bn"), options(precision="bfloat16", epochs=1), context(tmp_path))
    assert set(seen) == {(True, torch.bfloat16), (False, torch.bfloat16)}


def test_sources_of_equal_size_are_not_shuffled_alike(domains, tmp_path, monkeypatch):
    """Each is drawn from a generator of its own name, so that one more domain moves no other's order."""
    purposes = []
    real = RunContext.generator

    def noting(self, purpose, *rest):
        purposes.append(purpose)
        return real(self, purpose, *rest)

    monkeypatch.setattr(RunContext, "generator", noting)
    run("bn", options(epochs=1), tmp_path, monkeypatch)
    assert [p for p in purposes if p.startswith("order")] == ["order of mnist", "order of uci", "order of fonts"]


def test_its_headline_and_validation_metrics_are_its_own():
    assert TASK.headline in TASK.metrics
    assert TASK.validation == "val_top1"
    assert get_task("domain_generalization") is TASK


def test_divergence_names_the_step(domains, tmp_path):
    with pytest.raises(Diverged, match=r"step \d+: the loss is"):
        TASK.run(make_norm("none"), options(learning_rate=1e6), context(tmp_path))


def test_an_unseen_domain_without_finite_outputs_diverges_by_name_for_bne_too(domains, tmp_path, monkeypatch):
    """bne has no forward without a domain but the combined one, and the message looks at the network once more."""
    _, net = run("bne", options(epochs=1), tmp_path, monkeypatch)
    with torch.no_grad():
        net.head.weight[0, 0] = float("nan")
    with pytest.raises(Diverged, match=r"held-out domain now: the loss is nan; not finite: parameters head\.weight"):
        domain_generalization.on_unseen(net, domains["blend"], lambda images: images.float(), "now")


# --- planning and bad input -------------------------------------------------------------------------------------------


def why_not(name, **given):
    factory = norm(name)
    return TASK.why_not(factory, factory_info(factory), options(width=8, **given))


@pytest.mark.parametrize("name", norm_names(without=["context"]))
def test_norms_that_need_to_know_a_test_images_domain_are_skipped_with_the_reason(name):
    reason = why_not(name, norm_batch_size=None if norm_info(name).across_iterations else 8)
    expected = {
        "dsbn": "evaluation needs the domain of the images",
        "sabn": "evaluation needs the domain of the images",
        "dual_bn": "num_domains=3; it has two",
        "transnorm": "num_domains=3; it has two",
    }
    assert expected.keys() == set(NEEDS_KNOWN_DOMAIN)
    assert reason is None if name not in expected else reason.startswith(expected[name])


def test_norms_that_need_a_context_or_one_norm_batch_per_update_are_skipped_with_the_reason():
    for name in set(norm_names()) - set(norm_names(without=["context"])):
        assert why_not(name) == "needs context, which domain_generalization has not"
    for name in [n for n in norm_names() if norm_info(n).across_iterations]:
        reason = why_not(name, norm_batch_size=8)
        assert reason.startswith("takes statistics from earlier iterations")
        assert "each of the 2 norm batches" in reason


def test_all_domains_of_a_known_set_take_part_and_a_folders_are_named():
    spec = options()
    assert spec.domains == NAMES
    assert spec.sources == NAMES[:3]
    assert TASK.setting(spec).num_domains == 3
    assert DomainGeneralizationOptions(**spec.model_dump()) == spec
    assert options(domains=("mnist", "uci", "blend")).sources == ("mnist", "uci")
    with pytest.raises(
        ValidationError, match='domains: those of data set "folder:pacs" are not known before it is read'
    ):
        options(dataset="folder:pacs", held_out="photo")
    assert options(dataset="folder:pacs", domains=("art", "photo", "sketch"), held_out="photo").sources == (
        "art",
        "sketch",
    )


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"held_out": "blends"}, 'held_out "blends" is not among the domains.*did you mean "blend"'),
        ({"domains": ("mnist", "blend")}, r"1 source domain \(mnist\); two or more are needed"),
        ({"domains": ("blend",)}, "0 source domains; two or more"),
        ({"domains": ("mnist", "mnist", "blend")}, "names one twice"),
        ({"dataset": "digit"}, 'unknown data set "digit".*did you mean "digits"'),
        ({"dataset": "glyphs"}, 'data set "glyphs" has no domains'),
        ({"dataset": 5}, "valid string"),
        ({"dataset": None}, "valid string"),
        ({"norm_batch_size": 5}, "does not divide batch_size 16"),
    ],
)
def test_wrong_options_are_refused(given, words):
    with pytest.raises(ValidationError, match=words):
        options(**given)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"domains": ("mnist", "ucl", "blend")}, 'unknown domain "ucl".*did you mean "uci"'),
        ({"batch_size": 1200}, 'batch_size 1200 exceeds the .* training images of domain "uci"'),
        ({"dataset": "mnist_usps_svhn", "held_out": "svhn"}, "data prepare mnist_usps_svhn"),
    ],
)
def test_data_that_can_not_serve_is_named_before_anything_runs(given, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        TASK.data_checksum(options(**given), tmp_path)


def test_a_set_without_domains_says_so_once_they_are_named(tmp_path):
    spec = options(dataset="glyphs", domains=("a", "b", "c"), held_out="a")
    with pytest.raises(ValueError, match="has no domains"):
        TASK.data_checksum(spec, tmp_path)


def test_the_situation_of_a_network_is_empty_after_a_run(domains, tmp_path, monkeypatch):
    _, net = run("bne", options(epochs=1), tmp_path, monkeypatch)
    assert net.stem.norm.situation.domain is None
    with situation(net, domain=2):
        assert net.stem.norm.situation.domain == 2
