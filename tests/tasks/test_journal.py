"""The journal, the loop and streams by themselves: what a state holds, and what goes on from it."""

import random

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from parts.resuming import reread
from torch import nn

from tasks.base import RunContext
from tasks.data.images import Split
from tasks.data.reading import by_class, stream
from tasks.data.stream import Drawn, Stream
from tasks.journal import Interrupted, Journal, NotPlain, Position, Unusable, plain
from tasks.loop import Loop, epoch_ends

pytestmark = pytest.mark.usefixtures("one_thread")


def context(journal=None, seed=0):
    return RunContext(torch.device("cpu"), seed, None, None, journal=journal or Journal())


class Kept(Journal):
    """Keeps what it would store, and leaves when asked `after` so many updates."""

    def __init__(self, state=None, after=None, **named):
        self.stored, self.after, self.saves_made = state, after, 0
        super().__init__(state, save=self.store, **named)

    def store(self, state, position):
        self.stored, self.saves_made = reread(plain(state)), self.saves_made + 1

    @property
    def due(self):
        self.leaving |= self.after is not None and self.steps_done >= self.after
        return self.leaving or super().due


def train(journal, ends=(4, 8, 10), seen=None, streams=1):
    """A small training with draws of every kind: by name, and from each global generator."""
    run = context(journal)
    net = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.3), nn.Linear(4, 2))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.fill_(0.1)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    draws = run.generator("draws")
    data = Split(torch.arange(24, dtype=torch.uint8).view(12, 2, 1, 1), torch.arange(12) % 2)
    sources = [stream(data, 3 + 2 * k, run.generator(f"order {k}")) for k in range(streams)]
    loop = Loop(run, "training", ends=ends, rates={optimizer: lambda p: 0.1 * (1 - p)}, keeps={"net": net})
    for epoch in loop.epochs():
        for step, (images, labels), *others in epoch.steps(*sources):
            noise = torch.rand(3, generator=draws) + random.random() + numpy.random.rand()
            if seen is not None:
                seen.append((step.number, labels.tolist(), images.flatten().tolist(), [o[1].tolist() for o in others]))
            with step:
                logits = net(noise.repeat(len(labels), 1))
                loss = nn.functional.cross_entropy(logits, labels)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            step.saw(len(labels), (logits.argmax(1) == labels).sum(), train_loss=loss.detach())
        epoch.row["drawn"] = float(torch.rand(1, generator=draws))
    return run.journal.rows, {k: v.clone() for k, v in net.state_dict().items()}


def timeless(rows):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


def seeded(call):
    torch.manual_seed(5), random.seed(5), numpy.random.seed(5)
    return call()


@pytest.mark.parametrize("streams", [1, 2])
@pytest.mark.parametrize("stops", [[1], [3], [4], [5, 6], [1, 2, 9], [8, 9]])
def test_a_training_that_is_stopped_sees_and_gives_what_an_uninterrupted_one_does(stops, streams):
    seen, again = [], []
    rows, weights = seeded(lambda: train(Journal(), seen=seen, streams=streams))
    state = None
    for after in [*stops, None]:
        journal = Kept(state, after)
        try:
            stopped, others = seeded(lambda: train(journal, seen=again, streams=streams))  # noqa: B023 - called here
        except Interrupted:
            state = journal.stored
    assert again == seen
    assert timeless(stopped) == timeless(rows)
    assert all(torch.equal(weights[k], others[k]) for k in weights)


def test_without_an_interruption_the_journal_changes_no_number():
    rows, weights = seeded(lambda: train(Journal()))
    kept = Kept(every=0.0)
    others, same = seeded(lambda: train(kept))
    assert kept.saves_made == 10, "before each of the ten updates"
    assert timeless(others) == timeless(rows)
    assert all(torch.equal(weights[k], same[k]) for k in weights)


def test_rows_hold_means_over_the_epoch_and_the_rate_of_its_last_step():
    rows, _ = seeded(lambda: train(Journal()))
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    assert [row["learning_rate"] for row in rows] == [0.1 * (1 - m / 10) for m in (3.5, 7.5, 9.5)]
    assert set(rows[0]) == {"epoch", "train_loss", "train_top1", "drawn", "learning_rate", "seconds"}


