"""fairseq's epoch iterator over segments, which saves the carried state with its position."""

import logging
import math

import torch
from fairseq.data.iterators import EpochBatchIterator
from fairseq.logging import metrics

from fairseq_sha import compatibility
from fairseq_sha.checkpoints import check_codec
from fairseq_sha.errors import UserError

logger = logging.getLogger(__name__)


class SegmentIterator(EpochBatchIterator):
    """Yields the segments of a :class:`~fairseq_sha.data.segments.SegmentDataset` in order, one a
    batch.

    Args:
        dataset (SegmentDataset): the segments of one epoch
        carried (CarriedState): the model's, saved and restored with the position in the epoch; None
            if nothing is trained, or the model carries no state
        reference (Tensor): a parameter of the model: restored state gets its device and, if it was
            saved from a model in another precision, its type
        codec (~fairseq_sha.data.codecs.Codec): what token ids stand for, saved with the position
            and compared with what was saved
        max_carried_bytes (float): checkpoints leave out carried state that is larger, over the
            streams of all workers
        averaged (AveragedWeights): of :mod:`fairseq_sha.optim.averaged_weights`, saved and restored
            with the position; None without averaging
        **kwargs: for ``EpochBatchIterator``
    """

    def __init__(
        self,
        dataset,
        carried=None,
        reference=None,
        codec=None,
        max_carried_bytes=math.inf,
        averaged=None,
        **kwargs,
    ):
        super().__init__(
            dataset=dataset,
            collate_fn=dataset.collater,
            batch_sampler=[[index] for index in range(len(dataset))],
            epoch=dataset.epoch,
            disable_shuffling=True,
            **kwargs,
        )
        self.carried = carried
        self.reference = reference
        self.codec = codec
        #: What a restored checkpoint says of the run beside its position, until the task took it.
        self.restored = None
        self.max_carried_bytes = max_carried_bytes
        self.averaged = averaged

    @property
    def training_workers(self):
        """How many workers share the streams."""
        return self.dataset.num_streams // self.dataset.batch_size

    @property
    def first_batch(self):
        """fairseq's dummy batch, without an identity, so that it leaves no state."""
        batch = super().first_batch
        batch["net_input"].pop("segment", None)
        return batch

    def carried_bytes(self):
        """Size of the carried state over the streams of all workers."""
        return self.carried.size() * self.training_workers

    def saves_carried_state(self):
        """Whether a checkpoint written now should hold the carried state."""
        needed = self.carried is not None and not self.end_of_epoch()
        return needed and self.carried_bytes() <= self.max_carried_bytes

    def gather_carried_state(self):
        """Collect the state of all streams on the first of several workers, which writes the
        checkpoint. All workers must call this before it does."""
        if self.training_workers > 1 and self.saves_carried_state():
            self.carried.gather()

    def state_dict(self):
        """fairseq's hook, which comes before the weights are saved: from here to the next update
        the model holds their average, if there is one."""
        averaged = None
        if self.averaged is not None:
            self.averaged.use_average()
            averaged = self.averaged.state_dict()
        saved = None
        if self.saves_carried_state():
            saved = self.carried.training_state()
            if saved is not None and _streams_of(saved) not in (None, self.dataset.num_streams):
                saved = None
                logger.warning(
                    "the checkpoint leaves out the carried state, since this worker has only its "
                    "own part: a resumed run will start from nothing"
                )
        elif self.carried is not None and not self.end_of_epoch():
            logger.info(
                "the checkpoint leaves out the carried state (%.2f GB): a resumed run will start "
                "from nothing, unless --save-carried-state always",
                self.carried_bytes() / 1e9,
            )
        return {
            **super().state_dict(),
            "symbols": self.codec and self.codec.dictionary.symbols,
            "codec": self.codec and self.codec.name,
            "segmentation": self.dataset.segmentation(),
            "carried": saved,
            "precision": None if self.reference is None else str(self.reference.dtype),
            "patience": compatibility.patience_count(),
            **({"averaged": averaged} if averaged else {}),
        }

    def load_state_dict(self, state_dict):
        """Go on from the checkpoint's position. If it is a position in another corpus, or in other
        segments of it, begin the epoch again, from nothing, and say so.

        Raises:
            UserError: token ids had another meaning, or the weights are averages and this run takes
                none
        """
        averaged = state_dict.get("averaged")
        if self.averaged is None and averaged and averaged["trained"] is not None:
            raise UserError(
                "the weights of this checkpoint are averages; go on with --average-weights, or "
                "start from the averages with --reset-dataloader"
            )
        if self.codec is not None:
            check_codec(state_dict, self.codec)
        saved, own = state_dict.get("segmentation"), self.dataset.segmentation()
        if saved != own:
            if state_dict.get("iterations_in_epoch", 0) > 0:
                before = saved or {}
                different = [k for k in {**before, **own} if before.get(k) != own.get(k)]
                logger.warning(
                    "the checkpoint was written with another %s; beginning epoch %d again, with no "
                    "carried state",
                    " and ".join(different),
                    state_dict["epoch"],
                )
                metrics.reset_meters("train")  # fairseq has restored those of the epoch so far
            state_dict = {**state_dict, "iterations_in_epoch": 0, "carried": None}
        super().load_state_dict(state_dict)
        self.restored = {"patience": state_dict.get("patience")}
        if self.averaged is not None and averaged:
            self.averaged.load_state_dict(averaged)
        if self.carried is None:
            return
        carried = state_dict.get("carried")
        if carried is not None:
            first = self.dataset.first_stream
            streams = slice(first, first + self.dataset.batch_size)
            # Types stay if the weights have the same half precision: some states are in float32
            # nevertheless. Automatic mixed precision leaves halves beside weights in float32, which
            # a run without it could not read.
            same = state_dict.get("precision") == str(self.reference.dtype)
            keeps = same and self.reference.dtype != torch.float32
            dtype = None if keeps else self.reference.dtype
            self.carried.restore(carried, streams, self.reference.device, dtype)
        elif state_dict.get("iterations_in_epoch", 0) > 0:
            logger.warning("the checkpoint holds no carried state; going on from nothing")


def _streams_of(saved):
    """How many streams a state has, or None if it holds nothing."""
    return next((v.size(1) for layer in saved["state"] for v in layer.values()), None)
