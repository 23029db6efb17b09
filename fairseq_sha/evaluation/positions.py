"""What predictions cost by how much they can see: the tokens since the start of a stream, of a
segment or of a window."""

import numpy as np

from fairseq_sha.evaluation.policies import Carried

#: What distances are counted from, for messages.
STARTS = {
    "stream": "tokens since the start of the stream",
    "segment": "tokens since the start of the segment",
    "window": "tokens since the start of the window",
}


def distances(policy, batches, size):
    """How many tokens there are from a start to each prediction, the token that it reads included.

    With carried state, a stream starts from nothing, and a segment from the state of the one before
    it. Without, each segment or window starts from nothing.

    Args:
        policy (~fairseq_sha.evaluation.policies.Policy): how the text is read
        batches: those of the policy
        size (int): predictions of the text

    Returns:
        int64 ``[size]``, at least 1, by keys of :data:`STARTS`: ``stream`` and ``segment``,
        ``segment``, or ``window``
    """
    within = np.zeros(size, dtype=np.int64)
    before = np.zeros(size, dtype=np.int64)
    read = {}  # tokens of each stream that were read in earlier batches
    for index in range(len(batches)):
        for row, (first, context, count) in enumerate(batches.rows(index)):
            within[first : first + count] = np.arange(context + 1, context + count + 1)
            before[first : first + count] = read.get(row, 0)
            read[row] = read.get(row, 0) + count
    if not isinstance(policy, Carried):
        return {"window": within}
    if not policy.has_state:
        return {"segment": within}
    return {"stream": before + within, "segment": within}


def by_position(distance, costs, sizes):
    """The cost of predictions at distances of 1, 2 to 3, 4 to 7, and so on.

    Args:
        distance (ndarray): of each prediction, int64 ``[N]``
        costs (ndarray): of each prediction in nats, ``[N]``
        sizes (ndarray): bytes that each stands for, ``[N]``

    Returns:
        list of dicts: ``first`` and ``last`` distance, ``tokens``, ``bytes`` and ``bits``
    """
    bins = np.frexp(distance)[1] - 1  # the logarithm of base 2, rounded down
    tokens, of_bytes = np.bincount(bins), np.bincount(bins, weights=sizes)
    bits = np.bincount(bins, weights=costs / np.log(2))
    return [
        {
            "first": 2**i,
            "last": min(2 ** (i + 1) - 1, int(distance.max())),
            "tokens": int(tokens[i]),
            "bytes": int(of_bytes[i]),
            "bits": float(bits[i]),
        }
        for i in range(len(tokens))
        if tokens[i]
    ]


def table(start, rows):
    """The rows of :func:`by_position` as Markdown.

    Args:
        start (str): of :data:`STARTS`
    """
    lines = [f"| {STARTS[start]} | tokens | bits per byte |", "| --- | --- | --- |"]
    for row in rows:
        span = f"{row['first']:,}"
        if row["last"] > row["first"]:
            span += f" to {row['last']:,}"
        bits = f"{row['bits'] / row['bytes']:.4f}" if row["bytes"] else "–"
        lines.append(f"| {span} | {row['tokens']:,} | {bits} |")
    return "\n".join(lines)
