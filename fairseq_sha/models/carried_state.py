"""The state that is kept between segments, and the rules that say when it may be used."""

import logging
from typing import NamedTuple, Optional

import torch
from torch import distributed

from fairseq_sha.data.segments import SegmentId

logger = logging.getLogger(__name__)


class _Kept(NamedTuple):
    segment: SegmentId
    state: Optional[list]


class CarriedState:
    """The state between segments, kept under the identity of the segment that left it.

    A segment starts from the state that its predecessor left. Any other segment starts from
    nothing, with two exceptions:

    * The first segment of an attempt at an update, fed again, starts from where it started the
      first time. fairseq repeats an attempt when gradients overflow under automatic mixed
      precision, and a batch of validation that ran out of memory.
    * If a training segment never arrived, because fairseq skips a batch that runs out of memory,
      the next one starts from the latest state there is, and the log says so.

    Training state survives evaluation. The state of an evaluation is freed at the next segment of
    any other split. At most two states are held for each: the one that the current attempt started
    from and the latest.
    """

    def __init__(self):
        # Both by (split, whether it is trained on).
        self._latest = {}  # what the latest segment left
        self._attempt = {}  # the first segment of the current attempt, and what it started from
        self._attempt_is_over = False
        self._update = None
        self._update_is_repeated = False
        self._gathered = None  # what training_state returns, with the streams of all workers
        #: Whether updates may be skipped because gradients overflow in half precision.
        self.may_overflow = True

    def begin_update(self, number):
        """Say that the next segments belong to this update: a new one, or the same one again."""
        self._update_is_repeated = number == self._update
        if not self._update_is_repeated:
            self._update = number
            # Segments of earlier updates are not fed again: one state less in memory.
            self._attempt = {key: kept for key, kept in self._attempt.items() if not key[1]}

    def end_attempt(self):
        """Say that all segments of an attempt at an update have been read. The next segment is the
        first one of the same attempt, fed again, or begins another."""
        self._attempt_is_over = True

    def before(self, segment, training):
        """The state that a segment starts from, or None for nothing.

        Args:
            segment (str): a :class:`~fairseq_sha.data.segments.SegmentId`
            training (bool): whether it is trained on, not evaluated
        """
        segment = SegmentId.parse(segment)
        key = segment.split, training
        attempt, latest = self._attempt.get(key), self._latest.get(key)
        if attempt is not None and segment == attempt.segment:
            return attempt.state
        if latest is None or segment.epoch != latest.segment.epoch:
            return None
        lost = segment.index - latest.segment.index - 1
        if lost > 0 and training:
            logger.warning(
                "segments %d to %d of epoch %d were lost (fairseq skips a batch that runs out of "
                "memory); going on from the state before them",
                latest.segment.index + 1,
                segment.index - 1,
                segment.epoch,
            )
        elif lost != 0:
            return None
        # After an overflow, fairseq goes on with the next segment and the same update.
        overflowed = training and self.may_overflow and self._update_is_repeated
        return _reset_overflowed(latest.state) if overflowed else latest.state

    def keep(self, segment, training, before, after):
        """Keep, without gradient, the state that a segment started from and the one it left."""
        segment = SegmentId.parse(segment)
        key = segment.split, training
        after = [{name: tensor.detach() for name, tensor in layer.items()} for layer in after]
        self._latest = {k: kept for k, kept in self._latest.items() if k[1]}
        self._attempt = {k: kept for k, kept in self._attempt.items() if k[1]}
        self._latest[key] = _Kept(segment, after)
        # Without updates, each segment is an attempt of its own.
        begins = self._attempt_is_over or self._update is None or key not in self._attempt
        if begins or not training:
            self._attempt[key] = _Kept(segment, before)
        if training:
            self._attempt_is_over = False
            self._gathered = None

    def _trained(self):
        return next((kept for (_, training), kept in self._latest.items() if training), None)

    def size(self):
        """Bytes of the training state of this worker's streams."""
        kept = self._trained()
        tensors = [v for layer in kept.state for v in layer.values()] if kept else []
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def gather(self):
        """Have :meth:`training_state` return the streams of all workers, on the first of them. All
        workers must call it, between the same segments."""
        kept, workers = self._trained(), distributed.get_world_size()
        if kept is None:
            return
        collects = distributed.get_rank() == 0
        state = []
        for layer in kept.state:
            state.append({})
            for key, tensor in layer.items():
                parts = [torch.empty_like(tensor) for _ in range(workers)] if collects else None
                distributed.gather(tensor.contiguous(), parts)
                if collects:
                    state[-1][key] = torch.cat(parts, 1).cpu()
        if collects:
            self._gathered = {"segment": str(kept.segment), "state": state}

    def training_state(self):
        """For checkpoints: ``{"segment": str, "state": list}`` on the CPU; None before training."""
        kept = self._trained()
        if kept is None or self._gathered is not None:
            return self._gathered
        # Saving a view would save the whole storage behind it.
        state = [{k: v.to("cpu", copy=True) for k, v in layer.items()} for layer in kept.state]
        return {"segment": str(kept.segment), "state": state}

    def restore(self, saved, streams, device, dtype=None):
        """Put back the given streams (a slice) of what :meth:`training_state` gave, on a device,
        in the types that they had or in the given one."""
        segment = SegmentId.parse(saved["segment"])
        state = [
            {
                key: tensor[:, streams].to(device, dtype if tensor.is_floating_point() else None)
                for key, tensor in layer.items()
            }
            for layer in saved["state"]
        ]
        self._latest[segment.split, True] = _Kept(segment, state)
        self._attempt.pop((segment.split, True), None)


def _reset_overflowed(state):
    """The state with zeros for those streams in which a number is not finite."""
    tensors = [tensor for layer in state for tensor in layer.values()]
    if not tensors:
        return state
    finite = torch.stack([t.isfinite().transpose(0, 1).flatten(1).all(1) for t in tensors]).all(0)

    def reset(tensor):
        shape = (1, -1) + (1,) * (tensor.dim() - 2)
        return tensor.masked_fill(~finite.view(shape), 0)

    return [{key: reset(tensor) for key, tensor in layer.items()} for layer in state]
