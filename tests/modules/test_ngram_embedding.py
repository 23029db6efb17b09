"""N-gram embeddings against a loop over positions."""

import torch

from fairseq_sha.modules import NGramEmbedding
from fairseq_sha.ngram_hash import FACTOR, PRIME, ngram_rows

ORDERS, BUCKETS, WIDTH = [2, 4], 50, 3


def by_loop(module, text):
    """What each position of a text (a list of tokens) adds, from the definition."""
    table, output = module.embedding.weight, []
    for position in range(len(text)):
        rows = []
        for i, n in enumerate(ORDERS):
            hashed = 0
            for token in reversed(([0] * n + text)[position + 1 : position + 1 + n]):
                hashed = (hashed + token + 1) * FACTOR % PRIME
            rows.append(table[i * BUCKETS + hashed % BUCKETS])
        output.append(sum(rows))
    return torch.stack(output)


def test_equals_a_loop_over_positions_in_any_segments():
    torch.manual_seed(1)
    module = NGramEmbedding(ORDERS, BUCKETS, WIDTH)
    texts = torch.randint(260, (11, 2))
    state, parts = {}, []
    for segment in texts.split([1, 2, 5, 3]):
        added, state = module(segment, state)
        parts.append(added)
    expected = [by_loop(module, text.tolist()) for text in texts.t()]
    assert torch.allclose(torch.cat(parts), torch.stack(expected, 1), atol=1e-6)
    assert torch.equal(state["tokens"], texts[-3:])


def test_rows_are_spread_over_each_table():
    rows = ngram_rows(torch.randint(205, (20_002, 1)), [2, 3], 1000)
    first, second = (row[:, 0] for row in rows)
    assert first.max() < 1000 <= second.min()
    for row in (first, second - 1000):
        counts = torch.bincount(row, minlength=1000).float()
        # Poisson: 20 of each in the mean, standard deviation 4.5
        assert counts.std() < 6 and counts.min() > 0
