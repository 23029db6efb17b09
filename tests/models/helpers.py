"""What the tests of several model families do alike."""

import torch

VOCABULARY = 29


def randomise(module):
    """Give a module weights of a size at which every part of it shows in the output."""
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return module


def record_dropout(monkeypatch, *modules):
    """Have the modules of these names in the package drop nothing; returns the list of what they
    would drop from now on: pairs of a shape and a probability."""
    seen = []

    def record(x, p, training=True, shared=()):
        assert not shared
        if training and p > 0:
            seen.append((tuple(x.shape), p))
        return x

    for module in modules:
        monkeypatch.setattr(f"fairseq_sha.{module}.dropout", record)
    return seen


def check_one_token_at_a_time(model, length, **tolerance):
    """Generation, one token after the other, gives what a segment of so many tokens does."""
    tokens = torch.randint(VOCABULARY, (3, length))
    expected, _ = model(tokens)
    for gradients in (True, False):
        state = {}
        for t in range(length):
            with torch.set_grad_enabled(gradients):
                logits, _ = model(tokens[:, : t + 1], incremental_state=state)
            torch.testing.assert_close(logits[:, 0], expected[:, t], **tolerance)


def check_cuts(model, *cuts, **tolerance):
    """A text gives the same, however it is cut; each of ``cuts`` are lengths of its segments."""
    tokens = torch.randint(VOCABULARY, (2, sum(cuts[0])))

    def logits(lengths):
        pieces = enumerate(tokens.split(lengths, 1))
        return torch.cat([model(piece, segment=f"valid:1:{i}")[0] for i, piece in pieces], 1)

    expected = logits(cuts[0])
    for lengths in cuts[1:]:
        for gradients in (True, False):
            with torch.set_grad_enabled(gradients):
                torch.testing.assert_close(logits(lengths), expected, **tolerance)
