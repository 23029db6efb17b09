"""Where a resumed run goes on. What it computes there is tested through the commands."""

import logging

import pytest
import torch

from fairseq_sha.data import Corpus, SegmentDataset, SegmentIterator
from tests.tiny_corpus import text, write_split


class Carried:
    """Stands for the model's carried state: four bytes a stream."""

    restored = None

    def __init__(self, streams):
        self.own = self.streams = streams

    def size(self):
        return 4 * self.own

    def gather(self):
        self.streams = 4

    def training_state(self):
        return {"segment": "train:1:2", "state": [{}, {"h": torch.zeros(1, self.streams)}]}

    def restore(self, saved, streams, device, dtype):
        self.restored = (saved["segment"], streams)
        self.dtype = dtype


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return Corpus(write_split(text(1000), tmp_path_factory.mktemp("data")))


def iterator(corpus, batch_size=4, tokens_per_sample=20, num_shards=1, shard=0, **options):
    dataset = SegmentDataset(
        corpus,
        "train",
        1,
        pad=1,
        batch_size=batch_size,
        tokens_per_sample=tokens_per_sample,
        num_shards=num_shards,
        shard=shard,
    )
    options = {"reference": torch.zeros(1), **options}
    return SegmentIterator(dataset, carried=Carried(batch_size), **options)


def state_after(iterator, segments):
    batches = iterator.next_epoch_itr(shuffle=True)
    for _ in range(segments):
        next(batches)
    return iterator.state_dict()


def next_segment(iterator):
    return next(iterator.next_epoch_itr())["net_input"]["segment"]


def test_segments_come_in_order_whatever_is_asked_for(corpus):
    batches = list(iterator(corpus).next_epoch_itr(shuffle=True))
    names = [batch["net_input"]["segment"] for batch in batches]
    assert names == [f"train:1:{i}" for i in range(13)]  # 999 predictions, 4 streams, 20 at a time


def test_goes_on_where_it_stopped(corpus):
    resumed = iterator(corpus)
    resumed.load_state_dict(state_after(iterator(corpus), 3))
    assert resumed.carried.restored == ("train:1:2", slice(0, 4))
    assert next_segment(resumed) == "train:1:3"


def test_state_of_one_process_serves_several(corpus):
    resumed = iterator(corpus, batch_size=2, num_shards=2, shard=1)
    resumed.load_state_dict(state_after(iterator(corpus), 3))
    assert resumed.carried.restored == ("train:1:2", slice(2, 4))


def test_several_workers_save_the_state_of_all_streams_if_gathered(corpus, caplog):
    worker = iterator(corpus, batch_size=2, num_shards=2)
    assert state_after(worker, 3)["carried"] is None
    worker.gather_carried_state()
    resumed = iterator(corpus)
    resumed.load_state_dict(worker.state_dict())
    assert resumed.carried.restored == ("train:1:2", slice(0, 4))


def test_state_is_not_needed_at_the_end_of_an_epoch(corpus, caplog):
    assert state_after(iterator(corpus), 13)["carried"] is None
    assert "leaves out" not in caplog.text


@pytest.mark.parametrize("batch_size, num_shards", [(4, 1), (2, 2)])
def test_state_above_the_limit_is_left_out(corpus, caplog, batch_size, num_shards):
    """The limit is on all streams, of all workers."""
    shards = dict(batch_size=batch_size, num_shards=num_shards)
    kept = iterator(corpus, max_carried_bytes=16, **shards)
    state_after(kept, 3)
    kept.gather_carried_state()
    assert kept.state_dict()["carried"] is not None
    left_out = iterator(corpus, max_carried_bytes=15, **shards)
    with caplog.at_level(logging.INFO):
        state_after(left_out, 3)
        left_out.gather_carried_state()
        saved = left_out.state_dict()
        assert saved["carried"] is None and left_out.carried.streams == batch_size
        assert "--save-carried-state always" in caplog.text
        resumed = iterator(corpus)
        resumed.load_state_dict(saved)
    assert "going on from nothing" in caplog.text
    assert next_segment(resumed) == "train:1:3"


def test_state_keeps_its_types_unless_the_precision_changed(corpus):
    saved = state_after(iterator(corpus), 3)
    for dtype, expected in ((torch.float32, None), (torch.bfloat16, torch.bfloat16)):
        resumed = iterator(corpus, reference=torch.zeros(1, dtype=dtype))
        resumed.load_state_dict(saved)
        assert resumed.carried.dtype == expected


def test_another_corpus_of_the_same_length_begins_the_epoch_again(corpus, caplog, tmp_path):
    resumed = iterator(Corpus(write_split(text(1000, seed=5), tmp_path)))
    with caplog.at_level(logging.WARNING):
        resumed.load_state_dict(state_after(iterator(corpus), 3))
    assert "another corpus; beginning epoch 1 again" in caplog.text


@pytest.mark.parametrize(
    "changed, named", [(dict(batch_size=5), "streams"), (dict(tokens_per_sample=21), "length")]
)
def test_another_segmentation_begins_the_epoch_again(corpus, caplog, changed, named):
    resumed = iterator(corpus, **changed)
    with caplog.at_level(logging.WARNING):
        resumed.load_state_dict(state_after(iterator(corpus), 3))
    assert named in caplog.text and "beginning epoch 1 again" in caplog.text
    assert resumed.carried.restored is None
    assert next_segment(resumed) == "train:1:0"


def test_dummy_batch_has_no_identity(corpus):
    assert "segment" not in iterator(corpus).first_batch["net_input"]
