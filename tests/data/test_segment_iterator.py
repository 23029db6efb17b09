"""Where a resumed run goes on. What it computes there is tested through the commands."""

import logging

import pytest

from fairseq_sha.data import Corpus, SegmentDataset, SegmentIterator
from tests.tiny_corpus import text, write_split


class Carried:
    """Stands for the model's carried state."""

    restored = None

    def training_state(self):
        return {"segment": "train:1:2", "state": []}

    def restore(self, saved, streams, like):
        self.restored = (saved["segment"], streams)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return Corpus(write_split(text(1000), tmp_path_factory.mktemp("data")))


def iterator(corpus, batch_size=4, tokens_per_sample=20, num_shards=1, shard=0):
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
    return SegmentIterator(dataset, carried=Carried())


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


def test_one_of_several_workers_saves_no_state(corpus, caplog):
    saved = state_after(iterator(corpus, batch_size=2, num_shards=2), 3)
    assert saved["carried"] is None
    resumed = iterator(corpus)
    with caplog.at_level(logging.WARNING):
        resumed.load_state_dict(saved)
    assert "going on from nothing" in caplog.text
    assert next_segment(resumed) == "train:1:3"


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
