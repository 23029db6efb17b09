"""How likely a model is to continue a context in given ways, and how it continues it until a string
appears: what test harnesses ask of a model.

Texts are bytes. A model carries state, so all of a context is read, however long it is.
"""

import torch

from fairseq_sha.errors import UserError
from fairseq_sha.models.heads import MAX_LOGITS, widen

#: Tokens that are generated before the first look for the end.
FIRST_TOKENS = 32


@torch.no_grad()
def log_likelihoods(model, context, continuations):
    """Log-likelihoods of continuations of a context.

    Tokens are those of the whole text: what is scored is every token of context and continuation
    that is not one of the context's own. A piece that reaches over the border, or a word that the
    continuation completes, is scored as a whole. Segments begin where
    :meth:`~fairseq_sha.trained_model.TrainedModel.costs` begins them.

    Args:
        model (~fairseq_sha.trained_model.TrainedModel): the model
        context (bytes): may be empty; then the start of a text comes before the continuation
        continuations (list of bytes): each of which follows the context

    Returns:
        for each of them its log-likelihood in nats, and whether it is what greedy generation gives

    Raises:
        UserError: the model has no tokens for a text
    """
    before = model.encode(context).tolist()
    wholes = [model.encode(context + continuation) for continuation in continuations]
    firsts = [_common(before, whole.tolist()) for whole in wholes]
    length = model.cfg.task.tokens_per_sample
    # The first segments are the same for all, and read once.
    shared = min(firsts, default=0) // length * length
    state = None
    if shared:
        for segment in _inputs(model, wholes[0])[:shared].split(length):
            _, state = model.decoder.read(segment, state)
    return [_score(model, *pair, shared, state, length) for pair in zip(wholes, firsts)]


def _common(first, second):
    """How many tokens two lists have in common at their beginnings."""
    pairs = enumerate(zip(first, second))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))


def _inputs(model, tokens):
    """What the model reads to predict these tokens: ``[length, 1]``."""
    return torch.cat([tokens.new_tensor([model.codec.start]), tokens[:-1]])[:, None].to(
        model.device
    )


def _score(model, tokens, first, begin, state, length):
    """Log-likelihood of ``tokens[first:]``, and whether they are the greedy ones.

    Args:
        tokens (LongTensor): of the whole text
        first (int): where the continuation begins
        begin (int): how many tokens ``state`` has read
    """
    total, is_greedy = 0.0, True
    inputs, targets = _inputs(model, tokens), tokens[:, None].to(model.device)
    for i in range(begin, len(tokens), length):
        features, state = model.decoder.read(inputs[i : i + length], state)
        scored = slice(max(first - i, 0), None)
        features, wanted = features[scored], targets[i : i + length][scored]
        if len(wanted):
            total -= model.decoder.head.losses(features, wanted).double().sum().item()
            is_greedy = is_greedy and bool((_greedy(model, features) == wanted).all())
    return total, is_greedy


def _greedy(model, features):
    """The most probable token that generation may choose after each position, ``[T, B]``."""
    rows = max(1, MAX_LOGITS // len(model.dictionary))
    dictionary = model.dictionary
    never = [dictionary.bos(), dictionary.pad(), *model.codec.not_generated()]
    chosen = []
    for piece in features.flatten(0, -2).split(rows):
        logits = widen(model.decoder.head.logits(piece))
        logits[:, never] = -float("inf")
        chosen.append(logits.argmax(-1))
    return torch.cat(chosen).view(features.shape[:-1])


def continue_until(model, context, until, most, **options):
    """Continue a context until a string appears.

    Args:
        model (~fairseq_sha.trained_model.TrainedModel): the model
        context (bytes): may be empty
        until (list of bytes): strings that end the continuation; they are left out
        most (int): tokens, at most
        **options: of :meth:`~fairseq_sha.trained_model.TrainedModel.continuation`

    Returns:
        bytes
    """
    until = [end for end in until if end]
    tokens = prompt = model.encode(context)
    while len(tokens) - len(prompt) < most:
        done = len(tokens) - len(prompt)
        # fairseq generates a number of tokens. Each time there are twice as many in all, so that
        # what comes before them is read again only a few times.
        size = min(max(done, FIRST_TOKENS), most - done) if until else most
        tokens = torch.cat([tokens, model.continue_tokens(tokens, size, **options)])
        text = model.codec.decode(tokens[len(prompt) :])
        places = [text.find(end) for end in until if end in text]
        if places:
            return text[: min(places)]
    return model.codec.decode(tokens[len(prompt) :])


def generation_options(do_sample=False, temperature=1.0, top_k=None, top_p=None):
    """fairseq's options of generation, from those of other libraries. Without ``do_sample``, or
    with a temperature of 0, generation is greedy.

    Raises:
        UserError: values that make no sense
    """
    if not do_sample or temperature == 0:
        return {"beam": 1}
    if temperature < 0 or (top_k is not None and top_k < 0) or not 0 < (top_p or 1) <= 1:
        raise UserError(
            f"temperature {temperature}, top_k {top_k}, top_p {top_p}: give a positive "
            "temperature, a number of tokens and a share of at most 1"
        )
    if top_k and top_p and top_p < 1:
        raise UserError(f"top_k {top_k} and top_p {top_p}: choose one; the other would be ignored")
    return {
        "beam": 1,
        "sampling": True,
        "temperature": temperature,
        "sampling_topk": top_k or -1,
        "sampling_topp": top_p if top_p and top_p < 1 else -1.0,
    }
