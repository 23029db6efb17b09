"""Model families: what the rest of the project needs to know of each, declared in its file."""

import re
from dataclasses import MISSING, dataclass, field, fields, make_dataclass
from typing import Any, Dict, NamedTuple, Optional, Tuple

from fairseq.models import register_model

from fairseq_sha.models.published_weights import PublishedWeights


class Size(NamedTuple):
    """A field's value in a named architecture, and where it comes from."""

    value: Any
    source: str


class Tiny(NamedTuple):
    """What tests need in order to run a family in seconds.

    Args:
        model: fields of the config, for a model that learns something at once
        training: options of ``fairseq-train`` for optimiser, schedule and criterion
        variants: by name, further fields for tests of the decoder alone, one for each kind of
            layer; attention reaches 20 tokens at most
    """

    model: Dict[str, Any]
    training: str
    variants: Dict[str, Dict[str, Any]]


@dataclass(frozen=True)
class Family:
    """A registered family.

    Args:
        name: under which fairseq registers its model
        model: the model class
        config: the dataclass with its options
        architectures: the config of each named architecture, by name
        tiny: see :class:`Tiny`
        published: how the published implementation names its weights, or None
    """

    name: str
    model: type
    config: type
    architectures: Dict[str, type]
    tiny: Tiny
    published: Optional[PublishedWeights] = None


#: All families by name, in the order of their registration.
FAMILIES = {}


def architecture_names():
    """The names of this package's families and of their named architectures, for ``--arch``. A
    user's plug-in may have added families of its own."""
    package = __name__.partition(".")[0]
    ours = [f for f in FAMILIES.values() if f.model.__module__.partition(".")[0] == package]
    return [name for family in ours for name in (family.name, *family.architectures)]


def register_family(name, config, architectures, tiny, published=None):
    """Class decorator: register a model class and its named architectures with fairseq and in
    :data:`FAMILIES`.

    A named architecture is a subclass that differs in the defaults of its config only, so that the
    command line and Hydra see the same numbers.

    Args:
        name (str): of the family
        config (type): the family's dataclass
        architectures (dict): by name, a dict from fields to a :class:`Size` each
        tiny (Tiny): for tests
        published (PublishedWeights): how the published implementation names its weights
    """

    def register(model):
        register_model(name, dataclass=config)(model)
        configs = {}
        for architecture, sizes in architectures.items():
            class_name = "".join(part.capitalize() for part in architecture.split("_"))
            configs[architecture] = _with_defaults(f"{class_name}Config", config, sizes)
            subclass = type(class_name, (model,), {"__module__": model.__module__})
            register_model(architecture, dataclass=configs[architecture])(subclass)
        FAMILIES[name] = Family(name, model, config, configs, tiny, published)
        return model

    return register


def _with_defaults(name, config, sizes):
    """A subclass of a config with other defaults, whose help says where they come from."""
    own = {f.name: f for f in fields(config)}
    changed = []
    for field_name, (value, source) in sizes.items():
        described, replaced = re.subn(
            r"\(default: .*?\)$", f"(default: {source})", own[field_name].metadata["help"]
        )
        assert replaced, f"the help of {field_name} does not say where its default comes from"
        changed.append(_field(own[field_name], value, {"help": described}))
    subclass = make_dataclass(name, changed, bases=(config,))
    subclass.__module__ = config.__module__
    return subclass


def _field(inherited, value, metadata) -> Tuple[str, type, Any]:
    if inherited.default is MISSING:  # a list
        return inherited.name, inherited.type, field(default_factory=value.copy, metadata=metadata)
    return inherited.name, inherited.type, field(default=value, metadata=metadata)
