"""Several workers of one run: W processes give the numbers of one process, on shares of batches that all draw alike.

What is fast is one pair of processes, started once; other numbers of workers, and whole runs of every task, are slow.
"""

import random

import numpy as np
import pytest
import torch
from parts.worker_processes import together
from parts.worker_runs import RUNS, SIZE, all_made, all_trained, made, patched, steps_and_the_rest, trained

from norms.registry import make_norm
from norms.workers import ALONE, Workers
from results.frame import from_records
from results.record import RunRecord, RunSpec
from results.tables.build import render_all
from suite.planning import plan, plan_config
from tasks import get_task
from tasks.adversarial.trades import normal_start
from tasks.base import RunContext
from tasks.data.batches import AUGMENTATIONS, Share, augment
from tasks.data.images import Split
from tasks.data.reading import by_class, in_order, stream
from tasks.domain_adaptation.losses import certainty_weights, domain_loss
from tasks.loop import Loop
from tasks.supervised import SupervisedOptions
from tasks.workers import seed_apart

pytestmark = pytest.mark.usefixtures("one_thread")
NORMS = ("bn", "bgn", "ghost", "ebn", "iebn", "sn", "brn", "gn", "ln", "none")
SYNCED = ("bn", "bgn", "gn", "none")
TASKS = tuple(RUNS)
FAST_STEPS = [*((norm, 2, False, SIZE) for norm in ("bn", "bgn", "brn", "gn")), ("bn", 1, True, SIZE)]


@pytest.fixture(scope="module")
def two():
    return together(2, steps_and_the_rest, 2, FAST_STEPS)


# Steps


def check_steps(found, size, case):
    """What W workers gave, against one process with W times the norm batches, or one where they sync."""
    norm, slices, sync, images = case
    one = trained(norm, ALONE, 1 if sync else slices * size, images)
    assert one.keys() == found[0].keys()
    for rank, other in enumerate(found):
        for key, value in one.items():
            if key.startswith("outputs"):
                value = value[rank::size]
            tolerance = 1e-10 if key.startswith("gradient") else 1e-12
            np.testing.assert_allclose(other[key], value, rtol=tolerance, atol=tolerance, err_msg=f"{case} {key}")
            if not key.startswith("outputs"):
                assert np.array_equal(other[key], found[0][key]), f"{case} {key}: worker {rank} has its own"


@pytest.mark.parametrize(
    "number", range(len(FAST_STEPS)), ids=[f"{n} {'sync' if s else ''}" for n, _, s, _ in FAST_STEPS]
)
def test_two_workers_take_the_steps_of_one_process(number, two):
    check_steps([each[0][number] for each in two], 2, FAST_STEPS[number])


@pytest.fixture(scope="module")
def four():
    return together(4, all_trained, 4, SLOW_STEPS)


SLOW_STEPS = [
    *((norm, slices, False, SIZE) for norm in NORMS for slices in (1, 2)),
    *((norm, 1, True, images) for norm in SYNCED for images in (SIZE, 7, 3)),
]


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(SLOW_STEPS)), ids=[f"{c[0]} {c[1:]}" for c in SLOW_STEPS])
def test_four_workers_take_them_too_with_uneven_and_empty_parts_where_they_sync(number, four):
    check_steps([each[number] for each in four], 4, SLOW_STEPS[number])


# What they do together beside forwards


def test_gradients_are_summed_and_what_nobody_has_stays_none(two):
    for _, found in two:
        ones, lonely, nobody, single = found["gradients"]
        assert ones == [3.0] * 6
        assert lonely == list(range(6))
        assert nobody is None
        assert single == [2.0, 2.0]


def test_rows_come_back_in_the_order_of_images_also_where_one_worker_has_none(two):
    rows = torch.arange(30.0).view(10, 3).tolist()
    for _, found in two:
        assert found["rows"] == found["no rows"] == rows


