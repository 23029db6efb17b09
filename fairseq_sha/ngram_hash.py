"""Which row of a table an n-gram has: a polynomial hash, the same in torch and in numpy."""

FACTOR = 1_540_483_477
PRIME = 2**31 - 1  # products of a hash and the factor, below 2^62, fit in 64 bits


def ngram_rows(text, orders, buckets):
    """The rows of the n-grams that end in each token, of tables one after another.

    Args:
        text (LongTensor or ndarray): tokens and those before, ``[max(orders) - 1 + T, B]``, int64
        orders (list of int): the lengths n
        buckets (int): rows of each length's table

    Returns:
        list, one ``[T, B]`` for each length
    """
    end = max(orders) - 1
    hashes, rows = 0, {}
    for n in range(1, end + 2):
        token = text[end + 1 - n : len(text) + 1 - n]
        hashes = (hashes + token + 1) * FACTOR % PRIME
        rows[n] = hashes % buckets
    return [i * buckets + rows[n] for i, n in enumerate(orders)]
