"""How many answers greedy prediction gets right, where each line of a text is a question, a mark
and an answer."""

import os
from typing import NamedTuple

import numpy as np

from fairseq_sha.errors import UserError
from fairseq_sha.evaluation.evaluate import evaluate, inputs_of


class Answers(NamedTuple):
    """What was right, each token given the right ones before it. A line is right if all tokens of
    its answer are, which are then those that greedy generation writes."""

    tokens: int
    correct: int
    lines: int
    lines_correct: int
    bits: float  # of all answers

    def __str__(self):
        return (
            f"{self.correct / self.tokens:.2%} of {self.tokens:,} tokens of answers right, "
            f"{self.lines_correct / self.lines:.2%} of {self.lines:,} answers; "
            f"{self.bits / self.tokens:.4f} bits per token"
        )


def mark_of(codec, text):
    """The token that a mark is; UserError if it is not one token that the model knows."""
    tokens = codec.encode(os.fsencode(text))
    unusable = codec.is_forbidden(np.asarray(tokens)) | (tokens.numpy() == codec.dictionary.unk())
    if len(tokens) != 1 or unusable.any():
        raise UserError(f"--answers-after '{text}': not one token of the model; give one")
    return int(tokens[0])


def places(tokens, mark, end):
    """Which tokens belong to answers, and in which line each token is.

    Args:
        tokens (ndarray): of a text, ``[N]``
        mark (int): the token after which a line's answer begins
        end (int): the token that ends a line

    Returns:
        bool ``[N]``, int ``[N]``
    """
    index = np.arange(len(tokens))
    ends = tokens == end
    last_mark = np.maximum.accumulate(np.where(tokens == mark, index, -1))
    last_end = np.maximum.accumulate(np.where(ends, index, -1))
    # A token is of an answer if a mark of its own line came before it.
    after_mark = np.append(False, last_mark[:-1] > last_end[:-1])
    return after_mark & ~ends, np.cumsum(ends) - ends


def find(corpus, split, codec, mark):
    """The answers among the predictions of a split: which of them belong to one, and in which line
    each is, as :func:`places` has it.

    Raises:
        UserError: the split has no answers
    """
    tokens = np.asarray(corpus.tokens)
    is_answer, line = (of[1:] for of in places(tokens, mark, codec.dictionary.eos()))
    if not is_answer.any():
        raise UserError(
            f"--answers-after: no line of {split} has an answer after this mark; give the one that "
            "its lines have"
        )
    return is_answer, line


def count(model, corpus, split, codec, policy, found, costs):
    """Read a split once more and count which answers are right.

    Args:
        model, corpus, split, codec, policy: as for
            :func:`~fairseq_sha.evaluation.evaluate.evaluate`
        found (pair of ndarray): the answers, as :func:`find` gives them
        costs (ndarray): of each prediction in nats, ``[len(corpus)]``

    Returns:
        :class:`Answers`
    """
    is_answer, line = found
    _, wrong = evaluate(model, corpus, split, codec, policy, losses=mistakes)
    lines, of_line = np.unique(line[is_answer], return_inverse=True)
    mistaken = np.bincount(of_line, weights=wrong[is_answer])
    return Answers(
        tokens=int(is_answer.sum()),
        correct=int((wrong[is_answer] == 0).sum()),
        lines=len(lines),
        lines_correct=int((mistaken == 0).sum()),
        bits=float(costs[is_answer].sum(dtype=np.float64) / np.log(2)),
    )


def mistakes(model, batch):
    """1 for each target that is not the most probable token, otherwise 0, ``[B, T]``."""
    net_input, targets = inputs_of(model, batch)
    # Without an adaptive softmax, the model's own output has the same order; with one, it has none.
    predicted = model.get_normalized_probs(model(**net_input), log_probs=True).argmax(-1)
    return (predicted != targets).float()
