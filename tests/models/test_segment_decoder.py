"""The rules by which state is carried from one segment to the next."""

import pytest
import torch
from fairseq.models import FairseqLanguageModel
from torch import nn

from fairseq_sha.models.segment_decoder import SegmentDecoder
from fairseq_sha.tasks.segment_language_modeling import SegmentLanguageModelingTask
from tests.conftest import dictionary_of


class Summing(nn.Module):
    """A layer whose state tells what it has read: the running sum of its inputs."""

    def forward(self, h, state, context):
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


@pytest.mark.parametrize("other", ["train:2:2", "train:1:0", "other:1:2"])
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
    assert list(decoder.carried._latest) == [("train", True)]


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
    decoder.carried.end_attempt()
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
    decoder.carried._latest["train", True].state[0]["sum"][0, 1, 2] = float("nan")
    decoder.set_num_updates(0)
    after = feed(decoder, "train:1:1")
    assert after.isfinite().all()
    assert started_from_nothing(after[1]) and not started_from_nothing(after[0])


def test_healthy_states_are_not_searched_for_overflow(decoder, monkeypatch):
    """Gradient accumulation without float16: it would copy all of the state for each segment."""
    decoder.carried.may_overflow = False
    monkeypatch.setattr("fairseq_sha.models.carried_state._reset_overflowed", None)
    decoder.set_num_updates(0)
    for i in range(3):
        decoder.set_num_updates(0)
        after = feed(decoder, f"train:1:{i}")
    assert not started_from_nothing(after)


def states_held(decoder):
    """How many different states are kept."""
    kept = [*decoder.carried._latest.values(), *decoder.carried._attempt.values()]
    return len({id(item.state) for item in kept if item.state is not None})


@pytest.mark.parametrize("update_freq", [1, 2, 4])
def test_no_more_than_two_states_are_held(decoder, update_freq):
    """Fewer streams and more accumulation is the remedy for little memory."""
    for update in range(4):
        for i in range(update_freq):
            decoder.set_num_updates(update)
            feed(decoder, f"train:1:{update * update_freq + i}")
            assert states_held(decoder) <= 2
        decoder.carried.end_attempt()
    decoder.set_num_updates(4)
    assert states_held(decoder) == 1  # segments of earlier updates are not fed again
    assert not started_from_nothing(feed(decoder, f"train:1:{4 * update_freq}"))


def test_group_after_a_skipped_one_can_be_fed_again(decoder):
    """Automatic mixed precision with accumulation: fairseq gives up on a group that overflows, and
    the next one overflows too. The number of updates is the same all the time."""
    decoder.set_num_updates(0)
    feed(decoder, "train:1:0")
    decoder.carried.end_attempt()

    def attempt(first):
        starts = []
        for i in (first, first + 1):
            decoder.set_num_updates(1)
            starts.append(feed(decoder, f"train:1:{i}"))
        decoder.carried.end_attempt()  # the task's optimizer_step, which fairseq calls each time
        return starts

    for first in (1, 3, 5):
        tries = [attempt(first) for _ in range(3)]
        for again in tries[1:]:
            for start, expected in zip(again, tries[0]):
                assert not started_from_nothing(start) and torch.equal(start, expected)


def test_lost_segment_is_said_and_the_state_before_it_used(decoder, caplog):
    """fairseq skips a training batch that runs out of memory, and never feeds it again."""
    decoder.set_num_updates(0)
    feed(decoder, "train:1:0")
    decoder.set_num_updates(1)
    feed(decoder, "train:1:1")
    saved = decoder.carried.training_state()["state"][0]["sum"]
    decoder.set_num_updates(1)
    with caplog.at_level("WARNING"):
        start = feed(decoder, "train:1:4")
    torch.testing.assert_close(start, saved.transpose(0, 1).expand(-1, 3, -1))
    assert "segments 2 to 3 of epoch 1 were lost" in caplog.text


def test_segment_after_one_that_ran_out_of_memory_can_be_fed_again(decoder):
    """The batch that is lost in its backward pass has left its state, and no update ends."""
    task = object.__new__(SegmentLanguageModelingTask)
    task.model = FairseqLanguageModel(decoder)
    starts = []
    for segment in (0, 1, 2, 2):
        task.begin_attempt()
        decoder.set_num_updates(0)
        starts.append(feed(decoder, f"train:1:{segment}"))
        if segment != 1:
            decoder.carried.end_attempt()  # the task's optimizer_step, after which scales overflow
    assert not started_from_nothing(starts[3]) and torch.equal(starts[2], starts[3])


@pytest.mark.parametrize("other", ["valid:1:3", "valid:1:0"])
def test_evaluation_does_not_jump(decoder, other):
    feed(decoder, "valid:1:0", training=False)
    feed(decoder, "valid:1:1", training=False)
    assert started_from_nothing(feed(decoder, other, training=False))


