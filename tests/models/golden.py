"""How a model is checked against numbers of the published implementations."""

import torch


def parameters(case):
    """The reference's parameters by its names."""
    return {k[len("param/") :]: v for k, v in case.items() if k.startswith("param/")}


def load(model, case, family):
    """Give ``model`` the case's parameters; ``family`` is its
    :class:`~fairseq_sha.models.published_weights.PublishedWeights`."""
    shapes = {name: p.shape for name, p in model.named_parameters()}
    weights = family.prepare(parameters(case))
    named = [(family.our_name(name), value) for name, value in weights.items()]
    model.load_state_dict({name: v.reshape(shapes[name]) for name, v in named if name in shapes})
    return model


def segments(tokens, lengths):
    """Inputs and targets of each segment, ``[B, T]``, of ``tokens [B, total]``."""
    start = 0
    for length in map(int, lengths):
        piece = tokens[:, start : start + length + 1].long()
        yield piece[:, :-1], piece[:, 1:]
        start += length


def token_losses(logits, targets):
    """In nats, ``[B, T]``."""
    losses = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), reduction="none"
    )
    return losses.view(targets.shape)


def check_gradients(model, case, family):
    """Each gradient within 1e-3 of its largest reference value; the same set of them."""
    expected = {k[len("grad/") :]: v for k, v in case.items() if k.startswith("grad/")}
    expected = {family.our_name(name): v for name, v in family.prepare(expected).items()}
    gradients = {name: p.grad for name, p in model.named_parameters()}
    assert set(expected) == set(gradients)
    for name, gradient in gradients.items():
        reference = expected[name].reshape(gradient.shape)
        bound = 1e-3 * reference.abs().max() + 1e-8
        assert (gradient - reference).abs().max() <= bound, name
