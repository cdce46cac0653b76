"""Computations that several layers share: moments, affine maps, and both in few passes over memory."""
