"""Where a resumed run goes on. What it computes there is tested through the commands."""

import logging

import pytest
import torch
from fairseq.data import Dictionary
from fairseq.logging import metrics

from fairseq_sha import UserError
from fairseq_sha.data.codecs import ByteCodec, WordCodec
from fairseq_sha.data.corpus import Corpus
from fairseq_sha.data.segment_iterator import SegmentIterator
from fairseq_sha.data.segments import SegmentDataset
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


def iterator(corpus, batch_size=4, tokens_per_sample=20, **options):
    """An iterator; the options are those of the segments and its own."""
    names = {"num_shards", "shard", "random_start", "random_lengths", "seed"} & {*options}
    of_segments = {name: options.pop(name) for name in names}
    dataset = SegmentDataset(corpus, "train", 1, 1, batch_size, tokens_per_sample, **of_segments)
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
    assert "a resumed run will start from nothing" in caplog.text
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


@pytest.mark.parametrize(
    "before, now, expected",
    [
        (torch.float32, torch.float32, torch.float32),  # maybe after mixed precision
        (torch.float32, torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16, None),
    ],
)
def test_state_keeps_its_types_in_half_precision_only(corpus, before, now, expected):
    saved = state_after(iterator(corpus, reference=torch.zeros(1, dtype=before)), 3)
    resumed = iterator(corpus, reference=torch.zeros(1, dtype=now))
    resumed.load_state_dict(saved)
    assert resumed.carried.dtype == expected


def test_another_corpus_of_the_same_length_begins_the_epoch_again(corpus, caplog, tmp_path):
    resumed = iterator(Corpus(write_split(text(1000, seed=5), tmp_path)))
    with caplog.at_level(logging.WARNING):
        resumed.load_state_dict(state_after(iterator(corpus), 3))
    assert "another corpus; beginning epoch 1 again" in caplog.text


@pytest.mark.parametrize(
    "before, changed, named",
    [
        ({}, dict(batch_size=5), "streams"),
        ({}, dict(tokens_per_sample=21), "length"),
        ({}, dict(random_start=True), "starts"),
        ({}, dict(random_lengths=True), "random segment lengths"),
        (dict(random_lengths=True), dict(seed=2), "seed"),
        (dict(random_start=True), dict(seed=2), "seed"),
    ],
)
def test_another_segmentation_begins_the_epoch_again(corpus, caplog, before, changed, named):
    """The score of the epoch is that of what is read from here on."""
    resumed = iterator(corpus, **before, **changed)
    with metrics.aggregate("train"):
        metrics.log_scalar("loss", 5.0)
    with caplog.at_level(logging.WARNING):
        resumed.load_state_dict(state_after(iterator(corpus, **before), 3))
    assert metrics.get_meter("train", "loss").count == 0
    assert named in caplog.text and "beginning epoch 1 again" in caplog.text
    assert resumed.carried.restored is None
    assert next_segment(resumed) == "train:1:0"
    back = iterator(corpus, **before)
    back.load_state_dict(state_after(resumed, 3))
    assert caplog.text.count(named) == 2


def test_another_segmentation_between_epochs_loses_nothing(corpus, caplog):
    resumed = iterator(corpus, batch_size=5)
    resumed.load_state_dict(state_after(iterator(corpus), 13))
    assert not caplog.text and resumed.epoch == 2


def test_dummy_batch_has_no_identity(corpus):
    assert "segment" not in iterator(corpus).first_batch["net_input"]


def test_model_without_state_resumes_in_silence(corpus, caplog):
    def stateless():
        dataset = SegmentDataset(corpus, "train", 1, 1, batch_size=4, tokens_per_sample=20)
        return SegmentIterator(dataset, reference=torch.zeros(1))

    saved = state_after(stateless(), 3)
    assert saved["carried"] is None
    resumed = stateless()
    resumed.load_state_dict(saved)
    assert next_segment(resumed) == "train:1:3" and not caplog.text


def test_averages_are_not_trained_on_in_silence(corpus):
    saved = state_after(iterator(corpus), 3)
    not_begun = {"costs": [1.0], "updates": None, "trained": None}
    iterator(corpus).load_state_dict({**saved, "averaged": not_begun})
    begun = {"costs": [1.0], "updates": 2, "trained": {"weight": torch.zeros(1)}}
    with pytest.raises(UserError, match="are averages; go on with --average-weights"):
        iterator(corpus).load_state_dict({**saved, "averaged": begun})


def test_codec_is_saved_and_compared(corpus, tmp_path):
    def with_codec(codec):
        return iterator(corpus, codec=codec)

    codec = ByteCodec.from_symbols([*Dictionary().symbols, "97", "98"])
    saved = state_after(with_codec(codec), 3)
    with_codec(codec).load_state_dict(saved)
    other = ByteCodec.from_symbols([*Dictionary().symbols, "98", "97"])
    with pytest.raises(UserError, match="another dictionary, in which token 4 was '97', not '98'"):
        with_codec(other).load_state_dict(saved)
    words = WordCodec.from_symbols(codec.dictionary.symbols)
    with pytest.raises(UserError, match="trained with --codec bytes, not words"):
        with_codec(words).load_state_dict(saved)
    with_codec(codec).load_state_dict({**saved, "codec": None})  # of an older version
