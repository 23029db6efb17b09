"""fairseq's epoch iterator over segments, which saves the carried state with its position."""

import logging

from fairseq.data.iterators import EpochBatchIterator

logger = logging.getLogger(__name__)


class SegmentIterator(EpochBatchIterator):
    """Yields the segments of a :class:`~fairseq_sha.data.SegmentDataset` in order, one a batch.

    Args:
        dataset (SegmentDataset): the segments of one epoch
        carried (CarriedState): the model's, to be saved and restored with the position in the
            epoch; None where nothing is trained
        like (Tensor): restored state gets the device and type of this tensor
        **kwargs: for ``EpochBatchIterator``
    """

    def __init__(self, dataset, carried=None, like=None, **kwargs):
        super().__init__(
            dataset=dataset,
            collate_fn=dataset.collater,
            batch_sampler=[[index] for index in range(len(dataset))],
            epoch=dataset.epoch,
            disable_shuffling=True,
            **kwargs,
        )
        self.carried = carried
        self.like = like

    @property
    def first_batch(self):
        """fairseq's dummy batch. Without an identity, so that it leaves no state."""
        batch = super().first_batch
        del batch["net_input"]["segment"]
        return batch

    def state_dict(self):
        # One of several workers has the state of its own streams only: that is left out.
        all_streams = self.dataset.batch_size == self.dataset.num_streams
        needed = self.carried is not None and all_streams and not self.end_of_epoch()
        return {
            **super().state_dict(),
            "segmentation": self.dataset.segmentation(),
            "carried": self.carried.training_state() if needed else None,
        }

    def load_state_dict(self, state_dict):
        """Go on where the checkpoint left off. If it read another corpus, or cut it otherwise, its
        position means nothing here: begin its epoch again, from nothing, and say so."""
        saved, own = state_dict.get("segmentation"), self.dataset.segmentation()
        if saved != own:
            different = [k for k in own if saved is None or saved.get(k) != own[k]]
            logger.warning(
                "the checkpoint was written with another %s; beginning epoch %d again, with no "
                "carried state",
                " and ".join(different),
                state_dict["epoch"],
            )
            state_dict = {**state_dict, "iterations_in_epoch": 0, "carried": None}
        super().load_state_dict(state_dict)
        carried = state_dict.get("carried")
        if carried is not None and self.carried is not None:
            first = self.dataset.first_stream
            streams = slice(first, first + self.dataset.batch_size)
            self.carried.restore(carried, streams, self.like)
        elif state_dict.get("iterations_in_epoch", 0) > 0:
            logger.warning("the checkpoint holds no carried state; going on from nothing")
