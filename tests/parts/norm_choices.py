"""Which norms a test takes, where all of them would take minutes."""

from norms.registry import norm_info

TIER1 = ("none", "bn", "in", "ln", "gn", "pn", "bgn")


def one_of_each_kind(names):
    """Tier 1 and the first norm of each kind: what sets norms apart for a task is in the facts that they declare."""
    kinds = {}
    for name in names:
        i = norm_info(name)
        kind = (i.needs, i.mixes_samples, i.keeps_stats, i.across_iterations, i.slices_at_once, i.exact_gradient)
        kinds.setdefault(kind, name)
    return [name for name in names if name in TIER1 or name in kinds.values()]
