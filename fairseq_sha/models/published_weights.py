"""How the reference implementation of a model family names and shapes its weights."""

import re
from dataclasses import dataclass
from typing import Callable, Dict, Tuple

import torch

from fairseq_sha.errors import UserError


def _no_other_tensors(name, weights):
    return None


@dataclass(frozen=True)
class PublishedWeights:
    """Converts a state dict of a reference implementation to the parameters of our decoder.

    Several names of the reference may stand for one of ours: these tensors are tied, and one of
    them is enough.
    """

    #: What the names of a layer's tensors begin with in the reference, before the layer's number.
    layer_prefix: str
    #: The reference's names outside of layers, and ours.
    whole_names: Dict[str, str]
    #: The same within a layer. These are prefixes, which end before a dot or at the end.
    layer_names: Dict[str, str]
    #: Our names of the tensors that have one row for each symbol.
    vocabulary: Tuple[str, ...]
    #: From weights to the fields of the config that their shapes show.
    sizes: Callable
    #: Fields of the config that the user may give: what no shape shows, and what may be checked.
    settings: Tuple[str, ...] = ()
    #: From a name and the weights to the value that a tensor without a parameter of ours must have;
    #: None for all others.
    constant: Callable = _no_other_tensors
    #: Matches the names of tensors that have dimensions of size 1 which ours lack.
    singletons: str = "$^"
    #: From weights to the same in our layout.
    prepare: Callable = dict

    def our_name(self, name):
        """Our name of a tensor of the reference, or None if the model has no such tensor."""
        if name in self.whole_names:
            return self.whole_names[name]
        layer, rest = split_layer(name, self.layer_prefix)
        for reference, ours in self.layer_names.items():
            if layer is not None and (rest + ".").startswith(reference + "."):
                return f"layers.{layer}.{ours}{rest[len(reference) :]}"
        return None

    def reference_name(self, name):
        """The reference's name of one of our parameters.

        Raises:
            KeyError: the reference has no such tensor
        """
        for reference, ours in self.whole_names.items():
            if ours == name:
                return reference
        layer, rest = split_layer(name, "layers")
        for reference, ours in self.layer_names.items():
            if layer is not None and (rest + ".").startswith(ours + "."):
                return f"{self.layer_prefix}.{layer}.{reference}{rest[len(ours) :]}"
        raise KeyError(name)

    def convert(self, weights, shapes):
        """The weights under our names.

        Args:
            weights (dict): tensors by the reference's names, after :attr:`prepare`
            shapes (dict): shapes of our parameters by name; those of :attr:`vocabulary` with as
                many rows as the weights have symbols

        Returns:
            a dict of float32 Tensors by our names, one for each of ``shapes``

        Raises:
            UserError: a tensor that is missing, unknown, or of another shape; tied ones that differ
        """
        converted = {}
        for reference, value in weights.items():
            constant = self.constant(reference, weights)
            if constant is not None:
                if value.shape != constant.shape or not torch.allclose(
                    value.float(), constant.float()
                ):
                    raise UserError(f"{reference!r} is not what this model family computes there")
                continue
            name = self.our_name(reference)
            if name not in shapes:
                raise UserError(
                    f"{reference!r} has no place in this model; leave it out if it is not needed"
                )
            shape = shapes[name]
            squeezed = value.squeeze() if re.search(self.singletons, reference) else value
            if squeezed.shape != shape:
                rows = ", one row for each symbol" if name in self.vocabulary else ""
                raise UserError(
                    f"{reference!r} has the shape {list(value.shape)}; expected {list(shape)}{rows}"
                )
            value = squeezed.float()
            if name in converted and not torch.equal(converted[name], value):
                raise UserError(
                    f"{reference!r} differs from {self.reference_name(name)!r}; the two are tied, "
                    "so they must be the same"
                )
            converted[name] = value
        missing = sorted(self.reference_name(name) for name in set(shapes) - set(converted))
        if missing:
            raise UserError(f"the weights lack {', '.join(map(repr, missing))}")
        return converted


def split_layer(name, prefix):
    """The number of the layer that a tensor belongs to, as a string, and its name there; None and
    the name for a tensor outside of layers."""
    match = re.match(rf"{re.escape(prefix)}\.(\d+)\.(.*)", name)
    return match.groups() if match else (None, name)


def num_layers(weights, prefix):
    """The number of layers whose tensors' names begin with ``prefix``."""
    layers = [split_layer(name, prefix)[0] for name in weights]
    return 1 + max((int(layer) for layer in layers if layer is not None), default=-1)


def shape_of(weights, name, dimensions):
    """The shape of a tensor that must be there.

    Raises:
        UserError: there is none, or it has another number of dimensions
    """
    if name not in weights:
        raise UserError(f"the weights lack {name!r}; are they of this model family?")
    shape = weights[name].shape
    if len(shape) != dimensions:
        raise UserError(f"{name!r} has the shape {list(shape)}; expected {dimensions} dimensions")
    return shape
