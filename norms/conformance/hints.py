"""Usual causes of a fact that is FALSE, in one line for the author of the layer.

Several causes can make one fact false; what was measured, and its detail, tell them apart. So a fact has hints by
pattern (regular expressions, looked for in both), tried in order, the last of them "" for anything else.
"""

from __future__ import annotations

import re

_DECLARE = "or the declaration is wrong: see norms.protocol.NormInfo"
_BUFFER = "keep it in registered buffers, changed in place under torch.no_grad()"
_ATTRIBUTE = f"a plain attribute (a Python counter) is neither stored nor held: {_BUFFER}"
_NO_GRAD = "running statistics take a gradient graph along: update them under torch.no_grad()"
_CUT = "statistics of a part of the batch: is x cut (x[::2], x[:n // 2]) before they are taken?"
_CONVENTION = "torch.var divides by n - 1 unless correction=0; times n / (n - 1) the biased variance is unbiased"
_TYPES = "compute in torch.promote_types(x.dtype, torch.float32), parameters cast to it, and return y.to(x.dtype)"
_ROUNDED = f"x.float() rounds a float64 input: {_TYPES}"
_SWAPPED = "the two weights are swapped: momentum is the new value's, running.lerp_(new, momentum), as in torch"
_LIKE = {
    "it is the training formula": "evaluation must read the running statistics: self.training is False there",
    "^differs; eps": "another eps, or outside the root in one of the two: 1 / (std + eps), 1 / sqrt(var + eps)",
    "do not enter": _CUT,
    "^differs; variance": _CONVENTION,
    "^differs; scale": "the same but for one factor: the weight twice or not at all, or a deviation as a variance?",
    "^differs; shift": "the same but for what is added: the bias twice or not at all, or another mean",
    "^differs; .*alone": "some samples or channels only: an index, or a view that mixes the order of axes",
    "^refused": "the layer takes no input of this comparison; the detail says why",
    "^differs; (layer|formula): not finite": "a division by zero or a root of a negative number there: is eps inside?",
    "": "other axes, or another formula: write both out for one channel by hand",
}

