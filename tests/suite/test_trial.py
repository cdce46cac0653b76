"""suite.trial: whatever a layer does while planning tries it, it stays in a process of its own, and is said."""

import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

import tasks
from norms.registry import make_norm, register
from suite import forked, trial
from suite.planning import Overrides, plan_config
from suite.trial import Trials, surroundings_kept, survives, trial_seconds
from tasks.admission import FEW_PARAMETERS, Host, refusal
from tasks.base import Setting
from tasks.options import Options

SHORT = 1.5  # seconds; a norm that does come back has to within them, on a busy machine, too


class TriedTask:
    """Its networks are one layer, forwarded on zeros."""

    name, version, options, metrics = "tried", 1, Options, ("top1",)

    def setting(self, options):
        return Setting()

    def data_checksum(self, options, data_dir):
        return "none"

    def why_not(self, norm, info, options):
        if info.name == "pn":
            return "needs more channels"
        if torch.get_default_dtype() != torch.float32 or "TRIED" in os.environ:
            return "an earlier norm has changed this process"
        norm(4)(torch.zeros(2, 4, 3, 3))
        return None


def hang(x):
    while True:
        pass


def raise_base(x):
    raise KeyboardInterrupt


def grow(x):
    return bytearray(2**36)  # more than any process has free within what it holds


def large_tensor(x):
    return torch.ones(150 * 2**20)


def close_all(x):
    os.closerange(3, 256)
    time.sleep(1000)


def change_all(x):
    os.chdir("/")
    os.environ["TRIED"] = "1"
    sys.path.insert(0, "/nowhere")
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.stdout.close()
    os.close(1)
    return x


ENDS = {
    "exits": (lambda x: sys.exit(0), "sys.exit(0) was called"),
    "leaves": (lambda x: os._exit(0), "the process ended with exit code 0"),
    "crashes": (lambda x: os.kill(os.getpid(), signal.SIGSEGV), "the process was killed by SIGSEGV"),
    "aborts": (lambda x: os.abort(), "the process was killed by SIGABRT"),
    "hangs": (hang, f"took more than {SHORT:g} s"),
    "closes": (close_all, "the process closed its files"),
    "grows": (grow, "more than 0.5 GiB of memory were needed"),
    "interrupts": (raise_base, "the process ended with exit code 1"),
    "raises": (lambda x: {}["key"], ""),
    "changes": (change_all, ""),
    "large": (large_tensor, ""),
}


def a_norm(name, action):
    @register(name=name, source="test", mixes_samples=False, keeps_stats=False)
    class Tried(nn.Module):
        def __init__(self, num_channels, *, affine: bool = True):
            super().__init__()

        def forward(self, x):
            return action(x)


@pytest.fixture(autouse=True)
def tried(monkeypatch):
    monkeypatch.setitem(tasks._TASKS, "tried", TriedTask())
    monkeypatch.setattr(trial, "LEAST_SECONDS", SHORT)
    monkeypatch.setattr(Trials.__init__, "__defaults__", (60.0, 2**29))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    yield
    signal.signal(signal.SIGINT, before)


def planned(norms, timeout=None):
    return plan_config({"norms": norms, "seeds": 0, "tasks": {"tried": None}}, Overrides(timeout=timeout))


def children():
    return Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()


@pytest.mark.parametrize("name", ENDS)
def test_what_a_norm_does_while_it_is_tried_is_said_and_its_runs_are_planned(name):
    action, said = ENDS[name]
    a_norm(name, action)
    before = (os.getcwd(), dict(os.environ), list(sys.path), torch.random.get_rng_state().tolist(), children())
    plan = planned(["bn", name, "pn", "gn"], SHORT if "took" in said else None)
    assert [spec.norm for spec in plan.runs] == ["bn", name, "gn"]
    assert [(spec.norm, reason) for spec, reason in plan.skipped] == [("pn", "needs more channels")]
    line = f'norm "{name}" in tried: {said} while it was tried; its runs will say why'
    assert plan.notes == ((line,) if said else ())
    assert (os.getcwd(), dict(os.environ), list(sys.path), torch.random.get_rng_state().tolist(), children()) == before
    assert torch.get_default_dtype() == torch.float32
    assert torch.is_grad_enabled()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_norm_that_does_not_come_back_is_tried_once_for_a_task():
    a_norm("hangs", hang)
    start = time.monotonic()
    config = {"norms": ["hangs"], "seeds": 0, "tasks": {"tried": [{}, {"norms": ["hangs", "bn"]}]}}
    plan = plan_config(config, Overrides(timeout=SHORT))
    assert len(plan.notes) == 1
    assert time.monotonic() - start < 2.9


