"""The suite's normalization layers: one file per registered name, or per family whose layers share code.

`LAYERS` lists the registered names in the order of tables, each with its file and one line. A file of this folder is
registered by lying here; without a line in the list its names come last (tests ask for the line).
"""

from __future__ import annotations

LAYERS = {
    "none": ("none", "no statistics, the affine alone: the control"),
    "in": ("instance_norm", "positions of one channel of one sample"),
    "ln": ("ln", "all values of one sample"),
    "gn": ("gn", "a group of channels of one sample"),
    "pn": ("pn", "the channels at one position of one sample"),
    "layer2d": ("layer2d", "the same with the biased variance, as ConvNeXt has it"),
    "rms": ("rms", "the same without a mean: root mean square"),
    "bn": ("bn", "samples and positions of one channel"),
    "bgn": ("bgn", "samples, and a group of a sample's values"),
    "ghost": ("ghost", "bn on sub-batches"),
    "ebn": ("ebn", "bn's means, one deviation for all channels"),
    "bcn": ("bcn", "bn, then gn"),
    "iebn": ("iebn", "bn, scaled per sample and channel by a gate"),
    "sn": ("sn", "a learned mixture of in, ln and bn"),
    "frn": ("frn", "mean square of one channel of one sample, and a threshold in the place of the activation"),
    "evonorm_b0": ("evonorm", "batch and sample deviation, in the place of norm and activation"),
    "evonorm_s0": ("evonorm", "a gate over group deviation, in the place of norm and activation"),
    "proxy": ("proxy", "gn and the activation, standardized by a Gaussian proxy"),
    "ws_gn": ("ws", "gn of a convolution with standardized weights"),
    "ws_bn": ("ws", "bn of a convolution with standardized weights"),
    "mbn": ("mbn", "statistics of the last batches, older ones with less weight"),
    "cbn": ("cbn", "statistics of the last batches, carried over to the present weights"),
    "brn": ("brn", "bn, corrected towards the running statistics within limits"),
    "mabn": ("mabn", "second moments averaged over the last batches, forward and backward"),
    "online": ("online", "each sample by the statistics of those before it"),
    "dsbn": ("dsbn", "a bn per domain"),
    "dual_bn": ("dual_bn", "a bn for clean and one for adversarial images"),
    "bne": ("bne", "statistics per domain, unseen domains between the known"),
    "transnorm": ("transnorm", "statistics per domain, alike channels amplified"),
    "sabn": ("sabn", "bn, then an affine per condition"),
    "tasknorm": ("tasknorm", "moments of a task's context set mixed with the sample's own"),
}
"""Registered name -> (its file without .py, what its statistics cover or what it adds)."""
