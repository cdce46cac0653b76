"""Base classes of the layers beside norms.channels and norms.running: what the layers of a family share."""
