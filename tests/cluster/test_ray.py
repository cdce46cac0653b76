"""suite.launch.ray on a real Ray cluster of three nodes on this machine."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from parts.on_ray import PLUGIN, planned, runner_of
from parts.watching import until

from results.claims import CLAIM
from results.store import find_record, record_files, run_folder
from suite.checkpoints import NEWEST
from suite.engine import execute
from suite.environment import ROOT
from suite.launch.launcher import LaunchError
from suite.launch.ray import RayLauncher
from suite.processes import below

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
STORE = 80_000_000  # bytes of a node's object store, the least that Ray takes
LIMIT = 400.0  # seconds that a command may take on a busy machine


@pytest.fixture(scope="module")
def cluster():
    """Three nodes of one CPU; their addresses are this machine's."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    utilities = pytest.importorskip("ray.cluster_utils")
    head = {"num_cpus": 0, "include_dashboard": False, "object_store_memory": STORE}
    cluster = utilities.Cluster(initialize_head=True, head_node_args=head)
    for _ in range(3):
        cluster.add_node(num_cpus=1, object_store_memory=STORE)
    yield cluster
    cluster.shutdown()


@pytest.fixture
def data(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "plugin.py").write_text(PLUGIN)
    return tmp_path / "data"


def config_of(seeds, **options):
    return {"norms": ["bn"], "seeds": list(range(seeds)), "tasks": {"ray_fake": options}}


def made(data):
    """(seed, part, pid) of every part that was really made."""
    file = data / "made"
    return [tuple(map(int, line.split())) for line in file.read_text().splitlines()] if file.exists() else []


def command(cluster, out, data, config):
    arguments = [sys.executable, "-m", "parts.on_ray", cluster.address, str(out), str(data), json.dumps(config)]
    around = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    return subprocess.Popen(arguments, cwd=ROOT, env=around, stdout=subprocess.PIPE, text=True)


def left_behind(data):
    """Processes of runs of this test that are still there."""
    return [pid for _, _, pid in made(data) if Path(f"/proc/{pid}").exists()]


def whole(out, specs):
    """0 lost, 0 doubled, no claim stuck."""
    assert [find_record(out, spec).status for spec in specs] == ["ok"] * len(specs)
    assert len(list(record_files(out))) == len(specs)
    assert not list(Path(out).rglob(CLAIM))


def test_a_grid_gives_the_records_that_this_machine_gives(cluster, data, tmp_path):
    config = config_of(5, parts=2)
    config["tasks"]["classification"] = {
        "dataset": "fashion_mnist_mini",
        "model": "resnet8",
        "max_steps": 2,
        "batch_size": 16,
    }
    config["seeds"] = [0, 1]
    specs = planned(data / "plugin.py", config)
    runner = runner_of(data / "plugin.py", data)
    here = execute(specs, runner, tmp_path / "local")
    there = execute(specs, runner, tmp_path / "ray", launcher=RayLauncher(cluster.address))
    assert here == there == {"ok": len(specs)}
    whole(tmp_path / "ray", specs)
    times = re.compile("seconds|memory")
    for spec in specs:
        one, other = (find_record(tmp_path / place, spec) for place in ("local", "ray"))
        assert {k: v for k, v in one.metrics.items() if not times.search(k)} == {
            k: v for k, v in other.metrics.items() if not times.search(k)
        }
        assert one.evidence == other.evidence
        assert len(one.history) == len(other.history)
        names = [sorted(f.name for f in run_folder(tmp_path / p, spec).iterdir()) for p in ("local", "ray")]
        assert names[0] == names[1]


def test_runs_of_a_node_that_is_taken_away_go_on_elsewhere(cluster, data, tmp_path):
    config = config_of(6, parts=20, seconds=0.5)
    specs = planned(data / "plugin.py", config)
    extra = cluster.add_node(num_cpus=1, object_store_memory=STORE)
    raylet = extra.all_processes["raylet"][0].process.pid
    events, gone = [], []

    def hear(event):
        events.append(event)
        there = below(raylet) if not gone else []
        if any(number > 2 and pid in there for _, number, pid in made(data)):
            gone.append(True)
            cluster.remove_node(extra, allow_graceful=False)

    counts = execute(
        specs,
        runner_of(data / "plugin.py", data),
        tmp_path / "out",
        launcher=RayLauncher(cluster.address),
        on_event=hear,
    )
    assert counts == {"ok": 6}
    assert gone
    whole(tmp_path / "out", specs)
    notes = [event.text for event in events if event.kind == "note"]  # also of a task that had hardly come there
    assert all("NodeDiedError" in note for note in notes)
    assert any("goes on from parts, part" in note for note in notes), notes
    repeated = len(made(data)) - 6 * 20
    assert repeated < 6  # from its checkpoint, not from the start
    assert until(lambda: not left_behind(data))


def test_a_command_that_was_killed_leaves_nothing_and_the_same_one_makes_the_rest(cluster, data, tmp_path):
    config = config_of(6, parts=8, seconds=0.25)
    specs = planned(data / "plugin.py", config)
    first = command(cluster, tmp_path / "out", data, config)
    assert until(lambda: len(made(data)) > 8, LIMIT)
    first.kill()
    first.wait()
    assert until(lambda: not left_behind(data), 30)
    second = command(cluster, tmp_path / "out", data, config)
    assert second.communicate(timeout=LIMIT)[0].strip() == "{'ok': 6}"
    whole(tmp_path / "out", specs)
    assert until(lambda: not left_behind(data))
    assert not below(first.pid)


def test_a_command_that_is_told_to_stop_gets_its_runs_checkpoints_first(cluster, data, tmp_path):
    config = config_of(2, parts=40, seconds=0.25)
    specs = planned(data / "plugin.py", config)
    first = command(cluster, tmp_path / "out", data, config)
    assert until(lambda: {seed for seed, number, _ in made(data) if number >= 3} == {0, 1}, LIMIT)
    first.send_signal(signal.SIGINT)
    start = time.monotonic()
    assert first.communicate(timeout=60)[0].strip() == "left"
    assert time.monotonic() - start < 20
    for spec in specs:
        assert (run_folder(tmp_path / "out", spec) / NEWEST).exists()
        assert find_record(tmp_path / "out", spec) is None
    assert not list((tmp_path / "out").rglob(CLAIM))
    assert until(lambda: not left_behind(data), 30)


def test_a_run_that_ends_its_own_process_has_failed(cluster, data, tmp_path):
    (spec,) = planned(data / "plugin.py", config_of(1, ends="abort"))
    counts = execute(
        [spec], runner_of(data / "plugin.py", data), tmp_path / "out", launcher=RayLauncher(cluster.address)
    )
    assert counts == {"failed": 1}
    assert "SIGABRT" in find_record(tmp_path / "out", spec).reason


def test_code_that_is_sent_runs_where_none_is(cluster, data, tmp_path):
    specs = planned(data / "plugin.py", config_of(2, parts=1))
    launcher = RayLauncher(cluster.address, ship=True)
    counts = execute(specs, runner_of(data / "plugin.py", data), tmp_path / "out", launcher=launcher)
    assert counts == {"ok": 2}


def test_an_address_that_nobody_answers_is_told_at_once(data, tmp_path):
    start = time.monotonic()
    with pytest.raises(LaunchError, match="nobody answers"):
        execute(
            planned(data / "plugin.py", config_of(1)),
            runner_of(data / "plugin.py", data),
            tmp_path / "out",
            launcher=RayLauncher("127.0.0.1:1"),
        )
    assert time.monotonic() - start < 30