def test_a_state_of_other_epochs_or_of_other_parts_is_not_gone_on_from():
    journal = Kept(after=5)
    with pytest.raises(Interrupted):
        train(journal)
    with pytest.raises(Unusable, match="its epochs end after"):
        train(Journal(journal.stored), ends=(5, 10))
    state = reread(journal.stored)
    state["loops"]["training"]["keeps"]["net"]["0.weight"] = torch.zeros(2, 2)
    with pytest.raises(Unusable, match="size mismatch"):
        train(Journal(state))
    state["loops"]["training"]["keeps"] = {"other": {}}
    with pytest.raises(Unusable, match="it keeps"):
        train(Journal(state))


@pytest.mark.parametrize("state", [{}, {"rows": 3}, [], {"rows": [], "steps": 1, "loops": [], "results": {}}])
def test_what_is_no_state_is_refused_as_that(state):
    with pytest.raises(Unusable):
        Journal(state)


def test_parts_that_are_finished_are_not_measured_again():
    measured = []

    def run(journal, fails=None):
        def measure(item):
            measured.append(item)
            if item == fails:
                journal.leave()
            return {"item": item, "drawn": torch.rand(1), "list": [1.5, None, "x"]}

        return seeded(lambda: journal.each("parts", range(4), measure))

    whole = run(Journal())
    measured.clear()
    journal = Kept()
    with pytest.raises(Interrupted):
        run(journal, fails=2)
    assert run(Kept(journal.stored)) == whole
    assert measured == [0, 1, 2, 2, 3]


def test_a_finished_part_takes_its_loops_with_it():
    journal = Kept()
    journal.once("whole", lambda: train(journal)[0][-1]["train_loss"])
    assert not journal._state["loops"]
    assert journal._state["results"]["whole"]["found"] == [journal.rows[-1]["train_loss"]]
    other = Kept(reread(plain(journal._state)))
    assert other.once("whole", lambda: pytest.fail("measured again")) == journal.rows[-1]["train_loss"]
    assert other.rows == journal.rows


def test_told_to_leave_it_leaves_at_once_where_no_step_is_computed():
    journal = Kept()
    with pytest.raises(Interrupted):
        journal.leave()
    assert journal.stored is None, "there was nothing to save"
    journal = Kept()
    journal.once("first", lambda: 1)
    with pytest.raises(Interrupted):
        journal.once("second", journal.leave)
    assert list(journal.stored["results"]) == ["first"]


def test_an_exception_in_a_loop_does_not_leave_the_journal_busy():
    journal = Kept()

    def breaks():
        for epoch in Loop(context(journal), "inner", ends=[2], rates={}, keeps={}).epochs():
            for _ in epoch.steps():
                raise ArithmeticError

    def caught():
        with pytest.raises(ArithmeticError):
            breaks()

    journal.once("part", caught)
    with pytest.raises(Interrupted):
        journal.leave()


def test_one_name_is_one_part():
    journal = Journal()
    journal.once("a", lambda: 1)
    with pytest.raises(ValueError, match='"a" is the name of two parts'):
        journal.once("a", lambda: 1)


def test_a_stream_without_a_state_is_refused():
    loop = Loop(context(), "training", ends=[2], rates={}, keeps={})
    steps = next(loop.epochs()).steps(iter([1, 2]))
    with pytest.raises(TypeError, match="a stream has state_dict"):
        next(steps)


def test_what_can_not_be_stored_ends_the_checkpoints_and_not_the_run():
    class Odd:
        def state_dict(self):
            return {"it": object()}

    notes = []
    journal = Kept(every=0.0, note=notes.append)
    for epoch in Loop(context(journal), "training", ends=[2], rates={}, keeps={"odd": Odd()}).epochs():
        for step in epoch.steps():
            step[0].saw(1, 1)
    assert len(notes) == 1
    assert "builtins.object" in notes[0]
    assert not journal.saves_made
    assert len(journal.rows) == 1


def test_plain_copies_and_keeps_memory_formats():
    image = torch.rand(2, 3, 4, 4).to(memory_format=torch.channels_last)
    copy = plain({"a": (image, [image.double()]), 1: torch.float32})
    assert copy["a"][0].stride() == image.stride()
    assert copy["a"][0].data_ptr() != image.data_ptr()
    assert copy[1] is torch.float32
    with pytest.raises(NotPlain, match="numpy"):
        plain({"x": numpy.float64(1)})


