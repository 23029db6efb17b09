"""fairseq's generation for text that is one stream: it has no end, and any symbol may be forced."""

import math

import torch
from fairseq.search import BeamSearch, Sampling

from fairseq_sha.errors import UserError
from fairseq_sha.models.heads import widen
from fairseq_sha.models.segment_decoder import SegmentDecoder


class SamplingOrForced(Sampling):
    """fairseq's sampling, which also works where only one symbol is allowed: in a prompt and at the
    end. fairseq draws there too, and fails if that symbol's probability underflows."""

    def step(self, step, lprobs, *args, **kwargs):
        allowed = lprobs > -math.inf
        forced = allowed & (allowed.sum(-1, keepdim=True) == 1)
        given = lprobs.masked_fill(~forced, 0.0).sum(-1)
        scores, symbols, beams = super().step(
            step, lprobs.masked_fill(forced, 0.0), *args, **kwargs
        )
        return scores + given, symbols, beams


@torch.no_grad()
def continue_prompts(generator, models, sample, prompts, length, start, segment_length):
    """Have fairseq's generator continue prompts.

    fairseq reads a prompt one token per step. Here a prompt is read in segments, and fairseq goes
    on from the state that they leave.

    Prompts of one length are continued together, the others separately. In a mixed batch fairseq
    would let the shorter ones end, or choose excluded symbols, until the longest one is read.

    Args:
        generator (~fairseq.sequence_generator.SequenceGenerator): its limits of length are not used
        models (list): one model or an ensemble
        sample (dict): the batch
        prompts (LongTensor): ``[B, longest]``, padded at the end
        length (int): tokens of prompt and continuation together
        start (int): the token before a text
        segment_length (int): tokens of the segments in which prompts are read

    Returns:
        fairseq's hypotheses, which begin with the prompts

    Raises:
        UserError: an option that sets another length
    """
    if generator.match_source_len:
        raise UserError(
            "--match-source-len: the length of a text is set by --max-len-b here; leave it out"
        )
    limits = generator.max_len_a, generator.max_len_b, generator.min_len
    lengths = prompts.ne(generator.pad).sum(1)
    identities = sample.get("id", torch.arange(len(prompts), device=prompts.device))
    hypotheses = [None] * len(prompts)
    try:
        for known in sorted(set(lengths.tolist())):
            rows = lengths.eq(known).nonzero().squeeze(1)
            # fairseq needs nothing else of a batch without an encoder.
            group = {
                "id": identities[rows],
                "net_input": {"src_tokens": sample["net_input"]["src_tokens"][rows]},
            }
            continued = _continue_together(
                generator, models, group, prompts[rows, :known], length, start, segment_length
            )
            for row, hypothesis in zip(rows.tolist(), continued):
                hypotheses[row] = hypothesis
    finally:
        generator.max_len_a, generator.max_len_b, generator.min_len = limits
    return hypotheses


def _continue_together(generator, models, sample, prompts, length, start, segment_length):
    """:func:`continue_prompts` for prompts of one length, none of them padded."""
    # fairseq must choose at least one token itself, which may be the last one of the prompt.
    known = min(prompts.size(1), length - 1)
    if known < 1 or not _can_skip_prompts(generator, models):
        _set_length(generator, length)
        return generator.generate(models, sample, prefix_tokens=prompts, bos_token=start)

    decoder, beams = models[0].decoder, generator.beam_size
    inputs = torch.cat([torch.full_like(prompts[:, :1], start), prompts[:, :known]], 1)
    state, scores = _read_prompts(generator, decoder, inputs, segment_length)
    _set_length(generator, length - known)
    decoder.generation_start = [
        {key: tensor.repeat_interleave(beams, 1) for key, tensor in layer.items()}
        for layer in state
    ]
    try:
        hypotheses = generator.generate(
            models,
            sample,
            prefix_tokens=prompts[:, known:],
            bos_token=inputs[:, -1].repeat_interleave(beams),
        )
    finally:
        decoder.generation_start = None
    for prompt, prompt_scores, row in zip(prompts[:, :known], scores, hypotheses):
        for hypothesis in row:
            _prepend(generator, prompt, prompt_scores, hypothesis)
    return hypotheses


def _set_length(generator, length):
    """Have all hypotheses end after this number of tokens."""
    generator.max_len_a, generator.max_len_b, generator.min_len = 0, length, length


def _can_skip_prompts(generator, models):
    """Whether the state after a prompt is all that generation needs to know of it."""
    return (
        len(models) == 1
        and isinstance(models[0].decoder, SegmentDecoder)
        and generator.lm_model is None
        and generator.repeat_ngram_blocker is None
        and isinstance(generator.search, (BeamSearch, Sampling))
    )


def _read_prompts(generator, decoder, inputs, segment_length):
    """Read ``inputs [B, length + 1]``, except for the last token of each.

    Returns:
        the state, and fairseq's score of each token after the first, ``[B, length]``
    """
    state, scores = None, []
    for begin in range(0, inputs.size(1) - 1, segment_length):
        piece = inputs[:, begin : begin + segment_length + 1].t()
        features, state = decoder.read(piece[:-1], state)
        logits = widen(decoder.head.logits(features) / generator.temperature)
        scores.append(logits.log_softmax(-1).gather(-1, piece[1:].unsqueeze(-1)).squeeze(-1))
    scores = torch.cat(scores).t()
    unknown = inputs[:, 1:].eq(generator.unk)
    return state, torch.where(unknown, scores - generator.unk_penalty, scores)


def _prepend(generator, prompt, prompt_scores, hypothesis):
    """Make a hypothesis of a continuation one of prompt and continuation."""
    tokens, scores = hypothesis["tokens"], hypothesis["positional_scores"]
    hypothesis["tokens"] = torch.cat([prompt.to(tokens), tokens])
    hypothesis["positional_scores"] = torch.cat([prompt_scores.to(scores), scores])
    hypothesis["score"] = hypothesis["positional_scores"].sum()
    if generator.normalize_scores:
        hypothesis["score"] /= len(hypothesis["tokens"]) ** generator.len_penalty
