"""The calls of a training loop to a network's norms: the same four for every norm, no-ops for most.

    with situation(net, slices=K): ...       # facts about this batch that a layer can not see in x
    with hold(net): ...                      # no norm changes its statistics; outputs are those of its mode
    after_update(net, again, progress)       # an optimizer step was taken
    predict(net, x)                          # the evaluation forward

`slices` is the number K of norm batches in a batch x; norm batch k is x[k::K]. A layer that mixes samples and declares
`slices_at_once` computes all of them in one call; any other layer that mixes samples is called once per norm batch, in
order, so that its running statistics move as if they had come one after the other. Layers that do not mix samples give
the same result either way and run whole.
"""

from __future__ import annotations

import contextlib
import copy
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from norms.bases.running_statistics import RunningStatistics
from norms.channels import transformed
from norms.generators import forked_generators
from norms.protocol import AfterUpdate, BranchDistance, NormInfo, Situation, hook, norm_modules
from norms.telling import Telling
from norms.workers import Workers, moved, own_buffers, refusal

PARTS = ("context", "query")


@contextlib.contextmanager
def situation(
    net: nn.Module,
    domain: int | Tensor | None = None,
    part: str | None = None,
    slices: int = 1,
    workers: Workers | None = None,
) -> Iterator[None]:
    """Within the block every norm of `net` knows the given facts and no others; afterwards those that it knew before.

    Of nested blocks the innermost counts alone. A copy of `net` made inside the block keeps the facts.

    Args:
        net: any module that holds norms built by `make_norm`.
        domain: the domain of the whole batch, or a LongTensor (N,) with one per sample.
        part: "context" or "query" (few-shot learning).
        slices: number of norm batches in one batch; it must divide the batch's size.
        workers: processes that forward the other parts of the batch at the same time (norms.workers); None: this one
            has all of it.

    Raises:
        ValueError: an unknown part, slices that are no whole number of at least 1, or (when forwarded) a batch that
            `slices` does not divide; a norm that can not train with these workers (norms.workers.refusal), slices of
            workers with `sync`, which are to have one norm batch.
        RuntimeError: (when forwarded in training with workers) a norm that mixes samples inside torch.func's transforms
            or forward-mode derivatives, or in a compiled function that holds this block. A network that is compiled
            itself runs uncompiled here, where one of its norms mixes samples.
    """
    if part is not None and part not in PARTS:
        raise ValueError(f'part "{part}" is unknown; allowed: {", ".join(PARTS)}')
    if isinstance(slices, bool) or not isinstance(slices, int) or slices < 1:
        raise ValueError(f"slices={slices}: a whole number of at least 1 is needed")
    shared = workers if workers is not None and not workers.alone else None
    compiled: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
    if shared is not None:
        if shared.sync and slices > 1:
            raise ValueError(
                f"slices={slices}: workers whose norms are synchronized have one norm batch; give slices=1"
            )
        if _admit(net, shared):
            compiled = _uncompiled()
    with compiled, _told(net, Situation(domain, part, slices, workers=shared)):
        yield


@contextlib.contextmanager
def hold(net: nn.Module) -> Iterator[None]:
    """Within the block no norm of `net` changes its statistics; its outputs are those of its current mode.

    The norms work on copies of their buffers (and extra state), and the originals are put back, the same tensors as
    before, after errors, too. Nested use is fine. Every training forward of a norm starts from the buffers before the
    block, so that the steps of an attack do not enter each other's statistics. The moments of a context set, and the
    estimates of a recalibration inside the block, last to its end. Buffers passed by
    `torch.func.functional_call` are not held: a training forward inside starts from the norm's own buffers, and the
    moved buffers stand in the dictionary afterwards. Compiled networks run uncompiled inside.
    """
    norms = [norm for _, norm in norm_modules(net)]
    modules = [part for norm in norms for part in norm.modules()]
    buffers = [dict(module._buffers) for module in modules]
    # copied: a layer may hand out the very object that it goes on to change
    extra = [_copied(module.get_extra_state()) if _has_extra_state(module) else None for module in modules]
    handles: list[Any] = []
    for norm in norms:
        _pause(norm, 1)
    try:
        for module in modules:
            for name, value in module._buffers.items():
                module._buffers[name] = None if value is None else value.clone()
        for norm in norms:
            if norm.norm_info.keeps_stats and "context" not in norm.norm_info.needs:  # type: ignore[union-attr, operator]
                handles.append(norm.register_forward_pre_hook(_Afresh(norm, dict(zip(modules, buffers, strict=True)))))
        with _uncompiled():
            yield
    finally:
        for handle in handles:
            handle.remove()
        for norm in norms:
            _pause(norm, -1)
        for module, kept, state in zip(modules, buffers, extra, strict=True):
            module._buffers.clear()
            module._buffers.update(kept)
            if _has_extra_state(module):
                module.set_extra_state(state)