def test_evaluation_is_the_sum_over_batches_of_all(two):
    for _, found in two:
        whole, split = found["evaluation"]
        assert split[0] == whole[0]
        assert split[1] == pytest.approx(whole[1], rel=1e-14)
        assert split[2] == whole[2]
        assert found["constant"] == [True, True]
        assert found["apart"] is False


def test_all_diverge_together_with_the_words_of_one_process(two):
    for _, found in two:
        for one, other in (found["diverged"], found["step"]):
            assert one == other
    assert "not finite: inputs images; outputs stem" in two[0][1]["step"][0]


def test_a_worker_without_a_sample_counts_nothing_and_still_takes_the_step(two):
    loss, gradient = two[0][1]["loss of nothing"]
    assert two[1][1]["loss of nothing"] == [loss, gradient]
    assert loss == pytest.approx(np.log(3))
    assert np.isfinite(gradient).all()
    assert any(gradient)


# Runs


def check_run(found, task, norm, options):
    """A run with workers, of each of them, against one process with norm batches of the same size."""
    with pytest.MonkeyPatch.context() as patch:
        patched(patch)
        part = RUNS[task]["batch_size"] // len(found)
        given = {k: v for k, v in options.items() if k != "sync_norms"}
        if not options.get("sync_norms") and "norm_batch_size" not in given:
            given["norm_batch_size"] = part
        one = made(task, norm, given)
    for other in found:
        assert other["history"] == found[0]["history"], "rows are alike on all workers"
        assert other["metrics"] == found[0]["metrics"]
        assert all(np.array_equal(v, found[0]["weights"][k]) for k, v in other["weights"].items())
    first = found[0]
    assert first["metrics"].keys() == one["metrics"].keys()
    for name, value in one["metrics"].items():
        assert first["metrics"][name] == pytest.approx(value, rel=0.02, abs=0.02), name
    assert len(first["history"]) == len(one["history"])
    for row, like in zip(first["history"], one["history"], strict=True):
        assert row == pytest.approx(like, rel=0.02, abs=0.04)
        assert row["train_loss"] == pytest.approx(like["train_loss"], rel=1e-3)
    for name in ("data", "selection", "equals", "constant_output", "test_images", "train_images"):
        assert first["evidence"].get(name) == one["evidence"].get(name)


SLOW_RUNS = [
    ("classification", "bn", {}, ()),
    ("classification", "bn", {"norm_batch_size": 4}, ()),
    ("classification", "bgn", {"single_class_groups": 4}, ()),
    ("classification", "bn", {"sync_norms": True, "final_pass": "class_sorted"}, ()),
    *(("adversarial", "bn", {"method": m, "crafting_mode": c}, ()) for m in ("pgd", "trades")
      for c in ("eval", "train")),
    ("adversarial", "gn", {"method": "fgsm_rs", "steps": None}, ()),
    ("adversarial", "bn", {"method": "trades", "crafting_mode": "train", "sync_norms": True}, ()),
    ("domain_adaptation", "bn", {"method": "source_only"}, ()),
    *(("domain_adaptation", "bn", {"method": m, "forward": f}, ())
      for m in ("dann", "cdan_e", "mcd") for f in ("joint", "separate")),
    ("domain_adaptation", "bn", {"method": "cdan_e", "sync_norms": True}, ()),
    ("domain_generalization", "bn", {}, ()),
    ("domain_generalization", "bn", {"sync_norms": True}, ()),
    # an odd number of each domain, so that a sample's place depends on its domain, too
    ("domain_generalization", "ghost", {"sync_norms": True, "batch_size": 17}, ()),
    ("domain_adaptation", "ghost", {"method": "dann", "forward": "joint", "sync_norms": True, "batch_size": 17}, ()),
]  # fmt: skip
STOPS = {
    "classification": [("step", 3), ("step", 9)],
    "adversarial": [("step", 3), ("part", "attack clean", 1), ("part", "attack pgd 1", 1)],
    "domain_adaptation": [("step", 3), ("step", 8)],
    "domain_generalization": [("step", 2)],
}
RESUMED = [(task, "bn", {}, stops) for task, stops in STOPS.items()]
UNSTOPPED = [(task, norm, options, ()) for task, norm, options, _ in RESUMED]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("runs"))
    return together(2, all_made, 2, [*SLOW_RUNS, *RESUMED, *UNSTOPPED], folder)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(SLOW_RUNS)), ids=[f"{c[0]} {c[1]} {c[2]}" for c in SLOW_RUNS])
