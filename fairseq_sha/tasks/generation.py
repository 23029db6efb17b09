"""fairseq's generation for text that is one stream: it has no end, and any symbol may be forced."""

import math

import torch
from fairseq.search import Sampling

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

    fairseq reads a prompt one token a step. What all prompts of a batch have in length is read here
    in segments instead, and fairseq goes on from the state that they leave.

    Args:
        generator (~fairseq.sequence_generator.SequenceGenerator)
        models (list): one model, or an ensemble, which reads prompts as fairseq does
        sample (dict): the batch
        prompts (LongTensor): ``[B, longest]``, padded at the end
        length (int): tokens of prompt and continuation together
        start (int): the token before a text
        segment_length (int): tokens of the segments in which prompts are read

    Returns:
        fairseq's hypotheses, which begin with the prompts
    """
    decoder = models[0].decoder
    shortest = int(prompts.ne(generator.pad).sum(1).min()) if prompts.size(1) else 0
    known = min(shortest, length - 1)
    if len(models) > 1 or not isinstance(decoder, SegmentDecoder) or known < 1:
        generator.min_len = length  # no hypothesis ends before it
        return generator.generate(models, sample, prefix_tokens=prompts, bos_token=start)

    inputs = torch.cat([prompts.new_full((len(prompts), 1), start), prompts[:, :known]], 1)
    state, scores = None, []
    for begin in range(0, known, segment_length):
        piece = inputs[:, begin : begin + segment_length + 1]
        features, state = decoder.read(piece[:, :-1].t(), state)
        logits = decoder.head.logits(features) / generator.temperature
        chosen = logits.float().log_softmax(-1).gather(-1, piece[:, 1:].t().unsqueeze(-1))
        scores.append(chosen.squeeze(-1).t())
    scores = torch.cat(scores, 1)

    limits = generator.max_len_a, generator.max_len_b
    generator.max_len_a, generator.max_len_b = 0, length - known
    generator.min_len = length - known
    beams = generator.beam_size
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
        generator.max_len_a, generator.max_len_b = limits
    for prompt, prompt_scores, row in zip(prompts[:, :known], scores, hypotheses):
        for hypothesis in row:
            own = hypothesis["positional_scores"]
            hypothesis["tokens"] = torch.cat(
                [prompt.to(hypothesis["tokens"]), hypothesis["tokens"]]
            )
            hypothesis["positional_scores"] = torch.cat([prompt_scores.to(own), own])
            hypothesis["score"] = hypothesis["positional_scores"].sum()
            if generator.normalize_scores:
                hypothesis["score"] /= (known + len(own)) ** generator.len_penalty
    return hypotheses