class Losses(SegmentDecoder):
    """Regularises the last layer's activations, by a weight that ends half way through training,
    and predicts two tokens ahead with its head."""

    has_auxiliary_losses = True
    num_targets = 2

    def auxiliary_losses(self, done, targets, further_targets=None):
        weight = 1.0 if done.context.progress < 0.5 else 0.0
        ahead = self.head.losses(done.features.transpose(0, 1), further_targets[0])
        return {
            "activation": weight * done.hidden[-1].pow(2).mean(),
            "second": ahead[targets != self.dictionary.pad()].mean(),
        }


def test_a_family_adds_losses_of_targets_activations_and_progress():
    decoder = Losses(dictionary_of(16), [Summing()], width=4).train()
    decoder.total_updates = 10
    tokens, targets, further = torch.randint(4, 16, (3, 2, 5))
    for update, weight in ((4, 1.0), (5, 0.0)):
        decoder.set_num_updates(update)
        losses, extra = decoder(tokens, targets=targets, further_targets=further[None])
        hidden = decoder.embedding(tokens).cumsum(1)
        logits = hidden @ decoder.embedding.weight.t()
        expected = torch.nn.functional.cross_entropy(logits.transpose(1, 2), targets)
        torch.testing.assert_close(losses.mean(), expected)
        auxiliary = extra["auxiliary_losses"]
        torch.testing.assert_close(auxiliary["activation"], weight * hidden.pow(2).mean())
        expected = torch.nn.functional.cross_entropy(logits.transpose(1, 2), further)
        torch.testing.assert_close(auxiliary["second"], expected)
    assert decoder.eval()(tokens, targets=targets, further_targets=further[None])[1] == {}


def test_losses_are_computed_without_logits_of_the_forward_pass(decoder, monkeypatch):
    """A head that can do without the logits of the whole vocabulary is not asked for them."""
    tokens, targets = torch.randint(16, (2, 2, 3))
    expected = decoder.head.losses(decoder.extract_features(tokens)[0], targets)
    monkeypatch.setattr(decoder.head, "logits", None)
    monkeypatch.setattr(decoder.head, "losses", lambda features, targets, training: expected)
    assert decoder(tokens, targets=targets)[0] is expected


def test_segment_beyond_the_longest_is_read_in_pieces(decoder):
    tokens = torch.randint(16, (2, 11))
    expected = decoder(tokens)[0]
    sizes = []
    decoder.layers[0].register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    decoder.max_segment = 4
    torch.testing.assert_close(decoder(tokens)[0], expected)
    assert sizes == [4, 4, 3]


@pytest.mark.parametrize("tied", [True, False])
def test_checkpoints_of_version_0_1_load(tied):
    """They call the head's parameters output_weight and output_bias."""
    decoder = SegmentDecoder(dictionary_of(16), [Summing()], width=4, tied=tied)
    torch.nn.init.normal_(decoder.head.bias)
    names = dict(decoder.named_parameters())
    assert set(decoder.state_dict()) == set(names)  # a tied weight is saved once
    old = {name.replace("head.", "output_"): p.detach().clone() for name, p in names.items()}
    other = SegmentDecoder(dictionary_of(16), [Summing()], width=4, tied=tied)
    other.load_state_dict(old)
    tokens = torch.randint(16, (2, 3))
    assert torch.equal(other(tokens)[0], decoder(tokens)[0])
    assert (other.head.weight is other.embedding.weight) == tied


def test_state_is_dropped_for_some_streams_in_training():
    """Each stream as a whole, in all layers, and never in evaluation."""
    decoder = SegmentDecoder(dictionary_of(16), [Summing(), Summing()], width=4)
    decoder.drop_state_probability = 0.3
    tokens = torch.randint(16, (200, 3))
    decoder(tokens, segment="train:1:0")
    before = decoder.carried.before("train:1:1", True)
    starts = []
    read = decoder._read_piece
    decoder._read_piece = lambda tokens, state, context: (
        starts.append(state) or read(tokens, state, context)
    )
    decoder(tokens, segment="train:1:1")
    dropped = (starts[0][0]["sum"][0] == 0).all(1)
    assert 0.2 < dropped.float().mean() < 0.4
    for layer, carried in zip(starts[0], before):
        assert torch.equal(layer["sum"][:, ~dropped], carried["sum"][:, ~dropped])
        assert not layer["sum"][:, dropped].any()
    # An update tried again starts from what was carried, and draws anew.
    decoder(tokens, segment="train:1:1")
    again = (starts[1][0]["sum"][0] == 0).all(1)
    assert not torch.equal(again, dropped)
    decoder.eval()
    decoder(tokens, segment="valid:1:0")
    decoder(tokens, segment="valid:1:1")
    assert (starts[-1][0]["sum"] != 0).all()
