"""What keeps the state between segments, and knows when it must not be used."""

from typing import NamedTuple, Optional

import torch
from torch import distributed

from fairseq_sha.data.segments import SegmentId


class _Kept(NamedTuple):
    segment: SegmentId
    before: Optional[list]
    after: list


class CarriedState:
    """The state between segments, kept by the identity of the segment that left it.

    Each split keeps the state that its latest segment left and the one that it started from. A
    segment starts from what its predecessor left; fed again (after an overflow or out of memory),
    from where it started the first time, as does the first of the segments that make up an update;
    any other starts from nothing. Training state survives evaluation; what evaluation left is
    forgotten at the next segment of another split.
    """

    def __init__(self):
        self._kept = {}  # (split, whether it is trained on) -> _Kept
        self._update = None
        self._update_goes_on = False
        self._first_of_update = None  # _Kept: where all the update's segments can be fed again
        self._gathered = None  # what training_state returns
        #: Whether updates may be skipped because of numbers that half precision cannot hold.
        self.may_overflow = True

    def begin_update(self, number):
        """Tell that the segments to come are for this update: a new one, or the same again."""
        self._update_goes_on = number == self._update
        if not self._update_goes_on:
            self._update, self._first_of_update = number, None
            # What was read for earlier updates is not fed again: a state less in memory.
            self._kept = {
                key: kept._replace(before=None) if key[1] else kept
                for key, kept in self._kept.items()
            }

    def before(self, segment, training):
        """The state that a segment starts from, or None for a start from nothing.

        Args:
            segment (str): a :class:`~fairseq_sha.data.SegmentId`
            training (bool): whether it is trained on, not evaluated
        """
        segment = SegmentId.parse(segment)
        first = self._first_of_update
        if training and first is not None and segment == first.segment:
            return first.before
        kept = self._kept.get((segment.split, training))
        if kept is None or segment.index == 0:
            return None
        if segment == kept.segment:
            return kept.before
        if segment == kept.segment._replace(index=kept.segment.index + 1):
            # Fairseq goes on after an overflow under mixed precision, with the same update.
            overflown = self.may_overflow and self._update_goes_on
            return _reset_overflown(kept.after) if overflown else kept.after
        return None

    def keep(self, segment, training, before, after):
        """Keep, without gradient, the state that a segment started from and the one it left."""
        segment = SegmentId.parse(segment)
        after = [{key: tensor.detach() for key, tensor in layer.items()} for layer in after]
        self._kept = {
            (split, trained): kept for (split, trained), kept in self._kept.items() if trained
        }
        self._kept[segment.split, training] = _Kept(segment, before, after)
        if training:
            self._gathered = None
            if self._first_of_update is None:
                self._first_of_update = self._kept[segment.split, training]

    def _trained(self):
        for (_, training), kept in self._kept.items():
            if training:
                return kept
        return None

    def size(self):
        """Bytes of the training state of this worker's streams."""
        kept = self._trained()
        tensors = [v for layer in kept.after for v in layer.values()] if kept else []
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def gather(self):
        """Have :meth:`training_state` return the streams of all workers, on the first of them. All
        workers must call it, between the same segments."""
        kept, workers = self._trained(), distributed.get_world_size()
        if kept is None:
            return
        collects = distributed.get_rank() == 0
        state = []
        for layer in kept.after:
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
        state = [{k: v.to("cpu", copy=True) for k, v in layer.items()} for layer in kept.after]
        return {"segment": str(kept.segment), "state": state}

    def restore(self, saved, streams, device, dtype=None):
        """Put back the given streams (a slice) of what :meth:`training_state` gave, on a device,
        in the types that they had or in the given one."""
        segment = SegmentId.parse(saved["segment"])
        state = [
            {key: tensor[:, streams].to(device, dtype) for key, tensor in layer.items()}
            for layer in saved["state"]
        ]
        self._kept[segment.split, True] = _Kept(segment, None, state)


def _reset_overflown(state):
    """The state with zeros for those streams in which a number is not finite."""
    tensors = [tensor for layer in state for tensor in layer.values()]
    if not tensors:
        return state
    finite = torch.stack([t.isfinite().transpose(0, 1).flatten(1).all(1) for t in tensors]).all(0)

    def reset(tensor):
        shape = (1, -1) + (1,) * (tensor.dim() - 2)
        return tensor.masked_fill(~finite.view(shape), 0)

    return [{key: reset(tensor) for key, tensor in layer.items()} for layer in state]
