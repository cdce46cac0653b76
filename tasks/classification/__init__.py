"""Image classification: task.py (the value TASK and its loop), options.py."""
