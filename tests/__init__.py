"""The tests, as a package: `python -m tests.cluster.kill` finds it before one of that name that a library installs."""
