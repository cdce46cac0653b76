"""What usually causes a fact to be FALSE, in one line for whoever wrote the layer.

Several causes can make one fact false; what was measured, and its detail, tell them apart. So each fact has hints of
patterns (regular expressions, looked for in both), tried in order, and last one for anything else.
"""

from __future__ import annotations

import re

_BUFFER = "keep it in a registered buffer (a tensor, counters too) and change it in place under torch.no_grad()"
_PLAIN_TENSOR = (
    "an attribute that is no buffer (self.x = ..., a Python counter) is not stored, copied or held: " + _BUFFER
)
_NO_GRAD = "running statistics are updated with a gradient graph: update them under torch.no_grad(), or from x.detach()"
_CONVENTION = (
    "torch.var divides by n - 1 unless correction=0; n / (n - 1) times the biased variance is the unbiased one"
)
_DECLARE = "the layer may be right and the declaration wrong: see the arguments of @register (norms.registry.NormInfo)"

_LIKE = (
    (
        "^differs; it is the training",
        "evaluation takes statistics of the batch: use the running ones where self.training is False",
    ),
    (
        "^differs; eps",
        "eps is another number, or outside the root in one of the two: 1 / (std + eps), 1 / sqrt(var + eps)",
    ),
    (
        "^differs; samples .* enter",
        "the layer's statistics are of a part of the batch: is x cut before mean and variance?",
    ),
    ("^differs; variance", _CONVENTION),
    (
        "^differs; scale",
        "the same formula but for one factor: a weight twice, or the deviation in the place of the variance?",
    ),
    ("^differs; shift", "the same formula but for what is added: bias twice or not at all, or another mean"),
    ("^differs; .*alone", "some samples or channels only: an index or a view that mixes the order of axes"),
    ("^refused", "the layer refuses all inputs of this comparison, each with the reason given"),
    ("", "other axes, or another formula: write both out for one channel by hand"),
)