HINTS: dict[str, dict[str, str]] = {
    "builds": {"": "a layer is built as cls(num_channels, affine=..., **options), and then forwards (4, C, 4, 4)"},
    "shape_kept": {"": "statistics need keepdim=True, or a view as (1, C, 1, ...), to be broadcast over x"},
    "dtype_kept": {"": _TYPES},
    "input_untouched": {"": "an operation in place on x or a view of it (x -= ..., x.sub_(...)): make a new tensor"},
    "train_and_eval": {
        "differ": f"the modes differ: what does the layer read of self.training, or keep? {_DECLARE}",
        "": "evaluation does as training does: read the running statistics where self.training is False",
    },
    "mixes_samples_in_train": {
        "yes": f"statistics go over axis 0: leave it out of dim=(...), {_DECLARE}",
        "": f"statistics do not go over axis 0: put it into dim=(...), {_DECLARE}",
    },
    "mixes_samples_in_eval": {
        "yes": "evaluation takes statistics of the batch: read the running ones where self.training is False",
        "": f"each sample is evaluated by itself, {_DECLARE}",
    },
    "axes": {"": f"mean and variance go over other axes (dim=...), {_DECLARE}"},
    "every_sample_counts": {"": _CUT},
    "variance_in_training": {
        "neither": "two kinds of variance are mixed, or it is divided by neither n nor n - 1",
        "": f"in the training formula: {_CONVENTION}",
    },
    "earlier_iterations": {"": f"the training output does not depend on earlier batches, {_DECLARE}"},
    "keeps_statistics": {
        "evaluation moves": "statistics are updated in evaluation: update them where self.training is True",
        "no": "training moves no buffer: is one given a new local value, or is the update left out?",
        "": f"training moves what is kept, {_DECLARE}",
    },
    "running_statistics_used_in_eval": {
        "no": "evaluation does not depend on earlier batches: read the running statistics there",
        "": f"evaluation depends on earlier batches, {_DECLARE}",
    },
    "variance_in_running_statistics": {
        "neither": "running_var is moved by something else than a variance of the batch: a deviation?",
        "": f"in running_var: {_CONVENTION}",
    },
    "momentum": {"": _SWAPPED},
    "gradient_first_order": {
        "raises": _NO_GRAD,
        "float32": _ROUNDED,
        "": "is a statistic detached (.detach(), .data, no_grad)? If it is meant: exact_gradient=False",
    },
    "gradient_second_order": {
        "float32": _ROUNDED,
        "": "is something detached in the backward? Its operations must be differentiable, too",
    },
    "forward_mode_derivatives": {
        "jvp function": "an autograd.Function without jvp: add that staticmethod, or use plain operations there",
        "captured|in-place|inplace": f"a buffer takes a value with a tangent: {_BUFFER}",
        "": "an operation of the forward has another tangent than its derivative: is .data or numpy used?",
    },
    "backward_after_training": {
        "": "evaluation's graph holds the running buffers themselves: compute with copies of them"
    },
    "batch_of_one": {"": "N = 1 works, or is refused by a ValueError that says why"},
    "empty_batch": {"": "for N = 0 return an empty output before anything is moved: a worker may get no sample"},
    "maps_of_one_position": {"": "one value has no variance: eps inside the root, or a ValueError that says why"},
    "other_spatial_ranks": {"": "take axes from x.dim(): range(2, x.dim()), views as (1, C, *[1] * (x.dim() - 2))"},
    "odd_channel_counts": {"": "refuse channels that do not fit by a ValueError that names what does"},
    "constant_input": {"": "a division by a variance of 0, or the root's slope there: torch.rsqrt(var + eps)"},
    "infinity_or_nan_in_a_batch": {
        "": "an average keeps such a value for ever: leave a batch that is not finite out of it"
    },
    "other_types_refused": {
        "moved": "something is counted or kept before x is looked at: refuse first",
        "": "where not x.is_floating_point(): a ValueError that a floating-point input is needed",
    },
    "float64_on_smaller_input": {"": _TYPES},
    "affine_false": {"": "affine=False removes `weight` and `bias`, named so, and nothing else"},
    "state_dict_round_trip": {
        "neither in buffers": _ATTRIBUTE,
        "": "something is in no state_dict: a buffer with persistent=False, or an attribute",
    },
    "state_dict_without_counter": {
        "": "in _load_from_state_dict, fill a missing counter in, as torch's BatchNorm does"
    },
    "safetensors_round_trip": {"": "extra state must be a tensor, and no two entries may share memory"},
    "deepcopy": {
        "graph leaves": _NO_GRAD,
        "": "a __deepcopy__ or __getstate__ of its own: buffers must be copied",
    },
    "pickled": {"": "a lambda or a local function in an attribute: make it a method"},
    "form_of_buffers_kept": {
        "graph": _NO_GRAD,
        "": "give buffers their final shape and type when they are made, and write into them with copy_",
    },
    "averaged_model": {
        "deepcopy": _NO_GRAD,
        "": f"averages copy buffer by buffer into an earlier copy of the network: {_BUFFER}",
    },
    "data_parallel_replica": {
        "": "a method bound to the original is called (self.f = self.forward): look it up when called"
    },
    "reset_parameters": {
        "no reset_parameters": "let the constructor call a reset_parameters() that initializes, as torch's layers do",
        "": "after to_empty memory holds anything: reset_parameters() writes every parameter and buffer",
    },
    "reset_running_stats": {"": "reset_running_stats() puts back every buffer that training moves, counters too"},
    "freeze": {"": _ATTRIBUTE},
    "recalibrate": {
        "reset_running_stats": "a norm that keeps statistics has reset_running_stats()",
        "unmoved": _SWAPPED,
        "of a part": _CUT,
        "^no buffers": _ATTRIBUTE,
        "": "running statistics must be those of the training formula: other axes, or a deviation for a variance?",
    },
    "warns_when_never_told": {
        "without steps|loop told": "warn of updates that nobody told of alone: have the weights changed since?",
        "": "a layer that waits for after_update and is never told is another layer: warnings.warn, once",
    },
    "slices": {"": "norm batch k of K is x[k::K], by its own statistics; or declare slices_at_once=False"},
    "functional_call_keeps_state": {"": f"a new tensor in self.x is lost after a functional call: {_BUFFER}"},
    "stacked_under_vmap": {
        "not refused": f"raise a RuntimeError in training inside a transform, {_DECLARE}",
        "is_contiguous|memory_format": "a memory format can not be asked for inside vmap: ask outside of it only",
        "data-dependent|item": "a tensor's value is read (if, .item()), which vmap can not: use torch.where",
        "setup_context|vmap": "an autograd.Function needs setup_context and vmap (or generate_vmap_rule = True)",
        "another": "buffers are moved through views, which vmap copies, or replaced: write into them in place",
        "": f"something is kept where the call does not bring it: {_BUFFER}",
    },
    "compiles": {
        "N=67": "the batch size is a symbol at the second size: no loop and no list over it",
        "another|other": "is torch.compiler.is_compiling() read, or a number of the first call baked in?",
        "": "no .item(), no `if` on a tensor's value, no print; or declare compiles=False",
    },
    "traced_by_fx": {
        "control flow|traced|Proxy": "torch.fx goes into the forward, and shapes have no value there: make it a leaf",
        "": "the trace has fixed the mode or a statistic: make the layer a leaf",
    },
    "exported": {
        "dynamic": "the batch size is fixed while tracing: len(x) is the example's, x.shape[0] is any",
        "": "the exporter needs what compilation needs: no .item(), no `if` on a tensor's value",
    },
    "autocast": {
        "kept in 16 bits": "buffers have the parameters' small type: register them as float32 or better",
        "": "statistics in 16 bits: compute in torch.promote_types(x.dtype, torch.float32); or E[x^2] - E[x]^2, lost "
        "at large means",
    },
    "global_generator_untouched": {"": "a draw from the global generator: give the layer a torch.Generator of its own"},
    "channels_last_kept": {"": "a view, reshape or contiguous() loses it: end with contiguous(memory_format=...)"},
    "needs": {"": f"what the layer reads of situation, weight and activation differs, {_DECLARE}"},
    "training_like_reference": _LIKE,
    "evaluation_like_reference": _LIKE,
}


def hint_for(fact: str, measured: str, detail: str) -> str:
    """The usual cause that makes this fact false, or "" for a fact that has no hint."""
    text = f"{measured}; {detail}"
    return next((hint for pattern, hint in HINTS.get(fact, {}).items() if re.search(pattern, text)), "")
