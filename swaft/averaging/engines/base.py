"""What an engine adapter answers: which master elements this rank owns, where they lie, how forwards see them.

An adapter knows its engine and nothing about rules. It offers two lists of flat tensors of the same geometry: the
fp32 *masters* that the optimizer updates, and the *working* weights that forwards use. If the model trains in fp32,
the two are the same tensors.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from swaft.averaging.engines.steps import fills_state, hook_weakly
from swaft.averaging.layout import Fragment, Span, check_coverage, clean_name, cut, merge, section
from swaft.averaging.swap import Swap, rescales, swap_of
from swaft.distributed import shared_ranks
from swaft.errors import AveragingError, LayoutError

PIECE = 1 << 23
"""Number of elements sent, copied or compared at a time: 32 MiB in fp32, so that a piece and its copy take 64."""
TRAINS = attrgetter("requires_grad")


class Engine(ABC):
    """The master weights of one training engine, as seen from one rank.

    Creating one is collective: the ranks agree on their layout and prove it (:meth:`prove_layout`).

    Args:
        name: name of the engine, such as ``deepspeed-zero3``.
        module: the unwrapped model.
        inner_optimizers: the torch optimizers whose steps write the masters; ZeRO calls its one once per buffer.
        steps_seen: returns the number of steps that changed the weights, as counted by DeepSpeed or by a hook on
            the optimizer.
    """

    lends_storage: bool = False
    """Whether the engine may free the masters' storage between events, so that nothing else may keep it alive."""
    fragments: list[Fragment]
    """The elements this rank owns, in shard order."""
    swap: Swap
    """What currently replaces the working weights, if anything (see `swaft.averaging.swap`)."""
    known_sum: str | None = None
    """The sum of the bits of the last weights, while they are known to stay the same (`swaft.averaging.state`)."""
    outer: Any
    """The object whose forward is called: the model, or DeepSpeed's engine around it."""
    hands_out: tuple[str, ...] = ()
    """Methods of `outer` that read or replace the weights without the model's own `state_dict`."""
    state_names: tuple[str, ...]
    """Clean names of the model's state dict, including aliases of tied weights and persistent buffers."""

    def __init__(
        self,
        name: str,
        module: nn.Module,
        inner_optimizers: Sequence[torch.optim.Optimizer],
        steps_seen: Callable[[], int],
    ):
        self.name = name
        self.module = self.outer = module
        self.inner_optimizers = tuple(inner_optimizers)
        self.ranks = shared_ranks()
        self._steps_seen, self._steps_before = steps_seen, 0
        self._attached_with: tuple[int, int] | None = None
        self._first_step, self._proved = 0, False
        self._changed_before_step = False
        self.swap = swap_of(module)
        if self.swap.active:
            raise AveragingError(
                "averaged weights are swapped in; expected to be attached outside `swapped_in()`"
            )
        self.swap.let_readers_finish()  # an older averager's, whose optimizer may not be the one that steps now
        self._frozen = [parameter for parameter in module.parameters() if not parameter.requires_grad]
        self.state_names = tuple(clean_name(name) for name in module.state_dict())
        self.before_steps(self._before_step)

    @abstractmethod
    def masters(self) -> list[Tensor]:
        """The fp32 master buffers, flat, as now. Unless `lends_storage`, the same list while none has moved."""

    @abstractmethod
    def working(self) -> list[Tensor]:
        """The working weights, flat, in the geometry of :meth:`masters`."""

    @abstractmethod
    def publish(self) -> None:
        """Make the next forward on every rank see what the ranks wrote into :meth:`working` (collective)."""

    def applied_steps(self) -> int:
        """Optimizer steps that really changed the weights: neither micro-batches nor skipped steps.

        Raises:
            AveragingError: another optimizer trains the weights now, and a newer averager is attached to it.
        """
        if self.superseded:
            raise AveragingError(
                "the weights are trained by another optimizer now, and a newer averager is attached to it, so this "
                "averager takes in nothing more; call `step()` of the newer one (what this one has averaged can "
                "still be read)"
            )
        return self._steps_before + self._steps_seen()

    @property
    def superseded(self) -> bool:
        """Whether another optimizer trains the weights now, and a newer averager is attached to it."""
        return getattr(self._steps_seen, "superseded", False)  # DeepSpeed counts by itself

    def continue_from(self, step: int) -> None:
        """Count the current weights as those after ``step`` optimizer steps: a run resumes here."""
        self._steps_before, self._attached_with = step - self._steps_seen(), None
        self._first_step, self._proved = step, False
        self._changed_before_step = False

    def watch_weights(self) -> None:
        """From now on, notice weights that change although no step was seen."""
        if not rescales(self.module):
            self._attached_with = self._steps_seen(), self.sum_of_working()

    def full_shape(self, parameter: nn.Parameter) -> torch.Size:
        """Shape of the whole parameter, even if this rank holds only part of it."""
        return parameter.shape

    def before_steps(self, method: Callable[..., None]) -> None:
        """Call a bound method before every step of an optimizer, while its object lives (`hook_weakly`)."""
        for optimizer in self.inner_optimizers:
            hook_weakly(optimizer.register_step_pre_hook, method)

    def stop(self) -> None:
        """Averaging has ended: from now on, other optimizers may train the weights."""
        getattr(self._steps_seen, "stop", lambda: None)()  # DeepSpeed counts by itself, refuses none

    def release_gathered(self) -> None:  # noqa: B027 (most engines gather nothing)
        """Drop full copies gathered from shards, so that none survives a change of the shards."""

    def gather_working(self, parameter: nn.Parameter) -> Tensor:
        """The whole parameter, as forwards see it, on every rank (collective if the engine shards it)."""
        return parameter.detach()

    def named_parameters(self, *, aliases: bool = False) -> Iterator[tuple[str, nn.Parameter]]:
        """Every parameter of the model with its clean name; tied ones once, or under each name with ``aliases``."""
        for name, parameter in self.module.named_parameters(remove_duplicate=not aliases):
            yield clean_name(name), parameter

    def canonical_names(self) -> dict[str, str]:
        """Maps each name of a parameter to its first name: tied parameters have several."""
        first = {id(parameter): name for name, parameter in self.named_parameters()}
        return {name: first[id(parameter)] for name, parameter in self.named_parameters(aliases=True)}

    @cached_property
    def trainable(self) -> dict[str, nn.Parameter]:
        """Every parameter that training changes, by its clean name."""
        return {
            name: parameter
            for name, parameter in self.named_parameters()
            if parameter.requires_grad and self.full_shape(parameter).numel() > 0
        }

    def name_of(self, parameter: nn.Parameter) -> str:
        """Clean name of a parameter that the optimizer trains.

        Raises:
            LayoutError: the parameter does not belong to the model.
        """
        if id(parameter) not in self._names:
            shape = tuple(self.full_shape(parameter))
            raise LayoutError(
                f"the optimizer holds a parameter of shape {shape} that the model does not; expected the model's "
                "own parameters: build the optimizer after the last change to the model, put whatever else it "
                "trains (a loss with weights) into the model, and under ZeRO-3 compile the whole model or nothing"
            )
        return self._names[id(parameter)]

    @cached_property
    def _shapes(self) -> dict[str, torch.Size]:
        return {name: self.full_shape(parameter) for name, parameter in self.trainable.items()}

    @cached_property
    def _names(self) -> dict[int, str]:
        return {id(parameter): name for name, parameter in self.trainable.items()}

    @cached_property
    def spans(self) -> list[Span]:
        """The shard as a few long runs of the master buffers."""
        return merge(self.fragments)

    @property
    def inner_optimizer(self) -> torch.optim.Optimizer:
        """The torch optimizer that ends a step: the only one, or the last of several."""
        return self.inner_optimizers[-1]

    @property
    def device(self) -> torch.device:
        """Where the masters are; the host if there are none."""
        return next((master.device for master in self.masters()), torch.device("cpu"))

    @property
    def numel(self) -> int:
        """Elements this rank owns."""
        return sum(fragment.numel for fragment in self.fragments)

    def prove_layout(self) -> None:
        """Prove that the fragments are correct: every element is owned once, and every owned working weight is, bit
        for bit, a cast of its master (collective).

        Raises:
            LayoutError: on every rank; names the parameter.
        """
        fragments = self.ranks.gather(self.fragments)
        self.check_shapes()
        check_coverage(fragments, {name: shape.numel() for name, shape in self._shapes.items()})
        self.ranks.raise_together(self.misplaced())

    def prove_member(self, step: int, *, is_first: bool) -> None:
        """Refuse to average the weights after a step if they are not those that were attached to.

        The layout is proved once more at the first event after a step (collective): by then, the optimizer has
        written to the masters.

        Args:
            step: the applied step.
            is_first: whether no rule has a member yet.

        Raises:
            LayoutError: a parameter has become trainable, or a working weight is not a cast of its master.
            AveragingError: the first member is weights that were replaced before the first step.
        """
        if any(map(TRAINS, self._frozen)):
            self.check_trainable()
        if not self._proved and step > self._first_step:
            with self.ranks.together():
                if self._changed_before_step and not is_first:
                    raise AveragingError(
                        "the weights were replaced (load_state_dict, say) after the averager was attached and "
                        "before the first step, so the first member of the average is not what was trained; load "
                        "weights before the averager is attached, or load the averages that belong to them "
                        "(averager.load_state)"
                    )
            self.prove_layout()
            self._proved = True

    def check_trainable(self) -> None:
        """Refuse a model that trains other parameters than it did at attach: the average would mix in unaveraged
        weights.

        Raises:
            LayoutError: a parameter became trainable, was replaced, or is gone; names it.
            AveragingError: the weights have changed but no optimizer step was seen.
        """
        held = dict(self.named_parameters())
        if gone := self.trainable.keys() - held.keys():
            raise LayoutError(
                f"{min(gone)!r} was there when the averager was attached, and is gone; attach a new averager "
                "after the model is changed (adapters merged and unloaded, say)"
            )
        for name, parameter in held.items():
            if name in self.trainable and parameter is not self.trainable[name]:
                raise LayoutError(
                    f"{name!r} is another parameter than the one that was there when the averager was attached; "
                    "attach a new averager after parameters are replaced (load_state_dict with assign=True "
                    "replaces them)"
                )
            if parameter.requires_grad and name not in self.trainable and self.full_shape(parameter).numel():
                raise LayoutError(
                    f"{name!r} became trainable after the averager was attached, so it is not in the average; "
                    "attach the averager after the last parameter is unfrozen"
                )
        self.check_shapes()
        if self._attached_with is None or self.swap.active:
            return
        steps, bits = self._attached_with
        if steps == self._steps_seen() and bits != self.sum_of_working():
            raise AveragingError(
                "the weights have changed since the averager was attached, but no optimizer step was seen, so "
                "nothing was averaged: steps inside a replayed CUDA graph cannot be seen. Call `optimizer.step()` "
                "outside of the graph, and load weights before the averager is attached"
            )

    def check_shapes(self) -> None:
        """Refuse parameters that were resized in place, of which the fragments no longer cover every element.

        Raises:
            LayoutError: names the parameter.
        """
        for name, parameter in self.trainable.items():
            found, known = tuple(self.full_shape(parameter)), tuple(self._shapes[name])
            if found != known:
                raise LayoutError(
                    f"{name!r} has shape {found}, and had {known} when the averager was attached; export the "
                    "average before parameters are resized (resize_token_embeddings), attach a new averager after"
                )

    @torch.no_grad()
    def misplaced(self) -> LayoutError | None:
        """The error, if any owned working element is not, bit for bit, its master cast to the working dtype."""
        masters, buffers = self.masters(), self.working()
        for piece in self._pieces:
            working = piece.of(buffers).detach()
            expected = piece.of(masters).detach().to(working.device, working.dtype)
            if expected.data_ptr() == working.data_ptr():
                continue
            different = _bits(expected) != _bits(working)
            if bool(different.any()):
                first = piece.shard_offset + int(different.nonzero()[0])
                place = section(self.fragments, first, first + 1)[0]
                return LayoutError(
                    f"element {place.start} of {place.name!r} under {self.name}: the working weight is not the "
                    f"cast of the master where the adapter expects it ({working.dtype} from torch.float32); swaft "
                    "does not know this layout, so it does not average it"
                )
        return None

    def masters_are_working(self) -> bool:
        """Whether the engine trains in fp32 with masters and working weights in one storage."""
        return any(m.data_ptr() == w.data_ptr() for m, w in zip(self.masters(), self.working(), strict=True))

    @torch.no_grad()
    def write(self, shard: Tensor | None) -> None:
        """Copy a host shard (None: the masters) into the owned working elements, cast. Does not publish."""
        _wait_for_device()  # offloading starts copies from host to device and does not wait
        values = self._owned(self.masters()) if shard is None else self._cut(shard)
        for working, value in zip(self._owned(self.working()), values, strict=True):
            working.copy_(value)
        _wait_for_device()  # ZeRO-3 gathers on a stream of its own, which need not wait for this one

    @torch.no_grad()
    def read(self, buffers: list[Tensor]) -> Tensor:
        """The owned elements of ``buffers`` (masters or working weights) as one fp32 host tensor."""
        shard = torch.empty(self.numel, dtype=torch.float32, device="cpu")
        for source, part in zip(self._owned(buffers), self._cut(shard), strict=True):
            part.copy_(source)
        return shard

    def live(self) -> Iterator[Tensor]:
        """This rank's elements of the last weights: fp32, on the host, in shard order and bounded pieces. Works
        also while averaged weights are swapped in.
        """
        stash = self._stashed()
        yield from map(Tensor.cpu, self._owned(self.masters()) if stash is None else self._cut(stash))

    def live_shard(self) -> Tensor:
        """The pieces of :meth:`live` as one tensor."""
        stash = self._stashed()
        return self.read(self.masters()) if stash is None else stash

    def sum_of_working(self) -> int:
        """A sum over the bits of the owned working weights: if it changes, something wrote to them."""
        return checksum(self._owned(self.working()))

    def _stashed(self) -> Tensor | None:
        """The owned live elements, if a swap has overwritten the masters themselves.

        Raises:
            AveragingError: they have been overwritten by a swap of another module, which has part of them.
        """
        if not self.swap.active or not self.masters_are_working():
            return None
        if not self.swap.entered:
            raise AveragingError(
                "averaged weights are swapped in by an averager of another module that shares parameters with this "
                "one, and the live weights were asked for; leave that `swapped_in()` first"
            )
        return self.swap.stash

    @cached_property
    def _pieces(self) -> list[Span]:
        return [piece for chunk in cut(self.spans, PIECE) for piece in chunk]

    def _owned(self, buffers: list[Tensor]) -> Iterator[Tensor]:
        return (piece.of(buffers).detach() for piece in self._pieces)

    def _cut(self, shard: Tensor) -> Iterator[Tensor]:
        return (shard.narrow(0, piece.shard_offset, piece.numel) for piece in self._pieces)

    def _before_step(self, *_: object) -> None:
        if fills_state():
            return
        if self.swap.active:
            raise AveragingError(
                "an optimizer step was taken while the averaged weights are swapped in; expected evaluation "
                "only inside `with averager.swapped_in():`"
            )
        if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
            raise AveragingError(
                "an optimizer step is being captured in a CUDA graph, and steps of a replayed graph cannot be "
                "seen, so none would be averaged; capture forward and backward only, and call `optimizer.step()` "
                "outside"
            )
        if self._attached_with is not None:  # the first step since the weights are watched
            self._changed_before_step = self._attached_with[1] != self.sum_of_working()
            self._attached_with = None


def _wait_for_device() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def checksum(runs: Iterable[Tensor]) -> int:
    """A sum over the bits of flat tensors, in any order: eight bytes at a time, then the edges."""
    sums = []
    for run in runs:
        ratio = 8 // run.element_size()
        first = min(-run.storage_offset() % ratio, len(run))
        last = first + (len(run) - first) // ratio * ratio
        if first < last:
            sums.append(run[first:last].view(torch.int64).sum())
        sums += [_bits(edge).sum(dtype=torch.int64) for edge in (run[:first], run[last:]) if len(edge)]
    return int(torch.stack(sums).sum()) if sums else 0


def _bits(tensor: Tensor) -> Tensor:
    return tensor.view(torch.int32 if tensor.element_size() == 4 else torch.int16)