def _uncompiled() -> contextlib.AbstractContextManager[Any]:
    """Within the block networks run as they are written: a compiled one calls no hook that came after compiling."""
    if "torch._dynamo" not in sys.modules or torch.compiler.is_compiling():  # importing it takes two seconds
        return contextlib.nullcontext()
    stance: contextlib.AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance


def _pause(norm: nn.Module, by: int) -> None:
    telling = norm.__dict__.get("telling")
    if isinstance(telling, Telling):
        telling.paused += by


def _copied(state: Any) -> Any:
    # inside torch.func's transforms a tensor has no storage, which deepcopy asks for
    return state.clone() if isinstance(state, Tensor) else copy.deepcopy(state)


class _Afresh:
    """Before each training forward of a held norm: copies of the buffers as they were when the block began.

    A replica that DataParallel makes of the norm has hooks and, on the first device, buffers of the original: it gets
    copies of its own.
    """

    def __init__(self, norm: nn.Module, kept: dict[nn.Module, dict[str, Tensor | None]]):
        self.norm, self.kept = norm, [kept[part] for part in norm.modules()]

    def __call__(self, norm: nn.Module, inputs: Any) -> None:
        if not norm.training or "recalibrating" in norm.__dict__:  # norms.running sets that
            return
        kept = self.kept if norm is self.norm else [dict(part._buffers) for part in norm.modules()]
        for part, buffers in zip(norm.modules(), kept, strict=True):
            for name, value in buffers.items():
                part._buffers[name] = None if value is None else value.clone()

    def __deepcopy__(self, memo: Any) -> Callable[..., None]:
        return _do_nothing  # a copy made inside the block is not held


def _do_nothing(*args: Any) -> None:
    """The hook of a copy."""


def after_update(net: nn.Module, again: Callable[[], Any], progress: float) -> None:
    """Tell every norm that the weights were updated; call once after each optimizer step.

    Args:
        net: the network that was updated.
        again: forwards the step's batch once more; called only if a norm needs a second look, without gradient, with
            every other norm held and the random generators restored after it, so that the next draws of dropout or
            augmentation do not depend on the norm.
        progress: fraction of training that is done, in [0, 1]; schedules inside norms follow it.
    """
    looking = []
    for _, norm in norm_modules(net):
        following = hook(norm, AfterUpdate)
        if following is not None:
            following.after_update(progress)
        telling = norm.__dict__.get("telling")
        if isinstance(telling, Telling):
            telling.told()
        if "second_look" in norm.norm_info.needs:  # type: ignore[union-attr, operator]
            looking.append(norm)
    if looking:
        told = [norm.situation for norm in looking]
        with torch.no_grad(), contextlib.ExitStack() as stack:
            for device in {p.device for p in net.parameters()} | {torch.device("cpu")}:
                stack.enter_context(forked_generators(device))
            for _, norm in norm_modules(net):
                if norm not in looking:
                    stack.enter_context(hold(norm))
            for norm in looking:
                norm.situation = replace(norm.situation, again=True)  # type: ignore[type-var]
            try:
                again()
            finally:
                for norm, before in zip(looking, told, strict=True):
                    norm.situation = before