HINTS: dict[str, tuple[tuple[str, str], ...]] = {
    "builds": (
        ("", "the constructor is called as cls(num_channels, affine=..., **options), then forwards (4, C, 4, 4)"),
    ),
    "shape_kept": (("", "statistics need keepdim=True, or a view to (1, C, 1, ...), to be broadcast over x"),),
    "dtype_kept": (
        ("mixed dtype|expected|same dtype", "parameters or buffers meet x in another type: cast them to x's, and back"),
        ("", "cast the result back: compute in torch.promote_types(x.dtype, torch.float32), return y.to(x.dtype)"),
    ),
    "input_untouched": (
        ("", "an operation in place on x or on a view of it (x -= ..., x.sub_(...)): work on a new tensor"),
    ),
    "train_and_eval": (
        ("differ", "the two modes differ where nothing is declared to: is self.training read, or a statistic kept?"),
        ("", "evaluation never uses the running statistics: read them where self.training is False"),
    ),
    "mixes_samples_in_train": (
        ("yes", "statistics go over axis 0 (N), which is declared not to be so: leave 0 out of dim=(...)"),
        ("", "statistics do not go over axis 0 (N) in training: put 0 into dim=(...), or declare mixes_samples=False"),
    ),
    "mixes_samples_in_eval": (
        ("yes", "evaluation takes statistics of the batch: use the running ones where self.training is False"),
        ("", "samples do not depend on each other in evaluation: declare mixes_samples_in_eval=False"),
    ),
    "axes": (("", f"the dim=(...) of mean and variance are others than declared; {_DECLARE}"),),
    "every_sample_counts": (
        (
            "running statistics",
            "running statistics are of a part of the batch: is x cut (x[::2], x[:n // 2]) before they are?",
        ),
        ("", "the statistics are of a part of the batch: is x cut (x[::2], x[:n // 2]) before mean and variance?"),
    ),
    "variance_in_training": (
        ("neither", "two kinds of variance are mixed, or it is divided by another number than n or n - 1"),
        ("", f"in the training formula: {_CONVENTION}"),
    ),
    "variance_in_running_statistics": (
        ("neither", "running_var takes another number than the batch's variance: is it squared, or a deviation?"),
        ("", f"in running_var: {_CONVENTION}"),
    ),
    "earlier_iterations": (("", f"the training output does not depend on earlier batches; {_DECLARE}"),),
    "keeps_statistics": (
        ("evaluation moves", "statistics are updated in evaluation, too: update them where self.training is True"),
        ("no", "nothing that is kept changes in training: is a buffer assigned a new local, or the update left out?"),
        ("", f"something is kept, so declare keeps_stats=True, or do not keep it; {_DECLARE}"),
    ),
    "running_statistics_used_in_eval": (
        ("no", "evaluation does not depend on what training saw: read the running statistics where training is False"),
        ("", f"evaluation depends on what training saw; {_DECLARE}"),
    ),
    "momentum": (
        ("", "the two weights are swapped: momentum is the new value's, running.lerp_(new, momentum), as in torch"),
    ),
    "gradient_first_order": (
        ("raises|RuntimeError", _NO_GRAD),
        (
            "",
            "a statistic is detached (.detach(), .data, no_grad) or a backward of its own is wrong; if so it is meant, declare exact_gradient=False",
        ),
    ),
    "gradient_second_order": (
        (
            "",
            "the backward itself is not differentiable: compute it from ctx.saved_tensors by operations that autograd sees",
        ),
    ),
    "forward_mode_derivatives": (
        (
            "jvp function",
            "an autograd.Function without jvp: add the staticmethod, or use plain operations under forward mode",
        ),
        ("captured|in-place|inplace", f"a buffer is changed by a value with a tangent: {_BUFFER}"),
        ("", "an operation of the forward has another tangent than its derivative: is .data or numpy used?"),
    ),
    "backward_after_training": (
        ("", "evaluation saves the running buffers themselves for its backward: use clones of them in its formula"),
    ),
    "batch_of_one": (("", "N = 1 must work, or be refused by a ValueError that says why"),),
    "empty_batch": (
        ("", "N = 0 comes from the last shard of a batch: return an empty output early, and move nothing"),
    ),
    "maps_of_one_position": (
        ("", "one value has no variance: work, or raise a ValueError that says why; eps belongs inside the root"),
    ),
    "other_spatial_ranks": (
        ("", "take the axes from x.dim(): range(2, x.dim()), and views of (1, C, *[1] * (x.dim() - 2))"),
    ),
    "odd_channel_counts": (("", "refuse channels that do not fit by a ValueError that names the ones that do"),),
    "constant_input": (
        ("", "a division by a variance of 0, or the root's slope there: torch.rsqrt(var + eps), eps inside the root"),
    ),
    "infinity_or_nan_in_a_batch": (
        ("", "statistics that are not finite are kept for ever: leave the batch out where one is not (torch.where)"),
    ),
    "other_types_refused": (
        ("moved", "something is counted or kept before x is looked at: refuse first"),
        (
            "",
            "raise ValueError where not x.is_floating_point(), naming x.dtype and that a floating-point input is needed",
        ),
    ),
    "float64_on_smaller_input": (
        (
            "",
            "x and parameters meet in different types: cast both to promote_types(x.dtype, float32), return y.to(x.dtype)",
        ),
    ),
    "affine_false": (
        ("", "affine=False removes `weight` and `bias`, named so, and nothing else (register_parameter(name, None))"),
    ),
    "state_dict_round_trip": (
        ("neither in buffers", _PLAIN_TENSOR),
        ("", "a buffer with persistent=False, or state outside buffers and parameters, is not in the state_dict"),
    ),
    "state_dict_without_counter": (
        ("", "fill the counter in where a state_dict lacks it, as torch's BatchNorm does in _load_from_state_dict"),
    ),
    "safetensors_round_trip": (
        ("", "extra state must be a tensor, and no two entries of the state_dict may share memory"),
    ),
    "deepcopy": (
        ("", "a tensor with a gradient graph, or a __deepcopy__ of its own: buffers must be copied, detached"),
    ),
    "pickled": (("", "a lambda, a local function or an open file in an attribute: use a method, or __getstate__"),),
    "form_of_buffers_kept": (
        ("graph", _NO_GRAD),
        ("", "give buffers their final shape and type when they are made, and write into them in place (copy_)"),
    ),
    "averaged_model": (
        (
            "",
            "an average copies buffers into the buffers of an earlier copy: none may change its shape, and state is buffers",
        ),
    ),
    "data_parallel_replica": (
        (
            "",
            "a function bound to the original (self.f = self.forward, a closure) is called: look things up on self when called",
        ),
    ),
    "reset_parameters": (
        (
            "no reset_parameters",
            "put the initialization into reset_parameters(), called by the constructor, as torch's layers have",
        ),
        ("", "to_empty leaves any numbers in memory: reset_parameters() must write every parameter and every buffer"),
    ),
    "reset_running_stats": (
        ("", "reset_running_stats() must put back every buffer that training moves, counters too"),
    ),
    "freeze": (
        ("moves", _PLAIN_TENSOR),
        ("", "state outside buffers and extra state can not be held: " + _BUFFER),
    ),
    "recalibrate": (
        ("reset_running_stats", "a norm that keeps statistics needs reset_running_stats()"),
        ("unmoved", "with momentum 1 nothing of the new batch enters: momentum is weighted as the old value's"),
        ("of a part", "running statistics are of a part of the batch: is x cut before they are?"),
        (
            "",
            "with momentum 1 the running statistics must be the last batch's own; are they, and does evaluation use them?",
        ),
    ),
    "warns_when_never_told": (
        (
            "without steps|loop told",
            "the warning is for updates that nobody told of: count steps by the weight's _version",
        ),
        ("", "a norm that waits for after_update is silently another layer: warnings.warn once, naming after_update"),
    ),
    "slices": (("", "situation.slices is read wrongly: slice k of K is x[k::K]; or declare slices_at_once=False"),),
    "functional_call_keeps_state": (
        ("", "functional_call hands over buffers: change them in place; a new tensor in self.x is lost after the call"),
    ),
    "stacked_under_vmap": (
        ("not refused", f"raise a RuntimeError in training inside a transform; {_DECLARE}"),
        ("memory_format|is_contiguous", "a memory format can not be asked for inside vmap: skip the question there"),
        ("data-dependent|item", "a value is read (if tensor:, .item()), which vmap can not: use torch.where"),
        ("setup_context|vmap", "an autograd.Function needs setup_context and vmap (or generate_vmap_rule = True)"),
        (
            "running|buffer",
            "buffers are updated through views that vmap copies: write into the buffer itself, in place",
        ),
        ("", "something of the layer is kept outside of the parameters and buffers that the call brings"),
    ),
    "compiles": (
        ("N=67", "a size is used as a fixed number: no Python loop or if over x.shape[0]; other batch sizes must do"),
        (
            "another|other",
            "compiled code does something else: is torch.compiler.is_compiling() read, or a number baked in?",
        ),
        ("", "fullgraph: no .item(), no if on a tensor's value, no print; or declare compiles=False"),
    ),
    "traced_by_fx": (
        (
            "control flow|symbolically traced",
            "a stock tracer goes into the forward, where `if` on x.shape can not be traced: hide it from tracers",
        ),
        (
            "",
            "the traced network is fixed to the mode or statistics of the trace: hide the forward from tracers as a leaf",
        ),
    ),
    "exported": (
        ("", "the exporter needs what fullgraph compilation needs, in evaluation: no .item(), no if on values"),
    ),
    "autocast": (
        ("kept in 16 bits", "buffers take the parameters' small type: register them in float32 or better"),
        ("", "statistics in 16 bits: compute them in torch.promote_types(x.dtype, torch.float32)"),
    ),
    "global_generator_untouched": (
        ("", "a draw from the global generator in the forward: give the layer a generator of its own"),
    ),
    "channels_last_kept": (
        ("", "view, reshape or contiguous() loses the layout: y.contiguous(memory_format=...) at the end"),
    ),
    "training_like_reference": _LIKE,
    "evaluation_like_reference": _LIKE,
    "needs": (
        (
            "",
            f"what the layer reads (situation.domain, situation.part, weight=, activation) is not what it declares; {_DECLARE}",
        ),
    ),
}


def hint_for(fact: str, measured: str, detail: str) -> str:
    """What usually makes this fact false, or "" for a fact that has no hint."""
    text = f"{measured}; {detail}"
    return next((hint for pattern, hint in HINTS.get(fact, ()) if re.search(pattern, text)), "")
