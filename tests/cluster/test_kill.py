"""The proof by kills (tests.cluster.kill), short: ten kills of each launcher."""

import os
import subprocess
import sys

import pytest

from suite.environment import ROOT

pytestmark = pytest.mark.cluster


@pytest.mark.parametrize("place", ["local", "ray", "slurm"])
def test_ten_kills_lose_and_double_nothing(place, tmp_path):
    words = ["--on", place, "--kills", "10", "--runs", "30", "3", "--seconds", "240", "--out", str(tmp_path / "kills")]
    done = subprocess.run(
        [sys.executable, "-m", "tests.cluster.kill", *words],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
        timeout=900,
        check=False,
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout
    assert "holds  0 lost" in done.stdout
