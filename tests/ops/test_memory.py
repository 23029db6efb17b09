import pytest
import torch

from fairseq_sha.ops import last_rows, next_memory, rows_to_attend


@pytest.mark.parametrize("number", [0, 1, 4, 6, 9, 20])
@pytest.mark.parametrize("remembered", [0, 5])
def test_the_last_rows_of_memory_and_segment_are_kept(number, remembered):
    memory, segment = torch.randn(remembered, 2, 3), torch.randn(4, 2, 3)
    both = torch.cat([memory, segment])
    expected = both[max(len(both) - number, 0) :]
    assert torch.equal(next_memory(memory, segment, number), expected)
    assert torch.equal(last_rows(both, number), expected)


def test_a_memory_does_not_hold_on_to_the_segment():
    segment = torch.randn(4, 2, 3)
    memory = next_memory(segment[:0], segment, 2)
    assert memory.untyped_storage().nbytes() == memory.numel() * 4


def test_memory_is_kept_apart_where_there_are_gradients():
    memory, segment = torch.randn(2, 1, 3), torch.randn(4, 1, 3)
    both = torch.cat([memory, segment])
    rows, apart = rows_to_attend(memory, segment, both)
    assert rows is segment and apart is memory
    with torch.no_grad():
        rows, apart = rows_to_attend(memory, segment, both)
    assert rows is both and apart is None
