"""Workers of one run give the numbers of one process: outputs, gradients and running statistics.

Every case is trained by W processes, all cases of one W by the same ones, and then by this process alone; the numbers
are compared in float64.
"""

import numpy as np
import pytest
import torch
from parts import norms_together
from parts.norms_together import Case, mismatches, trained, users_norms
from parts.worker_processes import SECONDS, together
from torch import nn

from norms.registry import make_norm, norm_info, norm_names, register
from norms.running import recalibrate
from norms.situation import situation
from norms.workers import ALONE, Workers, refusal
from tasks.admission import Host
from tasks.admission import refusal as admitted
from tasks.nets.models import build_net

OPTIONS = {
    "bgn": {"num_groups": 2},
    "bcn": {"num_groups": 2},
    "gn": {"num_groups": 2},
    "ghost": {"ghost_batch_size": 3},
    "brn": {"momentum": 0.6},  # so that its limits open within the steps
}
NORMS = ("bn", "bgn", "ghost", "ebn", "iebn", "sn", "brn", "bcn", "evonorm_b0", "ws_bn", "sabn")
PER_DOMAIN = ("dsbn", "dual_bn", "bne", "transnorm")
ONE_BY_ONE = ("gn", "ln", "none")
REFUSED = {"mbn", "cbn", "mabn", "online", "tasknorm"}


def of(name, **facts):
    momentum = facts.pop("momentum", "as it is")
    options = OPTIONS.get(name, {}) | facts.pop("options", {})
    return Case(name, options if momentum == "as it is" else options | {"momentum": momentum}, **facts)


def cases(size):
    """For two workers most things, for four what differs with their number."""
    found = []
    if size == 4:
        for name in ("bn", "bgn", "ghost", "ebn", "iebn", "sn", "brn", "dsbn"):
            found += [of(name, batches=(16, 16)), of(name, sync=True, batches=(9, 2))]
        return [*found, of("brn", momentum=None, slices=2, batches=(16, 16)), of("gn", sync=True, batches=(6,))]
    for name in (*NORMS, *PER_DOMAIN, "mine", "heir"):
        found += [of(name, batches=(16, 16)), of(name, sync=True, batches=(7, 1), affine=name != "bn")]
    for name, momentum in {"bn": 0.6, "bgn": None, "brn": None, "ghost": 0.6, "dsbn": 0.6, "mine_too": 0.6}.items():
        found.append(of(name, momentum=momentum, slices=2, batches=(16, 16), affine=False))
    found += [of(name, batches=(6,), sync=True) for name in ONE_BY_ONE]
    found.append(of("bgn", sync=True, batches=(7, 3), options={"num_groups": 12}, last=True))
    return found


def wide(size):
    """Every norm by every way of training."""
    found = []
    for name in (*NORMS, *PER_DOMAIN, "mine", "heir", "mine_too"):
        for momentum in (0.1, 0.6, None):
            for affine in (True, False):
                for slices in (1, 2):
                    found.append(of(name, momentum=momentum, affine=affine, slices=slices))
                if name != "mine_too":
                    for batches in ((16, 16, 16), (7, 5, 3), (7, 2, 1)):
                        found.append(of(name, momentum=momentum, affine=affine, sync=True, batches=batches))
        layouts = [{"last": True}, {"mixed": False}]
        found += [of(name, **facts) for facts in layouts]
        found += [of(name, sync=True, batches=(9, 7, 5), **facts) for facts in layouts if name != "mine_too"]
        if name not in ("sn", "mine_too", "bcn"):
            found.append(of(name, sync=True, side=1, batches=(16, 9, 11)))
    return found


def checked(size, some, seconds=SECONDS):
    """Trained by `size` workers; and a function that says what differs in a case."""
    found = together(size, norms_together.of_rank, size, some, seconds=seconds)
    return found, {str(case): [each["cases"][i] for each in found] for i, case in enumerate(some)}


@pytest.fixture(scope="module")
def two():
    return checked(2, cases(2))


@pytest.fixture(scope="module")
def four():
    return checked(4, cases(4))


def differing(size, case, found):
    users_norms()
    return mismatches(case, found[str(case)], trained(case, slices=1 if case.sync else size * case.slices))