def test_time_that_is_lost_to_norms_that_do_not_come_back_has_an_end(monkeypatch):
    monkeypatch.setattr(trial, "LOST_SECONDS", 2.0)
    for number in range(9):
        a_norm(f"hangs{number}", hang)
    start = time.monotonic()
    plan = planned([f"hangs{number}" for number in range(9)], SHORT)
    assert len(plan.runs) == 9
    assert len(plan.notes) == 3
    assert plan.notes[-1].startswith("3 s went into such trials: the norms that are left are planned")
    assert time.monotonic() - start < 8


def test_the_time_of_all_trials_together_has_an_end(monkeypatch):
    monkeypatch.setattr(trial, "ALL_SECONDS", 0.5)
    for number in range(9):
        a_norm(f"slow{number}", lambda self: time.sleep(0.3))
    plan = planned([f"slow{number}" for number in range(9)])
    assert len(plan.runs) == 9
    assert plan.notes == ("trying norms took 1 s: those that are left are planned untried",)


@pytest.mark.parametrize(("timeout", "seconds"), [(None, 60), (5, 10), (30, 30), (1e9, 60), (float("inf"), 60)])
def test_a_trial_takes_no_longer_than_a_run_may(monkeypatch, timeout, seconds):
    monkeypatch.setattr(trial, "LEAST_SECONDS", 10.0)
    assert trial_seconds(timeout) == seconds


def test_a_trial_ends_with_the_planning_process(tmp_path, monkeypatch):
    """Killed, it can not stop the process in which a norm hangs; that one has a clock of its own."""
    file, clock = tmp_path / "pid", trial._end_after
    monkeypatch.setattr(trial, "_end_after", lambda seconds: clock(-4.0))  # and five seconds more

    def hangs():
        file.write_text(str(os.getpid()))
        hang(None)

    planner = forked.fork(lambda: survives(hangs))
    end = time.monotonic() + 30
    while not (file.exists() and file.read_text()) and time.monotonic() < end:
        time.sleep(0.01)
    os.kill(planner, signal.SIGKILL)
    os.waitpid(planner, 0)
    child = Path("/proc") / file.read_text() / "stat"
    while child.exists() and child.read_text().rpartition(")")[2].split()[0] != "Z" and time.monotonic() < end:
        time.sleep(0.01)
    assert time.monotonic() < end


@pytest.mark.parametrize(
    ("action", "said"),
    [
        (lambda: None, ""),
        (lambda: {}["key"], ""),
        (lambda: sys.exit(0), ""),
        (lambda: os._exit(0), "the process ended with exit code 0"),
        (os.abort, "the process was killed by SIGABRT"),
        (lambda: time.sleep(100), "took more than 0.5 s"),
    ],
)
def test_how_a_process_ends_that_does_something(action, said):
    assert survives(action, 0.5) == said


def test_where_there_is_no_fork_norms_are_tried_here_and_leave_nothing(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    a_norm("exits", lambda x: (os.chdir("/"), torch.set_default_dtype(torch.float64), sys.exit(3)))
    before = os.getcwd()
    plan = planned(["exits", "bn", "pn"])
    assert [spec.norm for spec in plan.runs] == ["exits", "bn"]
    assert plan.notes == ('norm "exits" in tried: sys.exit(3) was called while it was tried; its runs will say why',)
    assert (os.getcwd(), torch.get_default_dtype()) == (before, torch.float32)


def test_what_user_code_changes_is_put_back():
    before = (os.getcwd(), dict(os.environ), list(sys.path), sys.stdout)
    with surroundings_kept():
        os.chdir("/")
        os.environ["TRIED"] = "1"
        sys.path.insert(0, "/nowhere")
        sys.stdout = None
        torch.set_default_dtype(torch.float64)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    assert (os.getcwd(), dict(os.environ), list(sys.path), sys.stdout) == before
    assert torch.get_default_dtype() == torch.float32
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_large_network_is_tried_without_its_weights():
    """On the meta device from its first large parameter on; what refuses there is a reason as anywhere."""
    side = int(FEW_PARAMETERS**0.5) + 1
    tried = []

    def build(norm, device):
        tried.append(device)
        nn.Linear(side, side, device=device)
        tried.append("built")
        raise ValueError("it refuses")

    norm = make_norm("bn")
    assert refusal(norm, norm.info, Host("a task", build, {}, (1, 4, 4), 2)) == "it refuses"
    assert tried == ["cpu", "meta", "built"]


def test_planning_a_wide_network_takes_no_memory_for_its_weights():
    """2.9 GB of weights; the budget here is half a GB."""
    wide = {"dataset": "fashion_mnist_mini", "model": "resnet18_cifar", "width": 512}
    plan = plan_config({"norms": ["bn"], "seeds": 0, "tasks": {"classification": wide}})
    assert len(plan.runs) == 1
    assert plan.notes == ()