def predict(net: nn.Module, x: Tensor) -> Tensor:
    """The evaluation forward: logits (N, K) of `x` (N, C, *) with `net` in evaluation mode.

    One forward, unless a norm combines the branches of several domains (it has `branch_distance(x, domain)` and
    `num_domains`, as bne) and no domain is told: then every branch is forwarded, and the result is the logarithm of

        sum_d w_d softmax(logits_d),   w_d = (1 / W_d) / sum_e (1 / W_e),   W_d the sum of distances over such norms

    of forwards that are not compiled.

    Raises:
        ValueError: `net` is in training mode.
    """
    if net.training:
        raise ValueError("predict needs the network in evaluation mode; call net.eval() first")
    placing = [norm for _, norm in norm_modules(net) if hook(norm, BranchDistance) is not None]
    if not placing or placing[0].situation.domain is not None or _branches(placing[0]).num_domains == 1:  # type: ignore[union-attr]
        return net(x)
    return _combined(net, placing, x)


def _branches(norm: nn.Module) -> BranchDistance:
    """A norm that is known to have branches, as such."""
    return cast(BranchDistance, norm)


def _combined(net: nn.Module, placing: list[nn.Module], x: Tensor) -> Tensor:
    """Logarithms of the branches' weighted probabilities (N, K); see `predict`."""
    told = placing[0].situation
    assert isinstance(told, Situation)
    branches, closeness = [], []
    for domain in range(_branches(placing[0]).num_domains):
        found: list[Tensor] = []

        def look(norm: nn.Module, inputs: tuple[Tensor, ...], domain: int = domain, found: Any = found) -> None:
            found.append(_branches(norm).branch_distance(inputs[0], domain))

        handles = [norm.register_forward_pre_hook(look) for norm in placing]
        try:
            with situation(net, domain=domain, part=told.part), _uncompiled():
                logits = net(x)
        finally:
            for handle in handles:
                handle.remove()
        branches.append(torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), dim=1))
        # a sample that lies exactly on a domain would have a weight of inf / inf
        closeness.append(-torch.stack(found).sum(0).clamp(min=1e-30).log())
    weights = torch.log_softmax(torch.stack(closeness), dim=0)
    return torch.logsumexp(torch.stack(branches) + weights[:, :, None], dim=0)


@contextlib.contextmanager
def _told(net: nn.Module, new: Situation) -> Iterator[None]:
    norms = [norm for _, norm in norm_modules(net)]
    before = [norm.situation for norm in norms]
    shadowed = []
    for norm in norms:
        # `again` is after_update's own word, which may surround the block
        norm.situation = replace(new, again=norm.situation.again)  # type: ignore[assignment, arg-type, union-attr]
        info = norm.norm_info
        assert isinstance(info, NormInfo)
        mixes = info.mixes_samples or info.mixes_samples_in_eval
        one_by_one = new.slices > 1 and not info.slices_at_once
        if mixes and (one_by_one or new.workers is not None) and "forward" not in norm.__dict__:
            shadow_forward(norm, _AsTold)
            shadowed.append(norm)
    try:
        yield
    finally:
        for norm in shadowed:
            unshadow_forward(norm)
        for norm, old in zip(norms, before, strict=True):
            norm.situation = old


def shadow_forward(norm: nn.Module, shadow: Callable[[nn.Module], Callable[..., Tensor]]) -> None:
    """Hide the class's forward on this instance, and on replicas of it, by the callable that `shadow(instance)` makes.

    DataParallel copies a module's attributes into its replicas; without a word the replica's forward would be that of
    the original, on the original's weights.
    """
    norm.__dict__["forward"] = shadow(norm)
    norm.__dict__["_replicate_for_data_parallel"] = _Replicating(norm, shadow)


def unshadow_forward(norm: nn.Module) -> dict[str, Any]:
    """Take back `shadow_forward`, if any. Returns the attributes that were taken away."""
    names = ("forward", "_replicate_for_data_parallel")
    return {name: norm.__dict__.pop(name) for name in names if name in norm.__dict__}