@pytest.mark.parametrize("case", cases(2), ids=str)
def test_two_workers_equal_one_process(two, case):
    assert differing(2, case, two[1]) == []


@pytest.mark.parametrize("case", cases(4), ids=str)
def test_four_workers_equal_one_process(four, case):
    assert differing(4, case, four[1]) == []


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3, 4])
def test_every_norm_every_way(size):
    some = [case for case in wide(size) if case.sync or case.batches[0] % (size * case.slices) == 0]
    found = checked(size, some, seconds=600)[1]
    assert [line for case in some for line in differing(size, case, found)] == []


def test_every_norm_that_mixes_samples_is_tried_or_refused():
    mixing = {name for name in norm_names() if norm_info(name).mixes_samples}
    assert mixing == {*NORMS, *PER_DOMAIN, *REFUSED}


@pytest.mark.parametrize("name", norms_together.IN_TURN)
@pytest.mark.parametrize("size", [2, 4])
def test_shorter_and_empty_parts_move_statistics_in_the_order_of_workers(two, four, size, name):
    one = norms_together.in_turn(name, ALONE, size)
    for each in (two if size == 2 else four)[0]:
        for own, other in zip(each["in_turn"][name], one, strict=True):
            np.testing.assert_allclose(own, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", norms_together.FAR)
def test_moments_of_values_far_from_zero_are_merged_without_loss(two, name):
    exact = norms_together.far_from_zero(name, ALONE, torch.float64)
    near = np.abs(exact).max()
    for rank, each in enumerate(two[0]):
        assert np.abs(each["far_from_zero"][name] - exact[rank::2]).max() < 1e-3 * near


def test_second_derivatives_go_through_merged_moments(two):
    x, weight = norms_together.twice_differentiated(ALONE)
    for rank, each in enumerate(two[0]):
        own_x, own_weight = each["twice_differentiated"]
        np.testing.assert_allclose(own_x, x[rank::2], rtol=1e-10, atol=1e-10)
        np.testing.assert_allclose(own_weight, weight, rtol=1e-10, atol=1e-10)


def test_one_value_of_all_workers_is_too_few(two):
    for each in two[0]:
        assert set(each["too_few"]) == {"bn", "ghost", "ebn", "iebn", "brn", "sabn"}
        assert all("more than 1 value per" in text and "2 workers" in text for text in each["too_few"].values())


@pytest.mark.slow
def test_a_compiled_network_speaks_to_the_others_and_vmap_is_refused():
    (mean, said), (other, _) = together(2, norms_together.compiled, 2)
    torch.manual_seed(0)
    x = torch.randn(8, norms_together.CHANNELS, 2, 2)
    assert "speaks to other workers" in said
    np.testing.assert_array_equal(mean, other)
    # momentum 1: the last norm batch's, which is worker 1's
    np.testing.assert_allclose(mean, x[1::2].mean((0, 2, 3)).numpy(), atol=1e-6)


# --- refusals ---------------------------------------------------------------------------------------------------------

PAIR = Workers(0, 2)
SYNCED = Workers(0, 2, sync=True)


@pytest.mark.parametrize("name", sorted(REFUSED))
@pytest.mark.parametrize("workers", [PAIR, SYNCED])
def test_histories_and_contexts_are_refused_in_one_line(name, workers):
    norm = make_norm(name)(4)
    why = refusal(norm, workers)
    assert why.startswith(f'norm "{name}"')
    assert "one worker" in why
    assert "\n" not in why
    with pytest.raises(ValueError, match=f'norm "{name}"'), situation(nn.Sequential(norm), workers=workers):
        pass
    assert refusal(norm, ALONE) is None


@pytest.mark.parametrize("name", ["none", "in", "ln", "gn", "pn", "rms", "ws_gn"])
def test_norms_that_mix_no_samples_are_never_refused_nor_touched(name):
    norm = make_norm(name)(32)
    assert refusal(norm, SYNCED) is None
    with situation(norm, workers=SYNCED):
        assert "forward" not in norm.__dict__


def a_layer(**facts):
    """A decorator for a user's layer that mixes samples."""
    return register(name="elsewhere", source="test", mixes_samples=True, **facts)


def test_a_layer_that_keeps_statistics_of_its_own_is_told_what_to_inherit():
    @a_layer(keeps_stats=True)
    class Elsewhere(nn.BatchNorm2d):
        def __init__(self, num_channels, *, affine: bool = True):
            super().__init__(num_channels, affine=affine)

    why = refusal(make_norm("elsewhere")(4), PAIR)
    assert "norms.running.RunningStatistics" in why


def test_a_part_with_statistics_of_its_own_is_refused_by_its_name():
    users_norms()

    @a_layer(keeps_stats=True)
    class Holding(type(make_norm("heir")(4))):
        def __init__(self, num_channels, *, affine: bool = True):
            super().__init__(num_channels, affine=affine)
            self.inner = nn.BatchNorm2d(num_channels)

    assert '"inner"' in refusal(make_norm("elsewhere")(4), PAIR)


@pytest.mark.parametrize("workers", [ALONE, PAIR])
def test_a_further_buffer_that_moves_in_training_is_refused_in_the_plan(workers):
    users_norms()

    @a_layer(keeps_stats=True)
    class Further(type(make_norm("heir")(4))):
        def __init__(self, num_channels, *, affine: bool = True):
            super().__init__(num_channels, affine=affine)
            self.register_buffer("still", torch.ones(num_channels))
            self.register_buffer("ema", torch.zeros(num_channels))

        def forward(self, x):
            if self.training and self.still is not None:
                self.ema.lerp_(x.detach().mean((0, 2, 3)), 0.1)
            return super().forward(x)

    norm = make_norm("elsewhere")
    network = {"model": "resnet8", "num_classes": 2, "in_channels": 3, "width": 4}
    host = Host("classification", build_net, network, (3, 8, 8), 2, 1, workers=workers)
    why = admitted(norm, norm.info, host)
    assert (why is None) == workers.alone
    assert why is None or 'changes its buffer "ema" in training' in why
    layer = norm(4)
    layer.take_in = lambda *given: None
    with pytest.raises(ValueError, match='"ema"'), situation(layer, workers=PAIR):
        layer(torch.randn(4, 4, 2, 2))


def test_a_layer_without_statistics_needs_its_word_for_sync_alone():
    @a_layer(keeps_stats=False)
    class Stateless(nn.Module):
        def __init__(self, num_channels, *, affine: bool = True):
            super().__init__()

        def forward(self, x):
            return x - x.mean(0)

    norm = make_norm("elsewhere")(4)
    assert refusal(norm, PAIR) is None
    assert "syncs = True" in refusal(norm, SYNCED)


def test_a_forward_written_anew_does_not_inherit_the_word():
    users_norms()
    assert refusal(make_norm("heir")(4), SYNCED) is None
    assert refusal(make_norm("mine")(4), SYNCED) is None
    assert "syncs = True" in refusal(make_norm("mine_too")(4), SYNCED)

    @a_layer(keeps_stats=True)
    class Anew(type(make_norm("heir")(4))):
        def forward(self, x):
            return super().forward(x - x.mean(0))

    assert refusal(make_norm("elsewhere")(4), PAIR) is None
    assert "syncs = True" in refusal(make_norm("elsewhere")(4), SYNCED)


def test_synchronized_norms_have_one_norm_batch():
    with pytest.raises(ValueError, match="slices=2"), situation(make_norm("bn")(4), slices=2, workers=SYNCED):
        pass


def test_recalibration_takes_no_workers():
    norm = make_norm("bn")(4)
    batches = [torch.randn(4, 4, 2, 2, generator=torch.Generator().manual_seed(k)) for k in range(2)]

    def forward(x):
        with situation(norm, workers=PAIR):
            norm(x)

    with pytest.raises(ValueError, match="recalibrate is called on every worker alike"):
        recalibrate(norm, batches, forward=forward)
    with situation(norm, workers=PAIR):  # each by itself, whatever the others do
        recalibrate(norm, batches)
    torch.testing.assert_close(norm.running_mean, torch.cat(batches).mean((0, 2, 3)))


def test_evaluation_asks_nobody():
    norm = make_norm("bn")(4).eval()
    x = torch.randn(4, 4, 2, 2)
    with situation(norm, workers=SYNCED):  # there is no other process
        assert torch.equal(norm(x), make_norm("bn")(4).eval()(x))
