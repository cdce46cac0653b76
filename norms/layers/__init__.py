"""The suite's normalization layers, each registered by its name."""