def test_runs_of_every_task_and_method_give_the_numbers_of_one_process(number, runs):
    check_run([each[number] for each in runs], *SLOW_RUNS[number][:3])


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(RESUMED)), ids=list(STOPS))
def test_runs_of_every_task_go_on_between_steps_and_in_evaluation(number, runs):
    for each in runs:
        stopped, whole = each[len(SLOW_RUNS) + number], each[len(SLOW_RUNS) + len(RESUMED) + number]
        assert stopped["metrics"] == whole["metrics"]
        assert stopped["history"] == whole["history"]
        assert stopped["evidence"] == whole["evidence"]
        assert all(np.array_equal(v, whole["weights"][k]) for k, v in stopped["weights"].items())


@pytest.mark.slow
def test_the_evidence_says_the_design(runs):
    designs = {
        case[0]: each["evidence"]["design"] for case, each in zip(SLOW_RUNS, runs[0], strict=False) if not case[2]
    }
    assert designs["classification"] == designs["domain_generalization"] == "norm batch 8 on each of 2 workers"
    synced = [
        each["evidence"]["design"] for case, each in zip(SLOW_RUNS, runs[0], strict=False) if "sync_norms" in case[2]
    ]
    assert set(synced) == {"statistics of all 2 workers"}


# Shares of what all draw alike


