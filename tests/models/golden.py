"""How a model is checked against numbers of the published implementations."""

import torch


def parameters(case):
    """The reference's parameters by its names."""
    return {k[len("param/") :]: v for k, v in case.items() if k.startswith("param/")}


def load(model, case, our_name):
    """Give ``model`` the case's parameters; ``our_name`` maps the reference's names to ours, or to
    None for what takes no part."""
    shapes = {name: p.shape for name, p in model.named_parameters()}
    named = [(our_name(name), value) for name, value in parameters(case).items()]
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


def check_gradients(model, case, our_name):
    """Each gradient within 1e-3 of its largest reference value; the same set of them."""
    expected = {our_name(k[len("grad/") :]): v for k, v in case.items() if k.startswith("grad/")}
    gradients = {name: p.grad for name, p in model.named_parameters()}
    assert set(expected) == set(gradients)
    for name, gradient in gradients.items():
        reference = expected[name].reshape(gradient.shape)
        bound = 1e-3 * reference.abs().max() + 1e-8
        assert (gradient - reference).abs().max() <= bound, name