class _Replicating:
    def __init__(self, norm: nn.Module, shadow: Callable[[nn.Module], Callable[..., Tensor]]):
        self.norm, self.shadow = norm, shadow

    def __call__(self) -> nn.Module:
        replica = type(self.norm)._replicate_for_data_parallel(self.norm)
        unshadow_forward(replica)
        shadow_forward(replica, self.shadow)
        return replica


def _admit(net: nn.Module, workers: Workers) -> bool:
    """Whether norms of `net` mix samples, so that workers speak to each other; ValueError where one can not."""
    mixing = False
    for _, norm in norm_modules(net):
        mixing = mixing or norm.norm_info.mixes_samples  # type: ignore[union-attr, assignment]
        why = refusal(norm, workers)
        if why is not None:
            raise ValueError(why)
        if "recalibrating" in norm.__dict__:
            raise ValueError("recalibrate is called on every worker alike, with all batches and without its workers")
    return mixing


class _AsTold:
    """A norm's forward, called once per norm batch where the layer does not look for slices itself; and what it gives
    to `track` taken in with what the other workers' do. The norm's situation and mode are read when it is called."""

    def __init__(self, norm: nn.Module):
        self.norm, self.forward = norm, norm.forward

    def __call__(self, x: Tensor, **inputs: Any) -> Tensor:
        told, info = self.norm.situation, self.norm.norm_info
        assert isinstance(told, Situation)
        assert isinstance(info, NormInfo)
        mixes = info.mixes_samples if self.norm.training else info.mixes_samples_in_eval
        if not mixes or info.slices_at_once or told.slices == 1:
            return self._forward(x, told.slices if info.slices_at_once else None, inputs)
        check_slices(x, told.slices)
        parts = []
        try:
            for k in range(told.slices):
                domain = told.domain[k :: told.slices] if isinstance(told.domain, Tensor) else told.domain
                self.norm.situation = replace(told, domain=domain, slices=1)
                parts.append(self._forward(x[k :: told.slices], None, inputs))
        finally:
            self.norm.situation = told
        return torch.stack(parts, dim=1).reshape(x.shape)

    def _forward(self, x: Tensor, slices: int | None, inputs: dict[str, Any]) -> Tensor:
        """One call of the norm's own forward; `slices`: norm batches that it looks for itself."""
        norm, told = self.norm, self.norm.situation
        assert isinstance(told, Situation)
        workers = told.workers
        if workers is None or not norm.training or not norm.norm_info.mixes_samples:  # type: ignore[union-attr]
            return self.forward(x, **inputs)
        if torch.compiler.is_compiling() or transformed():
            raise RuntimeError(
                f"{type(norm).__name__} speaks to other workers, so it does not train inside torch.func's transforms, "
                "forward-mode derivatives or a graph of torch.compile"
            )
        before = own_buffers(norm)
        y = self._tracked(x, workers, slices, inputs)
        if (why := moved(norm, before)) is not None:
            raise ValueError(why)
        return y

    def _tracked(self, x: Tensor, workers: Workers, slices: int | None, inputs: dict[str, Any]) -> Tensor:
        """The norm's own forward, what it gives to `track` taken in with what the other workers' do."""
        norm = self.norm
        if not isinstance(norm, RunningStatistics) or norm.running_mean is None:
            return self.forward(x, **inputs)
        given: list[Any] = []
        norm.__dict__["track"] = _Collecting(given)
        try:
            y = self.forward(x, **inputs)
        finally:
            del norm.__dict__["track"]
        norm.take_in(given, workers, x, slices)
        return y


class _Collecting:
    """Stands in for `track` for the length of one forward."""

    def __init__(self, given: list[Any]):
        self.given = given

    def __call__(self, mean: Tensor, var: Tensor, count: Any) -> None:
        self.given.append((mean, var, count))


def check_slices(x: Tensor, slices: int) -> int:
    """The size of one norm batch of x (N, ...); ValueError where `slices` does not divide N."""
    if x.shape[0] % slices:
        raise ValueError(f"a batch of {x.shape[0]} does not split into {slices} norm batches of equal size")
    return x.shape[0] // slices


def _has_extra_state(module: nn.Module) -> bool:
    return type(module).get_extra_state is not nn.Module.get_extra_state
