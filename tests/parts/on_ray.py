"""A grid made on a Ray cluster by a process of its own, which tests end.

python -m parts.on_ray ADDRESS OUT DATA CONFIG
"""

import json
import sys
from pathlib import Path

PLUGIN = '''
import os, time
from tasks import register_task, task_names
from tasks.base import Options, Outcome, Setting

class Steps(Options):
    parts: int = 0
    seconds: float = 0.0
    ends: str = ""

class Fake:
    """Some parts, each kept in the journal; a line in data_dir for each that is really made."""

    name, version, options, metrics = "ray_fake", 1, Steps, ("top1", "test_loss")

    def setting(self, options):
        return Setting()

    def data_checksum(self, options, data_dir):
        return "none"

    def why_not(self, norm, info, options):
        return None

    def run(self, norm, options, context):
        def part(number):
            time.sleep(options.seconds)
            with (context.data_dir / "made").open("a") as log:
                log.write(f"{context.seed} {number} {os.getpid()}\\n")
            return number

        found = context.journal.each("parts", range(options.parts), part)
        if options.ends == "abort":
            os.abort()
        metrics = {"top1": 0.5 + context.seed / 100, "test_loss": float(sum(found))}
        return Outcome(metrics, evidence={"data": "synthetic"})

if "ray_fake" not in task_names():
    register_task(Fake())
'''


def planned(plugin, config):
    """The runs of a config that may ask for ray_fake."""
    from norms.registry import load_plugin
    from suite.planning import plan_config

    load_plugin(plugin)
    return plan_config(config).runs


def runner_of(plugin, data):
    from suite.runner import Runner

    return Runner(plugins=(plugin,), data_dir=Path(data), checkpoint_every=0.1, commit="abc")


def main(address, out, data, config):
    from suite.engine import execute
    from suite.launch.ray import RayLauncher

    plugin = Path(data) / "plugin.py"
    specs = planned(plugin, json.loads(config))
    try:
        print(dict(execute(specs, runner_of(plugin, data), out, launcher=RayLauncher(address))), flush=True)
    except KeyboardInterrupt:
        print("left", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