def test_generators_go_with_the_state_as_long_as_they_live():
    journal = Journal()
    run = context(journal)
    kept = run.generator("kept")
    run.generator("gone")
    first, second = run.generator("twice"), run.generator("twice")
    torch.rand(3, generator=kept), torch.rand(5, generator=second)
    states = journal.surroundings()
    assert set(states["generators"]) == {"kept (cpu)", "twice (cpu)", "twice (cpu) #2"}
    del first  # whenever it goes, the second keeps its name
    assert set(journal.surroundings()["generators"]) == {"kept (cpu)", "twice (cpu) #2"}
    expected = [torch.rand(4, generator=g) for g in (kept, second)] + [torch.rand(2)]
    journal.surround(reread(plain(states)))
    again = [torch.rand(4, generator=g) for g in (kept, second)] + [torch.rand(2)]
    assert all(torch.equal(a, b) for a, b in zip(expected, again, strict=True))


@pytest.mark.parametrize(
    ("position", "text"),
    [
        (Position("training", 11, 90), "epoch 12 of 90"),
        (Position("training", 90, 90), "after training"),
        (Position("training", 200, 2000, unit="step"), "step 200 of 2000"),
        (Position("search", 0, 50), "search, epoch 1 of 50"),
        (Position("test episodes", 3, 600, unit="part"), "test episodes, part 4 of 600"),
        (Position("attack pgd 0"), "attack pgd 0"),
    ],
)
def test_positions_in_words(position, text):
    assert str(position) == text


@given(st.integers(1, 6), st.integers(1, 9), st.none() | st.integers(1, 40))
def test_epochs_end_where_whole_epochs_or_the_limit_end(epochs, per_epoch, most):
    ends = epoch_ends(epochs, per_epoch, most)
    assert ends[-1] == min(most or 10**9, epochs * per_epoch)
    assert all(b - a == per_epoch for a, b in zip([0, *ends], ends[:-1], strict=False))
    assert 0 < ends[-1] - (ends[-2] if len(ends) > 1 else 0) <= per_epoch


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 30), st.integers(1, 7), st.integers(0, 40), st.booleans())
def test_a_stream_goes_on_where_another_was(images, batch, taken, grouped):
    part = Split(torch.arange(images, dtype=torch.uint8).view(-1, 1, 1, 1), torch.arange(images) % 2)

    def made():
        order = torch.Generator().manual_seed(3)
        return by_class(part, 2 * batch, 2, order) if grouped else stream(part, batch, order)

    if images < batch or (grouped and not len(made())):
        return
    one, other = made(), made()
    for _ in range(taken):
        next(one)
    before = torch.get_rng_state()
    other.load_state_dict(reread(plain(one.state_dict())))
    for _ in range(2 * len(one) + 1):
        a, b = next(one), next(other)
        assert torch.equal(a[0], b[0])
        assert torch.equal(a[1], b[1])
    assert torch.equal(torch.get_rng_state(), before)


def test_a_pass_holds_every_image_once_and_the_next_one_another_order():
    part = Split(torch.arange(12, dtype=torch.uint8).view(-1, 1, 1, 1), torch.arange(12))
    endless = stream(part, 4, torch.Generator().manual_seed(0))
    passes = [torch.cat([next(endless)[1] for _ in range(3)]) for _ in range(2)]
    assert all(p.sort().values.tolist() == list(range(12)) for p in passes)
    assert not torch.equal(*passes)


def test_a_stream_of_fewer_batches_refuses_the_state_of_a_longer_one():
    order = torch.Generator()
    with pytest.raises(ValueError, match="7 batches of a pass were taken; here it has 3"):
        Stream(lambda skip: iter(range(skip, 3)), order, 3).load_state_dict({"order": order.get_state(), "taken": 7})


def test_what_is_drawn_anew_has_no_state_of_its_own():
    generator = torch.Generator().manual_seed(1)
    drawn = Drawn(lambda: float(torch.rand(1, generator=generator)))
    state, generators = drawn.state_dict(), generator.get_state()
    first = next(drawn)
    generator.set_state(generators)
    drawn.load_state_dict(state)
    assert next(drawn) == first


def test_a_step_sees_a_loss_as_update_leaves_it_with_its_graph():
    loss = torch.ones((), requires_grad=True) * 2
    loop = Loop(context(), "training", ends=[1], rates={}, keeps={})
    for epoch in loop.epochs():
        for (step,) in epoch.steps():
            step.saw(3, 1, train_loss=loss)
    assert epoch.row["train_loss"] == 2.0
