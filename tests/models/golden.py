"""How a model is checked against numbers of the published implementations."""

import torch
from omegaconf import OmegaConf

from tests.conftest import dictionary_of


def parameters(case):
    """The reference's parameters by its names."""
    return {k[len("param/") :]: v for k, v in case.items() if k.startswith("param/")}


def build(family, decoder, case, **fields):
    """A decoder with the parameters and the sizes of a golden case.

    Args:
        family (Family): of :mod:`fairseq_sha.models.family`
        decoder (type): its decoder
        case (dict): of ``golden_cases``
        **fields: of the config, which no shape shows
    """
    published = family.published
    weights = published.prepare(parameters(case), fields)
    no_dropout = {name: 0.0 for name in vars(family.config()) if name.startswith("drop")}
    cfg = family.config(**{**no_dropout, **published.sizes(weights), **fields})
    # The reference has as many rows as symbols; with bands, those before </s> have none.
    missing = dictionary_of(0).eos() if getattr(cfg, "cutoffs", []) else 0
    model = decoder(OmegaConf.structured(cfg), dictionary_of(published.num_rows(weights) + missing))
    shapes = {name: p.shape for name, p in model.named_parameters()}
    model.load_state_dict(published.convert(weights, shapes, model.tied_parameters()))
    return model


def our_name(published, tied, name):
    """Our name of a tensor of the reference; ``tied`` is of ``tied_parameters``."""
    name = published.our_name(name)
    return tied.get(name, name)


def segments(tokens, lengths):
    """Inputs and targets of each segment, ``[B, T]``, of ``tokens [B, total]``."""
    start = 0
    for length in lengths.flatten().tolist():
        piece = tokens[:, start : start + length + 1].long()
        yield piece[:, :-1], piece[:, 1:]
        start += length


def token_losses(logits, targets):
    """In nats, ``[B, T]``."""
    losses = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), reduction="none"
    )
    return losses.view(targets.shape)


def check_gradients(model, case, family, **fields):
    """Each gradient within 1e-3 of its largest reference value; the same set of them."""
    published, tied = family.published, model.tied_parameters()
    expected = {k[len("grad/") :]: v for k, v in case.items() if k.startswith("grad/")}
    expected = {
        our_name(published, tied, name): value
        for name, value in published.prepare(expected, fields).items()
    }
    gradients = {name: p.grad for name, p in model.named_parameters()}
    assert set(expected) == set(gradients)
    for name, gradient in gradients.items():
        reference = expected[name].reshape(gradient.shape)
        bound = 1e-3 * reference.abs().max() + 1e-8
        assert (gradient - reference).abs().max() <= bound, name
