"""Every prediction is in exactly one segment of one stream, whatever the sizes."""

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fairseq_sha.data.segments import (
    RandomWindowDataset,
    SegmentDataset,
    SegmentId,
    WindowDataset,
    segment_lengths,
    stream_bounds,
)

PAD = 1


class FakeCorpus:
    """Token ``i`` is ``i + 10``, so that each says where it stands."""

    def __init__(self, num_tokens):
        self.total_tokens = num_tokens
        self.tokens = np.arange(10, num_tokens + 10)

    def __len__(self):
        return self.total_tokens - 1


sizes = {
    "num_tokens": st.integers(2, 300),
    "batch_size": st.integers(1, 9),
    "num_shards": st.integers(1, 3),
    "tokens_per_sample": st.integers(1, 70),
    "random_lengths": st.booleans(),
    "random_start": st.booleans(),
    "seed": st.integers(0, 5),
    "epoch": st.integers(1, 4),
}


def workers(num_tokens, num_shards, epoch, **options):
    return [
        SegmentDataset(
            FakeCorpus(num_tokens),
            "train",
            epoch,
            PAD,
            num_shards=num_shards,
            shard=shard,
            **options,
        )
        for shard in range(num_shards)
    ]


@settings(max_examples=300, deadline=None)
@given(**sizes)
def test_every_prediction_is_scored_once(**options):
    datasets = workers(**options)
    assert len({len(dataset) for dataset in datasets}) == 1  # no worker runs dry before another
    scored = []
    for dataset in datasets:
        for index in range(len(dataset)):
            batch = dataset[index]
            inputs, targets = batch["net_input"]["src_tokens"], batch["target"]
            assert inputs.shape == targets.shape and inputs.shape[1] <= dataset.tokens_per_sample
            real = targets != PAD
            assert (targets[real] == inputs[real] + 1).all()
            assert int(real.sum()) == batch["ntokens"]
            scored += targets[real].tolist()
    assert sorted(scored) == list(range(11, options["num_tokens"] + 10))


@settings(max_examples=100, deadline=None)
@given(**sizes)
def test_a_stream_reads_on_where_it_stopped(**options):
    for dataset in workers(**options):
        batches = [dataset[index] for index in range(len(dataset))]
        inputs = np.concatenate([b["net_input"]["src_tokens"].numpy() for b in batches], axis=1)
        targets = np.concatenate([b["target"].numpy() for b in batches], axis=1)
        for row_inputs, row_targets in zip(inputs, targets):
            count = int((row_targets != PAD).sum())
            assert (row_targets[count:] == PAD).all()
            ahead = np.diff(row_inputs[:count])
            # From the last prediction of the corpus to the first.
            assert ((ahead == 1) | (ahead == 2 - options["num_tokens"])).all()
            assert options["random_start"] or (ahead == 1).all()
            assert (row_targets[:count] == row_inputs[:count] + 1).all()


def test_streams_are_the_same_on_any_number_of_workers():
    options = dict(num_tokens=101, tokens_per_sample=7, random_lengths=True, seed=1, epoch=2)
    (whole,) = workers(num_shards=1, batch_size=4, **options)
    halves = workers(num_shards=2, batch_size=2, **options)
    for index in range(len(whole)):
        targets = np.concatenate([half[index]["target"] for half in halves])
        assert (whole[index]["target"].numpy() == targets).all()
        ids = np.concatenate([half[index]["id"] for half in halves])
        assert (whole[index]["id"].numpy() == ids).all()


def test_stream_bounds_are_even():
    assert stream_bounds(10, 3).tolist() == [0, 4, 7, 10]
    assert stream_bounds(2, 4).tolist() == [0, 1, 2, 2, 2]


def test_fixed_segment_lengths():
    assert segment_lengths(10, 4).tolist() == [4, 4, 2]
    assert segment_lengths(8, 4).tolist() == [4, 4]
    assert segment_lengths(3, 4).tolist() == [3]


