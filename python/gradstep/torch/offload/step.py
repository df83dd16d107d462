"""One step: chunk by chunk, while the next gradients come down and the last parameters go up."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch._compile import _disable_dynamo

from gradstep import _core
from gradstep.kernel import Kernel
from gradstep.saved import NUMBERS
from gradstep.stats import Numbers, Seen, make_stats
from gradstep.torch.offload import tensors
from gradstep.torch.offload.parts import Chunk, Piece, Upload
from gradstep.torch.offload.sums import Found, look
from gradstep.torch.one_sweep import _kernel, _keys_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from gradstep.torch.offload.optimizer import Offloaded

# A tensor is cut at multiples of this many elements: blocks of compressed states stay whole.
_UNIT = 1024

# Stages that look at an element and nothing beside it, so that a tensor may be swept over in pieces.
_BY_ELEMENT = frozenset(
    {
        "scale",
        "zero_nonfinite",
        "clip_value",
        "seed",
        "precision",
        "coupled_decay",
        "decoupled_decay",
        "independent_decay",
        "elastic_net",
        "bounds",
        "lookahead",
        "ema",
        "swa",
    }
)

# Stages that change what `clip_norm` goes by, after the gradient has been scaled.
_BEFORE_CLIPPING = ("clip_value", "agc", "clip_norm_per_tensor")

# Stages between the gradient as it came and the rule, other than factors.
_CHANGING = frozenset({"zero_nonfinite", "clip_value", "agc", "centralize", "noise"})

# Those that draw random numbers, or change the order of the elements.
_IN_ORDER = frozenset({"noise", "stochastic_states"})


class BrokenStepError(RuntimeError):
    """A step failed when a part of it had been carried out. The message says which parameters have been updated."""


def take_step(optimizer: Offloaded, closure: Callable[[], Any] | None, grad_scale: float, stats: bool) -> Any:
    """Perform one step: see `Offloaded.step`."""
    loss = None
    try:
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        seen = _carry_out(optimizer, grad_scale, stats)
    except BaseException:
        # GradScaler will not hear the end of this step, and would leave its scale to the next.
        for name in ("grad_scale", "found_inf"):
            vars(optimizer).pop(name, None)
        raise
    if not stats or seen is None:
        return loss
    number = optimizer.steps + (not seen[0])
    made = make_stats(lambda: number, _keys_of(optimizer._inner), seen)
    return made if closure is None else (loss, made)


uncompiled_step = _disable_dynamo(take_step)


def _carry_out(optimizer: Offloaded, grad_scale: float, stats: bool) -> Seen | None:
    optimizer._refuse_broken("step")
    loss_scale, found_inf = getattr(optimizer, "grad_scale", None), getattr(optimizer, "found_inf", None)  # of GradScaler
    if loss_scale is not None:
        grad_scale = float(grad_scale) / float(loss_scale)
    overflow = found_inf is not None and float(found_inf) != 0
    if overflow and not stats:
        if optimizer.zeroes_grad:
            optimizer.zero_grad(set_to_none=False)
        return None
    with torch.no_grad():
        carried_out, seen = _Step(optimizer, grad_scale, stats=stats, overflow=overflow).run()
    optimizer.steps += carried_out
    return seen


class _Step:
    """One step: what it finds, in the order in which it looks."""

    def __init__(self, owner: Offloaded, grad_scale: float, *, stats: bool, overflow: bool) -> None:
        self._owner, self._inner, self._mirrors = owner, owner._lend(), owner._mirrors
        self._name = f"{tensors.name(self._inner)}.step"
        self._stats, self._overflow = stats, overflow
        self._clip_norm, self._on_nonfinite = owner.clip_norm, owner.on_nonfinite
        self._inner._conditions(stats=stats)  # refuses what they can't be
        self._scale = grad_scale
        self._groups = self._make_groups(grad_scale)
        self._fresh: dict[int, dict[str, Any]] = {}  # states of parameters that had none
        self._by_copy = {id(mirror.copy): i for i, mirror in enumerate(self._mirrors)}
        self._grads = self._take_gradients()
        owner._pull(self._mirrors[i] for i in self._grads)
        self._uploads = [mirror.sent for mirror in self._mirrors]  # of earlier steps: they read what this one writes
        operands = self._check_operands()
        self._is_checked = None if self._fresh else operands
        self._chunks = self._cut()
        self._lines = {chunk.device: owner._line(chunk.device) for chunk in self._chunks}
        self._make_room()
        self._clip_factor = 1.0
        self._written = 0  # chunks
        self._seen: dict[int, Numbers] = {}

    def run(self) -> tuple[bool, Seen | None]:
        """Carry the step out, or leave it out. Return whether it was, and what was seen of it, if that was asked for."""
        ahead = self._owner._n_buffers
        upload = Upload(self._owner, (self._mirrors[i] for i in self._grads))
        try:
            for line in self._lines.values():
                line.begin()
            for k in range(min(ahead, len(self._chunks))):
                self._fetch(k)
            found = self._look()
            skipped = self._overflow or (
                self._on_nonfinite in ("skip", "raise") and not all(f.is_finite for f in found.values())
            )
            if not skipped:
                self._clip(found)
                for k, chunk in enumerate(self._chunks):
                    chunk.fetched.synchronize()
                    self._sweep(k)
                    self._send(chunk, upload)
                    if k + ahead < len(self._chunks):
                        self._fetch(k + ahead)
        except BaseException as error:
            if self._written:
                self._break_off(error)
            raise
        finally:
            for line in self._lines.values():
                line.finish()
            if self._written:
                upload.end()
        if skipped and self._on_nonfinite == "raise" and not self._overflow:
            first = next(i for i, each in found.items() if not each.is_finite)
            raise FloatingPointError(f"{self._name}: params[{first}].grad has an element that is not finite")
        if self._owner.zeroes_grad:
            for i in self._grads:
                grad = self._mirrors[i].param.grad
                if grad is not None:
                    grad.zero_()
        if not skipped:
            self._owner._checked = self._is_checked or self._operands()
        return not skipped, self._report(found, skipped) if self._stats else None

    # ---- before anything is written ---------------------------------------------------------------------------------------

    def _make_groups(self, grad_scale: float) -> list[tuple[int, Kernel]]:
        groups = [(len(group["params"]), _kernel(self._inner, group, grad_scale)) for group in self._inner.param_groups]
        plan = _core.Plan(self._name, _core.Face.torch)
        plan.step([], None, [], {}, [(0, kernel) for _, kernel in groups], self._inner._make_state)  # refuses settings
        if self._clip_norm is not None:
            for _, kernel in groups:
                for stage in kernel.stages:
                    if stage[0] in _BEFORE_CLIPPING:
                        raise ValueError(
                            f"{self._name}: clip_norm together with {stage[0]} is not supported by an offloaded optimizer: it takes "
                            "the norm of the gradients as they are"
                        )
        return groups

    def _kernel_of(self, index: int) -> Kernel:
        return self._groups[self._mirrors[index].group][1]

    def _take_gradients(self) -> dict[int, torch.Tensor]:
        """Return the gradients that there are, on the device, of one dimension, in the order of the copies' memory."""
        grads: dict[int, torch.Tensor] = {}
        moved = False
        for i, mirror in enumerate(self._mirrors):
            param, grad = mirror.param, mirror.param.grad
            if grad is None:
                continue
            if param.dtype != mirror.copy.dtype or param.shape != mirror.copy.shape:
                ours, theirs = tensors.describe(param), tensors.describe(mirror.copy)
                raise ValueError(f"{self._name}: params[{i}] is {ours}, and was {theirs} when it was offloaded")
            if grad.layout != torch.strided or tensors.is_wrapper(grad):
                what = "sparse" if grad.layout != torch.strided else f"a {type(grad).__name__}"
                raise ValueError(f"{self._name}: params[{i}].grad is {what}: an offloaded optimizer takes dense gradients")
            moved = moved or mirror.known is None or mirror.known[0] != param.data_ptr()
            is_dense = grad.stride() == mirror.copy.stride() and not tensors.is_lazy(grad)
            grads[i] = tensors.flat(grad if is_dense else tensors.laid_out(grad, mirror.copy))
        if moved:
            tensors.check_params(self._owner._params(), self._name)
        return grads

    def _state(self, index: int) -> dict[str, Any] | None:
        """Return the states of a parameter that has some."""
        return self._owner.state.get(self._mirrors[index].param)

    def _operands(self) -> Any:
        """Return what makes operands right or wrong."""
        stages = [
            (kernel.rule.name, [stage[:2] if stage[0] == "precision" else stage[0] for stage in kernel.stages])
            for _, kernel in self._groups
        ]
        return stages, [
            (i, self._mirrors[i].copy.data_ptr(), grad.dtype, tensors.signature(self._state(i)))
            for i, grad in self._grads.items()
        ]

    def _check_operands(self) -> Any:
        """Refuse operands that can't be stepped over, all of them before the first is. Make states that are missing."""
        operands = self._operands()
        if operands == self._owner._checked:
            return operands
        grads: list[torch.Tensor | None] = [None] * len(self._mirrors)
        for i, grad in self._grads.items():
            grads[i] = torch.zeros((), dtype=grad.dtype).expand(self._mirrors[i].copy.shape)
        states = {i: state for i in self._grads if (state := self._state(i)) is not None}
        plan = _core.Plan(self._name, _core.Face.torch, self._inner.counts_steps)
        copies = [mirror.copy for mirror in self._mirrors]
        left_out = (None, "leave out", False, False, None)
        plan.step(copies, grads, [*range(len(copies))], states, self._groups, self._make_state, left_out)
        return operands

    def _make_state(self, group: int, param: torch.Tensor, names: list[str]) -> dict[str, Any]:
        made = self._inner._make_state(group, param, names)
        self._fresh.setdefault(self._by_copy[id(param)], {}).update(made)
        return made

    def _cut(self) -> list[Chunk]:
        """Return the chunks: tensors in their order, large ones in pieces."""
        chunks: list[Chunk] = []
        limit = self._owner._chunk_bytes
        for i, grad in self._grads.items():
            device, item, size = grad.device, grad.element_size(), grad.numel()
            longest = max(_UNIT, limit // item // _UNIT * _UNIT)
            is_whole = size <= longest or not self._is_by_element(i)
            for start in (0,) if is_whole else range(0, size, longest):
                stop = size if is_whole else min(start + longest, size)
                nbytes = tensors.padded(grad[start:stop])
                last = chunks[-1] if chunks else None
                if (
                    last is None
                    or last.device != device
                    or last.nbytes + nbytes > limit
                    or any(piece.index == i for piece in last.pieces)
                ):
                    last = Chunk(device)
                    chunks.append(last)
                last.pieces.append(Piece(i, start, stop, is_whole))
                last.offsets.append(last.nbytes)
                last.nbytes += nbytes
        return chunks

    def _is_by_element(self, index: int) -> bool:
        """Whether a parameter may be stepped over piece by piece: the bits are then those of one step over all of it."""
        for stage in self._kernel_of(index).stages:
            if stage[0] not in _BY_ELEMENT or (stage[0] == "precision" and stage[1] == tensors.STOCHASTIC):
                return False
        mirror = self._mirrors[index]
        states = {**(self._state(index) or {}), **self._fresh.get(index, {})}
        for name, value in states.items():
            if name in NUMBERS or not isinstance(value, torch.Tensor):
                continue
            if tensors.is_compressed(name, states):
                if not mirror.copy.is_contiguous():
                    return False
            elif value.shape != mirror.copy.shape or value.stride() != mirror.copy.stride():
                return False
        return True

    def _make_room(self) -> None:
        """See that there are buffers for the gradients."""
        for device, line in self._lines.items():
            needed = max(chunk.nbytes for chunk in self._chunks if chunk.device == device)
            for k in range(min(self._owner._n_buffers, len(self._chunks))):
                there = self._owner._buffers.get((device, k))
                if there is not None and there.numel() >= needed:
                    continue
                if there is not None:
                    line.fetched().synchronize()  # a step that was left out may have copies on their way
                self._owner._buffers[device, k] = line.memory(needed)

    # ---- chunk by chunk ---------------------------------------------------------------------------------------------------

    def _gradients(self, k: int) -> list[torch.Tensor]:
        """Return where the gradients of a chunk lie on the host, of one dimension."""
        chunk = self._chunks[k]
        buffer = self._owner._buffers[chunk.device, k % self._owner._n_buffers]
        places = []
        for piece, offset in zip(chunk.pieces, chunk.offsets, strict=True):
            grad = self._grads[piece.index]
            nbytes = (piece.stop - piece.start) * grad.element_size()
            places.append(buffer[offset : offset + nbytes].view(grad.dtype))
        return places

    def _fetch(self, k: int) -> None:
        chunk = self._chunks[k]
        line = self._lines[chunk.device]
        for piece, place in zip(chunk.pieces, self._gradients(k), strict=True):
            tensors.fetch(line, place, self._grads[piece.index][piece.start : piece.stop])
        chunk.fetched = line.fetched()

    def _clip(self, found: Mapping[int, Found]) -> None:
        if self._clip_norm is None:
            return
        total = 0.0
        for each in found.values():
            total += each.squares
        self._clip_factor = _core.clip_factor(float(self._clip_norm), math.sqrt(total))
        if not math.isnan(self._clip_factor) and self._clip_factor != 1:
            self._groups = self._make_groups(self._scale * self._clip_factor)

    def _sweep(self, k: int) -> None:
        """Step over a chunk, and enter what has come of it into the states."""
        chunk = self._chunks[k]
        params = [mirror.copy for mirror in self._mirrors]
        grads: list[torch.Tensor | None] = [None] * len(params)
        states: dict[int, dict[str, Any]] = {}
        pieces: dict[int, Piece] = {}  # by parameter as the plan sees it
        for piece, place in zip(chunk.pieces, self._gradients(k), strict=True):
            i, mirror = piece.index, self._mirrors[piece.index]
            self._uploads[i].synchronize()
            if math.isnan(self._clip_factor):
                place.fill_(math.nan)
            state = self._state(i)
            if not piece.is_whole:
                params[i] = tensors.flat(mirror.copy)[piece.start : piece.stop]
            grads[i] = tensors.shaped(place, mirror.copy) if piece.is_whole else place
            pieces[id(params[i])] = piece
            if state is not None:
                states[i] = state if piece.is_whole else tensors.part(state, piece, mirror.copy)

        def make_part(group: int, param: torch.Tensor, names: list[str]) -> dict[str, Any]:
            piece = pieces[id(param)]
            whole = self._fresh.get(piece.index, {})
            if not whole.keys() >= set(names):
                whole = self._make_state(group, self._mirrors[piece.index].copy, names)
            return whole if piece.is_whole else tensors.part(whole, piece, self._mirrors[piece.index].copy)

        conditions = (None, "propagate", True, False, None) if self._stats else None
        self._written = k + 1  # an interrupt may come as soon as it is
        try:
            seen = self._owner._plan.step(params, grads, [*range(len(params))], states, self._groups, make_part, conditions)
        except Exception:
            self._written = k
            raise
        for numbers in seen[2] if isinstance(seen, tuple) else ():
            before = self._seen.get(numbers[0])
            self._seen[numbers[0]] = numbers if before is None else _together(before, numbers)
        for piece in chunk.pieces:
            self._commit(piece, states.get(piece.index, {}))

    def _commit(self, piece: Piece, stepped: dict[str, Any]) -> None:
        """Enter new states and counts of a parameter that has been stepped over to its end."""
        i, mirror = piece.index, self._mirrors[piece.index]
        if piece.stop < mirror.copy.numel():
            return
        state = self._state(i)
        if piece.is_whole:
            if state is None and stepped:
                self._owner.state[mirror.param] = stepped
            return
        whole = state if state is not None else {}
        whole.update(self._fresh.get(i, {}))
        for name in NUMBERS.keys() & stepped.keys():
            value, place = stepped[name], whole.get(name)
            if isinstance(value, torch.Tensor) and isinstance(place, torch.Tensor):
                place.copy_(value)
            else:
                whole[name] = value
        if whole and state is None:
            self._owner.state[mirror.param] = whole

    def _send(self, chunk: Chunk, upload: Upload) -> None:
        for piece in chunk.pieces:
            upload.send(self._mirrors[piece.index], piece.start, piece.stop)
        sent = self._lines[chunk.device].sent()
        for piece in chunk.pieces:
            self._mirrors[piece.index].sent = sent

    def _break_off(self, error: BaseException) -> None:
        """Say how far the step has come, now and to whoever wants to go on."""
        written = self._written
        touched = {piece.index for chunk in self._chunks[:written] for piece in chunk.pieces}
        left = {piece.index for chunk in self._chunks[written:] for piece in chunk.pieces}
        partly = "".join(f", params[{i}] in part" for i in sorted(touched & left))
        what = (
            f"a step broke off after {written} of {len(self._chunks)} chunks: {len(touched - left)} of {len(self._grads)} parameters "
            f"have been updated{partly}; load a state dict, and the parameters that go with it"
        )
        self._owner._broken = what
        for i in self._grads:
            self._mirrors[i].known = None
        if isinstance(error, Exception):
            raise BrokenStepError(f"{self._name}: {what}") from error

    # ---- norms and statistics ---------------------------------------------------------------------------------------------

    def _look(self) -> dict[int, Found]:
        """Return what has to be known of all gradients before the first chunk is swept over, as far as anything has."""
        if self._clip_norm is None and self._on_nonfinite not in ("skip", "raise") and not self._overflow:
            return {}
        return look(
            {i: self._in_order(i) for i in self._grads},
            wide={i for i in self._grads if self._is_wide(i)},
            scale=self._scale,
            drops=self._on_nonfinite == "zero",
            counts=self._stats,
        )

    def _in_order(self, index: int) -> torch.Tensor:
        """Return a gradient in the order in which its sums are taken."""
        grad, mirror = self._grads[index], self._mirrors[index]
        stages = self._kernel_of(index).stages
        states = {**(self._state(index) or {}), **self._fresh.get(index, {})}
        in_order = any(stage[0] in _IN_ORDER or stage[:2] == ("precision", tensors.STOCHASTIC) for stage in stages) or any(
            tensors.is_compressed(name, states) for name in states
        )
        if in_order and not mirror.copy.is_contiguous():
            grad = tensors.shaped(grad, mirror.copy).reshape(-1)
        return torch.view_as_real(grad).reshape(-1) if grad.is_complex() else grad

    def _is_wide(self, index: int) -> bool:
        """Whether a parameter is stepped over in float64."""
        states = {**(self._state(index) or {}), **self._fresh.get(index, {})}
        arrays = [value for name, value in states.items() if name not in NUMBERS and isinstance(value, torch.Tensor)]
        return any(array.dtype in (torch.float64, torch.complex128) for array in (self._mirrors[index].copy, *arrays))

    def _report(self, found: Mapping[int, Found], skipped: bool) -> Seen:
        """Return the statistics, as a plan does."""
        each = []
        for i in self._grads:
            if skipped:
                copy = self._mirrors[i].copy
                size = copy.numel() * (2 if copy.is_complex() else 1)
                square = _core.sum_of_squares([copy], self._name, "params")
                numbers: Numbers = (i, size, 1.0, 0.0, 0.0, 0.0, square, 0.0, 0.0, 0.0, 0.0)
            else:
                numbers = self._seen[i]
            if i in found:
                index, size, factor, _, rule, update, param, *_ = numbers
                came = found[i]
                if not skipped:
                    factor *= self._clip_factor
                    if not any(stage[0] in _CHANGING for stage in self._kernel_of(i).stages):
                        rule = factor * factor * came.came
                numbers = (index, size, factor, came.came, rule, update, param, came.largest, came.nans, came.infs, came.zeros)
            each.append(numbers)
        total: Numbers = (-1, 0, 1.0 if skipped else self._clip_factor, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
        for numbers in each:
            total = _together(total, numbers)
        return not skipped, total, each


def _together(one: Numbers, other: Numbers) -> Numbers:
    """Return the statistics of two that are looked at as one, under the first one's name."""
    index, size, factor, came, rule, update, param, largest, nans, infs, zeros = one
    _, more, _, *sums, other_largest, other_nans, other_infs, other_zeros = other
    largest = largest if largest >= other_largest or math.isnan(largest) else other_largest
    came, rule, update, param = (a + b for a, b in zip((came, rule, update, param), sums, strict=True))
    return (
        index,
        size + more,
        factor,
        came,
        rule,
        update,
        param,
        largest,
        nans + other_nans,
        infs + other_infs,
        zeros + other_zeros,
    )
