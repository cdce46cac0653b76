"""Base classes that the layers of a family share; norms.channels.PerChannel is the base of nearly all."""