def test_random_segment_lengths_follow_the_published_distribution():
    lengths = segment_lengths(10**7, 1000, np.random.RandomState(1))
    assert lengths.sum() == 10**7
    full = lengths[lengths > 750]
    assert len(full) / len(lengths) == pytest.approx(0.95, abs=0.01)
    assert lengths.max() == 1000  # a draw above the maximum is cut to it
    # The full ones: a normal of mean 1000 and deviation 5, rounded down, cut at its mean.
    assert full.mean() == pytest.approx(1000 - 5 * 0.3989 - 0.25, abs=0.2)
    halves = lengths[(lengths > 400) & (lengths < 600)]
    assert len(halves) + len(full) >= len(lengths) - 1  # all but the last
    assert halves.mean() == pytest.approx(499.5, abs=1)
    assert halves.std() == pytest.approx(5, abs=0.5)
    assert segment_lengths(1000, 8, np.random.RandomState(1))[:-1].min() >= 5


def test_random_segment_lengths_depend_on_seed_and_epoch_alone():
    def lengths(seed, epoch):
        options = dict(num_tokens=3000, batch_size=2, tokens_per_sample=50, random_lengths=True)
        (dataset,) = workers(num_shards=1, seed=seed, epoch=epoch, **options)
        return np.diff(dataset.offsets).tolist()

    assert lengths(1, 1) == lengths(1, 1)
    assert lengths(1, 1) != lengths(1, 2)
    assert lengths(1, 1) != lengths(2, 1)


def test_random_start_depends_on_seed_and_epoch_alone():
    def first(seed, epoch, shards=1):
        options = dict(num_tokens=3000, batch_size=2, tokens_per_sample=50, random_start=True)
        dataset = workers(num_shards=shards, seed=seed, epoch=epoch, **options)[0]
        return int(dataset[0]["net_input"]["src_tokens"][0, 0])

    assert first(1, 1) == first(1, 1) == first(1, 1, shards=2)
    assert len({first(seed, epoch) for seed in range(5) for epoch in (1, 2)}) == 10


def test_identity_survives_its_string():
    for segment in (SegmentId("train", 3, 17), SegmentId("valid:b", 1, 0)):
        assert SegmentId.parse(str(segment)) == segment


def test_dataset_is_small_when_pickled():
    """Data workers get a pickled copy: it must not carry the corpus."""
    from fairseq_sha.data.corpus import Corpus
    from tests.tiny_corpus import write_split

    corpus = Corpus(write_split(bytes(range(32, 127)) * 1000))
    dataset = SegmentDataset(corpus, "train", 1, PAD, batch_size=4, tokens_per_sample=50)
    first = dataset[0]["target"]
    assert len(pickle.dumps(dataset)) < 50_000
    assert (pickle.loads(pickle.dumps(dataset))[0]["target"] == first).all()


@settings(max_examples=300, deadline=None)
@given(
    num_tokens=st.integers(2, 300),
    batch_size=st.integers(1, 5),
    context=st.integers(0, 40),
    stride=st.integers(1, 40),
    num_shards=st.integers(1, 3),
)
def test_sliding_window_scores_every_prediction_once_with_its_context(
    num_tokens, batch_size, context, stride, num_shards
):
    shards = [
        WindowDataset(
            FakeCorpus(num_tokens),
            PAD,
            batch_size,
            context,
            stride,
            num_shards=num_shards,
            shard=shard,
            filler=2,
        )
        for shard in range(num_shards)
    ]
    assert len({len(shard) for shard in shards}) == 1
    scored = []
    for shard in shards:
        for index in range(len(shard)):
            batch = shard[index]
            tokens, targets = batch["net_input"]["src_tokens"], batch["target"]
            assert tokens.shape == targets.shape == (batch_size, context + stride)
            assert batch["ntokens"] == int((targets != PAD).sum())
            assert "segment" not in batch["net_input"] and not (tokens == PAD).any()
            for row, start in zip(range(batch_size), batch["start_indices"]):
                (where,) = np.nonzero(targets[row].numpy() != PAD)
                assert list(where) == list(range(start, start + len(where)))
                for t in where:
                    target = int(targets[row, t])
                    seen = tokens[row, : t + 1].numpy()
                    # All that it reads comes right before it, without a gap.
                    assert (seen == np.arange(target - len(seen), target)).all()
                    assert len(seen) >= min(context + 1, target - 10)
                    scored.append(target)
    assert sorted(scored) == list(range(11, num_tokens + 10))


