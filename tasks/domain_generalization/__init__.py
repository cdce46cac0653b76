"""Domain generalization: task.py (the value TASK), options.py, training.py (the loop, and what is measured)."""
