"""What reads or writes memory in a tight loop, and the algebra on top of it.

    from norms.kernels import affine, by_moments, moments        for a layer of one's own: docs/your-norm.md

moments.py   mean and biased variance, per channel or sample, of sets of samples, and of earlier batches together
affine.py    affine maps per sample and channel; layers whose coefficients follow from moments (`by_moments`)
grouping.py  normalization by groups of a flattened sample over sets of samples: bn, bgn, gn, ln, in, ghost
own.py       sums and the gradient of layers with a backward of their own: online, mabn
curves.py    maps that are no lines, by numbers of a sample and channel: the EvoNorms
operators.py the same as operators of torch.library
rows.py      normalization of the channels at each position: pn, layer2d, rms
native.py    the compiled loops (native.c), and when they serve
plain.py     the same in operations of torch, for every other device, type and transform
"""

from norms.kernels.affine import affine, by_moments
from norms.kernels.moments import moments

__all__ = ["affine", "by_moments", "moments"]
