"""The rules by which state is carried from one segment to the next."""

import pytest
import torch
from torch import nn

from fairseq_sha.models.segment_decoder import SegmentDecoder
from tests.conftest import dictionary_of


class Summing(nn.Module):
    """A layer whose state tells what it has read: the running sum of its inputs."""

    def forward(self, h, state):
        sums = h.cumsum(0) + state.get("sum", 0)
        return sums, {"sum": sums[-1:]}


@pytest.fixture
def decoder():
    return SegmentDecoder(dictionary_of(16), [Summing()], width=4)


def feed(decoder, segment, training=True):
    """Run a segment whose tokens depend on its name alone; returns the first features, from
    which the state that it started from can be told."""
    generator = torch.Generator().manual_seed(sum(segment.encode()))
    tokens = torch.randint(16, (2, 3), generator=generator)
    features, _ = decoder.train(training).extract_features(tokens, segment=segment)
    return features - decoder.embedding(tokens).cumsum(1)


def started_from_nothing(before):
    return bool(torch.allclose(before, torch.zeros_like(before), atol=1e-6))


def test_successor_starts_from_what_was_left(decoder):
    assert started_from_nothing(feed(decoder, "train:1:0"))
    assert not started_from_nothing(feed(decoder, "train:1:1"))
    assert not started_from_nothing(feed(decoder, "train:1:2"))


@pytest.mark.parametrize("other", ["train:1:3", "train:2:2", "train:1:0", "other:1:2"])
def test_any_other_segment_starts_from_nothing(decoder, other):
    feed(decoder, "train:1:0")
    feed(decoder, "train:1:1")
    assert started_from_nothing(feed(decoder, other))


def test_segment_fed_again_starts_where_it_started(decoder):
    feed(decoder, "train:1:0")
    first = feed(decoder, "train:1:1")
    again = feed(decoder, "train:1:1")
    assert torch.equal(first, again)
    after = feed(decoder, "train:1:2")
    torch.testing.assert_close(feed(decoder, "train:1:2"), after)


def test_training_state_survives_validation(decoder):
    feed(decoder, "train:1:0")
    expected = feed(decoder, "train:1:1")
    feed(decoder, "train:1:0")
    assert started_from_nothing(feed(decoder, "valid:1:0", training=False))
    assert not started_from_nothing(feed(decoder, "valid:1:1", training=False))
    assert started_from_nothing(feed(decoder, "valid2:1:0", training=False))
    assert started_from_nothing(feed(decoder, "train:1:0", training=False))
    torch.testing.assert_close(feed(decoder, "train:1:1"), expected)


def test_validation_state_is_freed(decoder):
    feed(decoder, "train:1:0")
    feed(decoder, "valid:1:0", training=False)
    feed(decoder, "train:1:1")
    assert list(decoder.carried._kept) == [("train", True)]


def test_batch_without_identity_changes_nothing(decoder):
    feed(decoder, "train:1:0")
    expected = feed(decoder, "train:1:1")
    decoder(torch.zeros(2, 3, dtype=torch.long))
    torch.testing.assert_close(feed(decoder, "train:1:1"), expected)


def test_failure_within_a_segment_changes_nothing(decoder):
    feed(decoder, "train:1:0")
    with pytest.raises(IndexError):
        decoder(torch.full((2, 3), 99), segment="train:1:1")
    assert not started_from_nothing(feed(decoder, "train:1:1"))


def test_state_can_be_saved_and_restored(decoder):
    assert decoder.carried.training_state() is None
    feed(decoder, "train:3:0")
    saved = decoder.carried.training_state()
    expected = feed(decoder, "train:3:1")
    other = SegmentDecoder(dictionary_of(16), [Summing()], width=4)
    other.load_state_dict(decoder.state_dict())
    other.carried.restore(saved, slice(None), "cpu")
    torch.testing.assert_close(feed(other, "train:3:1"), expected)
    for layer in saved["state"]:
        for tensor in layer.values():
            assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


def test_a_worker_restores_its_own_streams(decoder):
    tokens = torch.randint(16, (2, 3))
    decoder(tokens, segment="train:1:0")
    saved = decoder.carried.training_state()
    expected = decoder(tokens, segment="train:1:1")[0]
    decoder.carried.restore(saved, slice(1, 2), "cpu")
    torch.testing.assert_close(decoder(tokens[1:], segment="train:1:1")[0], expected[1:])


def test_all_segments_of_an_update_can_be_fed_again(decoder):
    """Gradient accumulation under mixed precision: after an overflow fairseq feeds all of them."""
    decoder.set_num_updates(0)
    feed(decoder, "train:1:0")
    decoder.set_num_updates(1)
    first = [feed(decoder, f"train:1:{i}") for i in (1, 2, 3)]
    decoder.set_num_updates(1)
    again = [feed(decoder, f"train:1:{i}") for i in (1, 2, 3)]
    for a, b in zip(first, again):
        assert not started_from_nothing(a) and torch.equal(a, b)
    decoder.set_num_updates(2)
    assert not started_from_nothing(feed(decoder, "train:1:4"))
    assert started_from_nothing(feed(decoder, "train:1:1"))


def test_overflow_does_not_poison_the_state(decoder):
    """Under mixed precision fairseq skips the update and goes on with the next segment."""
    decoder.set_num_updates(0)
    feed(decoder, "train:1:0")
    decoder.carried._kept["train", True].after[0]["sum"][0, 1, 2] = float("nan")
    decoder.set_num_updates(0)
    after = feed(decoder, "train:1:1")
    assert after.isfinite().all()
    assert started_from_nothing(after[1]) and not started_from_nothing(after[0])


def test_healthy_states_are_not_searched_for_overflow(decoder, monkeypatch):
    """Gradient accumulation without float16: it would copy all of the state for each segment."""
    decoder.carried.may_overflow = False
    monkeypatch.setattr("fairseq_sha.models.carried_state._reset_overflown", None)
    decoder.set_num_updates(0)
    for i in range(3):
        decoder.set_num_updates(0)
        after = feed(decoder, f"train:1:{i}")
    assert not started_from_nothing(after)


def test_what_an_earlier_update_started_from_is_forgotten(decoder):
    """It is as large as the state itself."""
    for i in range(3):
        decoder.set_num_updates(i)
        feed(decoder, f"train:1:{i}")
    assert decoder.carried._kept["train", True].before is not None
    decoder.set_num_updates(3)
    assert decoder.carried._kept["train", True].before is None
    assert not started_from_nothing(feed(decoder, "train:1:3"))
