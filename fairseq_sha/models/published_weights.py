"""How the reference implementation of a model family names and shapes its weights."""

import re
from dataclasses import dataclass, field
from typing import Any, Callable, Dict, NamedTuple, Tuple

import torch

from fairseq_sha.errors import UserError

#: Our names of the parameters with a row for each symbol of a band or of all, which may be tied.
TABLE = r"(embedding|head)\.(weight|tail_weights\.\d+)$"


def _no_other_tensors(name, weights):
    return None


def _as_they_are(weights, settings):
    return dict(weights)


def _same_value(value, sizes):
    return value


class Setting(NamedTuple):
    """What becomes of a value that the user gives under the reference's name."""

    #: The field of the config that it sets.
    field: str
    #: From the reference's value and :attr:`PublishedWeights.sizes` to the field's value.
    convert: Callable[[Any, Dict[str, Any]], Any] = _same_value


def same_settings(*names):
    """Settings that the reference and the config call and write alike."""
    return {name: Setting(name) for name in names}


@dataclass(frozen=True)
class PublishedWeights:
    """Converts a state dict of a reference implementation to the parameters of our decoder.

    Where the reference saves tied tensors under several names, one of them is enough.
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
    #: What the user may give, by the reference's names: what no shape shows, and what may be
    #: checked.
    settings: Dict[str, Setting] = field(default_factory=dict)
    #: From a name and the weights to the value that a tensor without a parameter of ours must have;
    #: None for all others.
    constant: Callable = _no_other_tensors
    #: Matches the names of tensors that have dimensions of size 1 which ours lack.
    singletons: str = "$^"
    #: From weights and the user's settings, a dict by the reference's names, to the same weights in
    #: our layout.
    prepare: Callable = _as_they_are

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

    def num_rows(self, weights):
        """How many symbols prepared weights have rows for, in all bands together."""
        rows = {}
        for name, value in weights.items():
            match = re.match(TABLE, self.our_name(name) or "")
            if match:
                rows[match[2]] = value.dim() and len(value)
        return sum(rows.values())

    def convert(self, weights, shapes, tied):
        """The weights under our names.

        Args:
            weights (dict): tensors by the reference's names, after :attr:`prepare`
            shapes (dict): shapes of our parameters by name; those of :attr:`vocabulary` with as
                many rows as the weights have symbols
            tied (dict): the parameters that are others of ``shapes``, and which: names

        Returns:
            a dict of float32 Tensors by our names, one for each of ``shapes``

        Raises:
            UserError: a tensor that is missing, unknown, or of another shape; tied ones that differ
        """
        converted, sources = {}, {}
        for reference, value in weights.items():
            constant = self.constant(reference, weights)
            if constant is not None:
                if value.shape != constant.shape or not torch.allclose(
                    value.float(), constant.float()
                ):
                    raise UserError(f"{reference!r} is not what this model family computes there")
                continue
            name = self.our_name(reference)
            name = tied.get(name, name)
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
                    f"{reference!r} differs from {sources[name]!r}; the two are tied, so they must "
                    "be the same"
                )
            converted[name], sources[name] = value, reference
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


#: More than any published model has.
MAX_BANDS = 8


def adaptive_names(tables, projections, layers, layer_projections):
    """The reference's names of an adaptive input and softmax, and ours.

    Args:
        tables, projections, layers, layer_projections (str): what the reference calls the
            embeddings, their projections, the layers of the softmax and theirs, before the number
            of the band. A table or layer ends with ``.weight`` or not
    """
    names = {}
    for i in range(MAX_BANDS):
        weight, bias = "weight", "bias"
        if i > 0:
            weight, bias = f"tail_weights.{i - 1}", f"tail_biases.{i - 1}"
        for end in ("", ".weight"):
            names[f"{tables}.{i}{end}"] = f"embedding.{weight}"
        names[f"{projections}.{i}"] = f"embedding.projections.{i}"
        names[f"{layers}.{i}.weight"] = f"head.{weight}"
        names[f"{layers}.{i}.bias"] = f"head.{bias}"
        names[f"{layer_projections}.{i}"] = f"head.projections.{i}"
    return names


def adaptive_sizes(weights, width, tied_projections, names):
    """The fields of an :class:`~fairseq_sha.models.embeddings.AdaptiveConfig` that prepared weights
    show.

    Args:
        weights (dict): tensors by the reference's names
        width (int): ``H``
        tied_projections (str): as the reference ties them, unless each projection is there twice
            and all are the same or none
        names (tuple of str): the arguments of :func:`adaptive_names`
    """
    tables, projections, layers, layer_projections = names
    shapes = []
    for i in range(MAX_BANDS):
        tied = (f"{layers}.{i}.weight", f"{tables}.{i}.weight", f"{tables}.{i}")
        shapes += [shape_of(weights, name, 2) for name in tied if name in weights][:1]
    if len(shapes) < 2:
        return {"cutoffs": []}
    rows, widths = zip(*shapes)
    sizes = {
        "cutoffs": [sum(rows[: i + 1]) for i in range(len(rows) - 1)],
        "div_val": _div_val(widths),
        "embedding_width": 0 if widths[0] == width else widths[0],
    }
    pairs = [(f"{projections}.{i}", f"{layer_projections}.{i}") for i in range(len(shapes))]
    if any(name in weights for pair in pairs for name in pair):
        both = all(name in weights for pair in pairs for name in pair)
        same = {torch.equal(weights[a], weights[b]) for a, b in pairs} if both else set()
        known = {(False,): "none", (True,): "all"}
        sizes["tied_projections"] = known.get(tuple(same), tied_projections)
    return sizes


def _div_val(widths):
    """By what the bands' widths are divided: a whole number if one makes these widths."""
    div_val = widths[0] / max(widths[1], 1)
    whole = round(div_val)
    if whole > 0 and all(int(widths[0] // whole**i) == width for i, width in enumerate(widths)):
        return float(whole)
    return div_val


def _tied_projections(value, sizes):
    """Of a config, for the reference's ``tie_projs``: whether each band's projection is tied."""
    bands = len(sizes["cutoffs"]) + 1
    forms = {"all": [True], "tails": [False, True], "none": [False]}
    given = list(value) if hasattr(value, "__iter__") else [value]
    for form, pattern in forms.items():
        if given == (pattern + pattern[-1:] * bands)[:bands]:
            return form
    raise UserError(
        f"--set tie_projs={value}: give one of True or False for each of {bands} bands; the first "
        "may differ from the others, which are alike"
    )


#: What the user may say of an adaptive input and softmax.
ADAPTIVE_SETTINGS = {
    **same_settings("cutoffs", "div_val"),
    "tie_projs": Setting("tied_projections", _tied_projections),
}