@pytest.mark.parametrize("kind", AUGMENTATIONS)
@pytest.mark.parametrize("count", [8, 7, 2])
def test_each_worker_augments_its_part_as_one_process_does(kind, count):
    images = torch.randint(256, (count, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    draws = torch.Generator().manual_seed(0)
    whole, state = augment(images, draws, kind), draws.get_state()
    for rank in range(3):
        workers, draws = Workers(rank, 3), torch.Generator().manual_seed(0)
        own = augment(workers.share(images), draws, kind, Share(count, workers))
        assert torch.equal(own, workers.share(whole))
        assert torch.equal(draws.get_state(), state), "all go on drawing alike"


def test_a_batch_of_domains_is_dealt_out_domain_by_domain():
    batch = torch.arange(10)  # [a; b], five of each
    parts = [Share(10, Workers(rank, 2), groups=2).of(batch).tolist() for rank in range(2)]
    assert parts == [[0, 2, 4, 5, 7, 9], [1, 3, 6, 8]]


@pytest.mark.parametrize(("count", "size", "blocks"), [(10, 4, 1), (20, 4, 2), (9, 2, 3), (3, 4, 3)])
def test_workers_know_the_places_of_their_samples(count, size, blocks):
    for rank in range(size):
        workers = Workers(rank, size, blocks=blocks)
        own = Share(count, workers, groups=blocks).of(torch.arange(count))
        assert workers.places(len(own), count, own.device).tolist() == own.tolist()


def test_starts_are_drawn_for_the_whole_batch():
    images = torch.zeros(6, 1, 2, 2)
    whole = normal_start(images, torch.Generator().manual_seed(0))
    workers = Workers(1, 3)
    part = normal_start(workers.share(images), torch.Generator().manual_seed(0), Share(6, workers))
    assert torch.equal(part, workers.share(whole))


@pytest.mark.parametrize(
    "make", [stream, lambda *a, **k: by_class(a[0], a[1], 2, *a[2:], **k)], ids=["stream", "by_class"]
)
def test_streams_give_the_workers_the_parts_of_one_batch(make):
    part = Split(torch.arange(48).view(24, 2, 1, 1).to(torch.uint8), torch.arange(24) % 2)
    whole = make(part, 6, torch.Generator().manual_seed(0))
    shares = [make(part, 6, torch.Generator().manual_seed(0), to=Workers(rank, 2)) for rank in range(2)]
    for _ in range(2 * len(whole) + 1):
        images, labels = next(whole)
        for rank, own in enumerate(shares):
            x, y = next(own)
            assert torch.equal(x, images[rank::2])
            assert torch.equal(y, labels[rank::2])


def test_evaluation_batches_are_dealt_out_whole():
    part = Split(torch.arange(11).view(11, 1, 1, 1).to(torch.uint8), torch.arange(11))
    whole = [labels.tolist() for _, labels in in_order(part, 3)]
    assert [[y.tolist() for _, y in in_order(part, 3, Workers(r, 3))] for r in range(3)] == [
        whole[r::3] for r in range(3)
    ]


def test_the_weighted_domain_loss_is_that_of_the_whole_batch(monkeypatch):
    logits, judged = torch.randn(12, 3).double(), torch.randn(12).double()
    weights = certainty_weights(logits, 1.0)
    whole = domain_loss(judged, 6, weights)
    shares = [torch.cat([torch.arange(rank, 6, 4), torch.arange(6 + rank, 12, 4)]) for rank in range(4)]
    sums = torch.stack([
        torch.stack([weights[s[: len(s) // 2]].sum(), weights[s[len(s) // 2 :]].sum(), torch.tensor(len(s)).double()])
        for s in shares
    ]).sum(0)  # fmt: skip
    monkeypatch.setattr(Workers, "total", lambda self, x: sums)
    parts = [domain_loss(judged[s], len(s) // 2, weights[s], Workers(rank, 4)) for rank, s in enumerate(shares)]
    mean = sum(part * len(s) / 12 for part, s in zip(parts, shares, strict=True))
    torch.testing.assert_close(mean, whole, rtol=1e-12, atol=0)


# Draws of their own


def loop_draws(workers, steps, state=None):
    run = RunContext(torch.device("cpu"), 5, None, None, workers=workers)
    seen = []
    torch.manual_seed(1)
    loop = Loop(run, "training", ends=[steps], rates={}, keeps={})
    monkey = Split(torch.zeros(8, 1, 1, 1), torch.zeros(8).long())
    for epoch in loop.epochs():
        if state is not None:
            loop.step = state
        for step, _ in epoch.steps(stream(monkey, 4, run.generator("order"))):
            seen.append((step.number, torch.rand(1).item(), random.random(), np.random.rand()))
            epoch.seen += 1
    return seen


def test_workers_draw_apart_and_the_first_as_a_process_alone():
    alone, first, second, third = (loop_draws(w, 3) for w in (ALONE, *(Workers(rank, 3) for rank in range(3))))
    assert [draws[1] for draws in alone] == [draws[1] for draws in first]
    drawn = [draws[1] for each in (first, second, third) for draws in each]
    assert len(set(drawn)) == len(drawn)
    assert loop_draws(Workers(1, 3), 3, state=2) == second[2:], "what a step draws depends on no step before"


def test_the_first_worker_is_never_seeded_anew():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    seed_apart(Workers(0, 2), 0, "training", 1)
    assert torch.equal(torch.get_rng_state(), before)


# Options, plans, tables


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"workers": 3, "batch_size": 64}, "workers 3 do not divide batch_size 64.*allowed: 1, 2, 4"),
        ({"workers": 4, "batch_size": 64, "norm_batch_size": 32}, "32 does not divide batch_size / workers = 16"),
        ({"workers": 2, "norm_batch_size": 32, "sync_norms": True}, "norm_batch_size 32 with sync_norms"),
        ({"workers": 2, "compile": True}, "compile: true with workers: 2"),
        ({"workers": 0}, "greater than or equal to 1"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_said(given, match):
    with pytest.raises(ValueError, match=match):
        SupervisedOptions(**given)


@pytest.mark.parametrize(
    ("given", "norm_batch", "slices"),
    [
        ({"workers": 4}, 32, 1),
        ({"workers": 4, "norm_batch_size": 8}, 8, 4),
        ({"workers": 3, "sync_norms": True}, 128, 1),
        ({"workers": 4, "sync_norms": True, "norm_batch_size": 128}, 128, 1),
        ({"norm_batch_size": 32}, 32, 4),
    ],
)
def test_norm_batches_of_a_worker(given, norm_batch, slices):
    options = SupervisedOptions(**given)
    assert (options.norm_batch, options.slices) == (norm_batch, slices)


def test_sync_of_one_worker_is_no_further_run():
    assert SupervisedOptions(sync_norms=True) == SupervisedOptions()


@pytest.mark.parametrize("task", TASKS)
def test_a_norm_with_a_history_is_left_out_with_the_reason(task):
    value = get_task(task)
    options = value.options(workers=2)
    history, groups = make_norm("cbn"), make_norm("gn", num_groups=4)
    assert "history of iterations" in value.why_not(history, history.info, options)
    assert value.why_not(history, history.info, value.options()) is None
    assert value.why_not(groups, groups.info, options) is None


def test_norm_batches_in_keys_are_those_of_a_worker():
    tasks = {"classification": {"workers": [1, 2], "batch_size": 64}}
    specs = plan_config({"norms": ["bn", "gn"], "seeds": [0], "tasks": tasks}, tried=False).runs
    found = {(s.norm, s.task_options["workers"]): s.task_options["norm_batch_size"] for s in specs}
    assert found == {("bn", 1): 64, ("bn", 2): 32, ("gn", 1): None, ("gn", 2): None}
    assert len({s.key for s in specs}) == 4


def test_runs_of_unequal_parts_can_be_made_as_they_are_planned():
    tasks = {"classification": {"workers": 4, "batch_size": 10, "sync_norms": True}}
    specs = plan_config({"norms": ["bn", "gn"], "seeds": [0], "tasks": tasks}, tried=False).runs
    made = [get_task(s.task).options.model_validate(s.task_options) for s in specs]
    assert [(each.sync_norms, each.norm_batch_size) for each in made] == [(True, 10), (True, None)]


def test_the_papers_setting_of_imagenet_is_planned():
    planned = plan("configs/imagenet_resnet50_batch.yaml", without_data=True, tried=False).runs
    apart = [s.task_options for s in planned if s.task_options["workers"] == 8 and s.norm == "bn" and not s.seed]
    assert [(o["batch_size"], o["norm_batch_size"]) for o in apart] == [(8 * n, n) for n in (2, 4, 8, 16, 32, 64, 128)]


def record(seed, **options):
    spec = RunSpec(
        task="classification", norm="bn", norm_options={}, task_options={"batch_size": 64, **options}, seed=seed,
        norm_version="1", task_version="1", data_checksum="", newer={"workers": 1, "sync_norms": False},
    )  # fmt: skip
    return RunRecord(spec=spec, status="ok", metrics={"top1": 0.5})


def test_the_caption_says_whose_statistics_they_are():
    def caption(*options):
        tables = render_all(from_records([record(0, **given) for given in options]))
        return next(t for t in tables if t.name == "classification")

    plain = {"workers": 1, "sync_norms": False, "norm_batch_size": 64}
    apart = {"workers": 2, "sync_norms": False, "norm_batch_size": 32}
    synced = {"workers": 4, "sync_norms": True, "norm_batch_size": 64}
    assert not [line for line in caption(plain).caption if line.startswith("Workers")]
    assert "Workers: norm batch 32 on each of 2 workers." in caption(plain, apart).caption
    both = caption(apart, synced)
    assert "Workers: norm batch 32 on each of 2 workers; statistics of all 4 workers." in both.caption
    assert {dict(row.setting)["workers"] for row in both.rows} == {"2", "4"}
