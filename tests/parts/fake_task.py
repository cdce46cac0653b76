"""A plugin with a task that does nothing and writes down that it was run."""

TASK = """
from tasks import register_task, task_names
from tasks.base import Options, Outcome, Setting

class FakeOptions(Options):
    learning_rate: float = 0.1
    fails: bool = False

class Fake:
    name, version, options, metrics = "cli_fake", 1, FakeOptions, ("top1", "test_loss")

    def setting(self, options):
        return Setting()

    def data_checksum(self, options, data_dir):
        return "none"

    def why_not(self, norm, info, options):
        return "needs more positions" if info.name == "in" else None

    def run(self, norm, options, context):
        with (context.data_dir / "made").open("a") as log:
            log.write(f"{norm(4).norm_info.name} {context.seed}\\n")
        if options.fails:
            raise RuntimeError("it fails")
        return Outcome({"top1": 0.5 + context.seed / 10, "test_loss": 1.0}, evidence={"data": "synthetic"})

if "cli_fake" not in task_names():
    register_task(Fake())
"""