@settings(max_examples=100, deadline=None)
@given(**sizes, num_targets=st.integers(2, 4))
def test_further_targets_are_the_tokens_after_the_targets(num_targets, **options):
    for dataset in workers(num_targets=num_targets, **options):
        for index in range(len(dataset)):
            batch = dataset[index]
            targets, further = batch["target"], batch["net_input"]["further_targets"]
            assert further.shape == (num_targets - 1, *targets.shape)
            for k, ahead in enumerate(further, 1):
                expected = (targets + k).masked_fill(targets == PAD, PAD)
                expected[expected > options["num_tokens"] + 9] = PAD  # the end of the corpus
                assert torch.equal(ahead, expected)


def random_windows(num_tokens, num_shards, **options):
    return [
        RandomWindowDataset(
            FakeCorpus(num_tokens), pad=PAD, num_shards=num_shards, shard=shard, **options
        )
        for shard in range(num_shards)
    ]


@settings(max_examples=100, deadline=None)
@given(
    num_tokens=st.integers(10, 300),
    batch_size=st.integers(1, 3),
    tokens_per_sample=st.integers(1, 70),
    random_lengths=st.booleans(),
    num_targets=st.integers(1, 3),
)
def test_random_windows_lie_within_the_corpus(num_tokens, num_targets, **options):
    (dataset,) = random_windows(num_tokens, 1, epoch=1, num_targets=num_targets, **options)
    (in_order,) = workers(num_tokens, 1, 1, **options)
    assert len(dataset) == len(in_order)
    for index in range(len(dataset)):
        batch = dataset[index]
        tokens, targets = batch["net_input"]["src_tokens"], batch["target"]
        assert tokens.shape == targets.shape == in_order[index]["target"].shape
        assert "segment" not in batch["net_input"]
        assert batch["ntokens"] == targets.numel()
        assert torch.equal(targets, tokens + 1)
        assert torch.equal(tokens[:, 1:], targets[:, :-1])
        assert 10 <= tokens.min() and targets.max() <= num_tokens + 9
        for k, ahead in enumerate(batch["net_input"].get("further_targets", ()), 1):
            exists = targets + k < num_tokens + 10
            assert torch.equal(ahead, torch.where(exists, targets + k, torch.full_like(ahead, PAD)))


def test_random_windows_come_from_everywhere_and_depend_on_seed_and_epoch_alone():
    def places(seed=1, epoch=1, shards=1):
        parts = random_windows(
            301, shards, epoch=epoch, seed=seed, batch_size=12 // shards, tokens_per_sample=9
        )
        return np.concatenate([part.places for part in parts], 1)

    drawn = places()
    assert (drawn == places()).all() and (drawn == places(shards=3)).all()
    assert (drawn != places(seed=2)).any() and (drawn != places(epoch=2)).any()
    drawn = np.concatenate([places(epoch=epoch)[:-1].flatten() for epoch in range(1, 201)])
    assert drawn.min() == 0 and drawn.max() == 300 - 9
    assert np.histogram(drawn, 4)[0] == pytest.approx(len(drawn) / 4, rel=0.1)


def test_position_among_random_windows_is_no_position_in_order():
    """So that a run that is resumed with the other choice begins its epoch again."""
    options = dict(epoch=1, batch_size=2, tokens_per_sample=5)
    (dataset,) = random_windows(50, 1, **options)
    in_order = SegmentDataset(FakeCorpus(50), "train", pad=PAD, **options)
    for data in (dataset, in_order):
        data.corpus.fingerprint = lambda: "the same"
    assert dataset.segmentation() != in_order.segmentation()
    assert dataset.segmentation()["seed"] == 1
