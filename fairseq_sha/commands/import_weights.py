"""Make a fairseq checkpoint of weights that a model's reference implementation was trained with.

    fairseq-sha import_weights FAMILY --weights FILE --symbols FILE --data-bin DIR \\
        --save checkpoint.pt [--set name=value]...

FILE of --weights is a state dict under the reference's names, saved by torch. FILE of --symbols
lists what the rows of its vocabulary stand for: a decimal byte value a line, 10 for newline. Sizes
are read off the tensors' shapes; what no shape shows is given by --set.
"""

import argparse
import io
import logging
import os
import re
import sys
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import numpy as np
import torch
import yaml
from fairseq.criterions.cross_entropy import CrossEntropyCriterionConfig
from fairseq.dataclass.configs import FairseqConfig
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fairseq_sha.checkpoints import is_damaged
from fairseq_sha.data.byte_dictionary import ByteDictionary
from fairseq_sha.data.corpus import Corpus
from fairseq_sha.errors import UserError
from fairseq_sha.models.adaptive_span import AdaptiveSpan, AdaptiveSpanConfig
from fairseq_sha.models.sha_rnn import SHARNN, SHARNNConfig
from fairseq_sha.models.srupp import SRUpp, SRUppConfig
from fairseq_sha.models.transformer_xl import TransformerXL, TransformerXLConfig
from fairseq_sha.tasks.byte_language_modeling import (
    ByteLanguageModelingConfig,
    ByteLanguageModelingTask,
)

# The output bias of symbols that the weights lack: e to this power is 0 in every floating type,
# and unlike minus infinity it survives weight decay when training goes on.
NO_PROBABILITY = -1e4


@dataclass(frozen=True)
class Family:
    """How a reference implementation names and shapes what our model family holds.

    Several names of the reference for one of ours are tied tensors, of which one is enough.
    """

    model: type
    config: type
    layer_prefix: str
    whole_names: dict  # the reference's name -> ours
    layer_names: dict  # the same within a layer; names are prefixes, up to a dot or the end
    vocabulary: tuple  # our names of the tensors with one row for each symbol
    settings: tuple  # fields of the config that --set may give
    sizes: Callable  # weights -> fields of the config that shapes show
    idle: Callable  # name, weights -> what a tensor that takes no part must be; None: it takes part
    singletons: str  # expression for names of tensors that have dimensions of 1 which ours lack
    prepare: Callable = (
        dict  # weights -> the same, what is laid out otherwise brought into our order
    )

    def our_name(self, name):
        """Our name of a tensor of the reference, or None if the model has no such tensor."""
        if name in self.whole_names:
            return self.whole_names[name]
        _, layer, rest = _split_layer(name, self.layer_prefix)
        for reference, ours in self.layer_names.items():
            if layer is not None and (rest + ".").startswith(reference + "."):
                return f"layers.{layer}.{ours}{rest[len(reference) :]}"
        return None

    def reference_name(self, name):
        """The reference's name of one of our parameters."""
        for reference, ours in self.whole_names.items():
            if ours == name:
                return reference
        _, layer, rest = _split_layer(name, "layers")
        for reference, ours in self.layer_names.items():
            if (rest + ".").startswith(ours + "."):
                return f"{self.layer_prefix}.{layer}.{reference}{rest[len(ours) :]}"
        raise KeyError(name)


def _split_layer(name, prefix):
    match = re.match(rf"({re.escape(prefix)})\.(\d+)\.(.*)", name)
    return match.groups() if match else (None, None, None)


def _num_layers(weights, prefix):
    layers = [_split_layer(name, prefix)[1] for name in weights]
    return 1 + max((int(layer) for layer in layers if layer is not None), default=-1)


def _shape(weights, name, dimensions):
    if name not in weights:
        raise UserError(f"the weights lack {name!r}; are they of this model family?")
    shape = weights[name].shape
    if len(shape) != dimensions:
        raise UserError(f"{name!r} has the shape {list(shape)}; expected {dimensions} dimensions")
    return shape


def _sizes_of_sha_rnn(weights):
    _, width = _shape(weights, "encoder.weight", 2)
    num_layers = _num_layers(weights, "blocks")
    return {
        "width": width,
        "num_layers": num_layers,
        "boom_multiple": _shape(weights, "blocks.0.ff.linear1.weight", 2)[0] // width,
        "attention_layers": [
            i for i in range(num_layers) if f"blocks.{i}.attn.q.weight" in weights
        ],
    }


def _idle_in_sha_rnn(name, weights):
    _, layer, rest = _split_layer(name, "blocks")
    if layer is None:
        return None
    never_used = re.match(r"lnout\.(weight|bias)$|attn\.(qkvs|r_gate)$", rest)
    without_attention = f"blocks.{layer}.attn.q.weight" not in weights
    if never_used or (without_attention and re.match(r"ln(mem|mid)\.(weight|bias)$", rest)):
        return weights[name]  # whatever it is
    return None


def _sizes_of_transformer_xl(weights):
    tied = "word_emb.emb_layers.0.weight", "crit.out_layers.0.weight"
    _, width = _shape(weights, tied[tied[1] in weights and tied[0] not in weights], 2)
    return {
        "width": width,
        "num_layers": _num_layers(weights, "layers"),
        "n_head": _shape(weights, "r_w_bias", 2)[0],
        "d_inner": _shape(weights, "layers.0.pos_ff.CoreNet.0.weight", 2)[0],
    }


def _idle_in_transformer_xl(name, weights):
    if name != "pos_emb.inv_freq":
        return None
    width = _sizes_of_transformer_xl(weights)["width"]
    return 10000 ** -(torch.arange(0, width, 2, dtype=torch.float) / width)


def _sizes_of_adaptive_span(weights):
    spans = "layers.0.attn.attn.adaptive_span._mask.current_val"
    return {
        "width": _shape(weights, "in_emb.weight", 2)[1],
        "num_layers": _num_layers(weights, "layers"),
        "n_head": _shape(weights, spans, 3)[0],
        "d_inner": _shape(weights, "layers.0.ff.fc1.weight", 2)[0],
        "attn_span": _shape(weights, "key_pe", 3)[2],
    }


def _idle_in_adaptive_span(name, weights):
    if not name.endswith("adaptive_span._mask.mask_template"):
        return None
    return torch.arange(1.0 - weights[name].numel(), 1.0)


def _prepare_srupp(weights):
    """Recurrence parameters ``[2 D]`` as ``[2, D]``; rows of the last map from unit by unit to gate
    by gate; that map's name in layers without attention is the other layers'."""
    prepared = {}
    for name, value in weights.items():
        layer, linear = re.match(r"(.*\.transform_module\.)(linear\d)\.weight|", name).groups()
        if linear == "linear2" and f"{layer}alpha" not in weights:
            name, linear = f"{layer}linear3.weight", "linear3"
        if linear == "linear3" and value.dim() == 2 and len(value) % 3 == 0:
            value = value.unflatten(0, (-1, 3)).transpose(0, 1).flatten(0, 1)
        if re.search(r"\.(weight_c|bias)$", name) and "rnn_lst" in name and value.dim() == 1:
            if "layer_norm" not in name and len(value) % 2 == 0:
                value = value.unflatten(0, (2, -1))
        prepared[name] = value
    return prepared


def _sizes_of_srupp(weights):
    prefix = "rnn.rnn_lst"
    num_layers = _num_layers(weights, prefix)
    attends = [f"{prefix}.{i}.transform_module.alpha" in weights for i in range(num_layers)]
    return {
        "width": _shape(weights, "embedding_layer.weight", 2)[1],
        "projection": _shape(weights, f"{prefix}.0.transform_module.linear1.weight", 2)[0],
        "num_layers": num_layers,
        "attn_every_n_layers": 1 + attends.index(True) if True in attends else num_layers + 1,
        "layer_norm": f"{prefix}.0.layer_norm.weight" in weights,
    }


def _idle_in_srupp(name, weights):
    return torch.ones_like(weights[name]) if name.endswith(".scale_x") else None


FAMILIES = {
    "sha_rnn": Family(
        model=SHARNN,
        config=SHARNNConfig,
        layer_prefix="blocks",
        whole_names={
            "encoder.weight": "embedding.weight",
            "decoder.weight": "embedding.weight",
            "decoder.bias": "output_bias",
        },
        layer_names={
            "rnn": "cell",
            "lnstart": "norm_start",
            "lnmem": "norm_memory",
            "lnmid": "norm_mid",
            "lnxff": "norm_boom",
            "lnff": "norm_residual",
            "ff.linear1": "boom.linear",
            "attn.q": "attention.query",
            "attn.qln": "attention.query_norm",
            "attn.qs": "attention.query_gate",
            "attn.ks": "attention.key_gate",
            "attn.vs": "attention.value_gate.seed",
            "attn.vq.l1": "attention.value_gate.linear",
        },
        vocabulary=("embedding.weight", "output_bias"),
        settings=("window",),
        sizes=_sizes_of_sha_rnn,
        idle=_idle_in_sha_rnn,
        singletons=r"\.attn\.[qkv]s$",
    ),
    "transformer_xl": Family(
        model=TransformerXL,
        config=TransformerXLConfig,
        layer_prefix="layers",
        whole_names={
            "word_emb.emb_layers.0.weight": "embedding.weight",
            "crit.out_layers.0.weight": "embedding.weight",
            "crit.out_layers.0.bias": "output_bias",
            "r_w_bias": "content_bias",
            "r_r_bias": "position_bias",
        },
        layer_names={
            "dec_attn.qkv_net": "attention.query_key_value",
            "dec_attn.r_net": "attention.position",
            "dec_attn.o_net": "attention.output",
            "dec_attn.layer_norm": "norm_attention",
            "pos_ff.CoreNet.0": "feed_forward.linear1",
            "pos_ff.CoreNet.3": "feed_forward.linear2",
            "pos_ff.layer_norm": "norm_feed_forward",
        },
        vocabulary=("embedding.weight", "output_bias"),
        settings=("n_head", "mem_len", "clamp_len", "same_length"),
        sizes=_sizes_of_transformer_xl,
        idle=_idle_in_transformer_xl,
        singletons="$^",
    ),
    "adaptive_span": Family(
        model=AdaptiveSpan,
        config=AdaptiveSpanConfig,
        layer_prefix="layers",
        whole_names={
            "key_pe": "key_positions",
            "in_emb.weight": "embedding.weight",
            "out_emb.weight": "output_weight",
            "out_emb.bias": "output_bias",
        },
        layer_names={
            "attn.attn.adaptive_span._mask.current_val": "attention.span",
            "attn.proj_query": "attention.query",
            "attn.proj_key": "attention.key",
            "attn.proj_val": "attention.value",
            "attn.proj_out": "attention.output",
            "ff.fc1": "feed_forward.linear1",
            "ff.fc2": "feed_forward.linear2",
            "norm1": "norm_attention",
            "norm2": "norm_feed_forward",
        },
        vocabulary=("embedding.weight", "output_weight", "output_bias"),
        settings=("n_head", "attn_span", "adapt_span_ramp"),
        sizes=_sizes_of_adaptive_span,
        idle=_idle_in_adaptive_span,
        singletons=r"^key_pe$|\.current_val$",
    ),
    "srupp": Family(
        model=SRUpp,
        config=SRUppConfig,
        layer_prefix="rnn.rnn_lst",
        whole_names={
            "embedding_layer.weight": "embedding.weight",
            "output_layer.weight": "output_weight",
            "output_layer.bias": "output_bias",
        },
        layer_names={
            "weight_c": "weight",
            "bias": "bias",
            "layer_norm": "norm_input",
            "transform_module.alpha": "alpha",
            "transform_module.layer_norm": "norm",
            "transform_module.linear1": "project",
            "transform_module.linear2": "key_value",
            "transform_module.linear3": "expand",
        },
        vocabulary=("embedding.weight", "output_weight", "output_bias"),
        settings=("n_head", "attn_every_n_layers", "eval_unroll"),
        sizes=_sizes_of_srupp,
        idle=_idle_in_srupp,
        singletons="$^",
        prepare=_prepare_srupp,
    ),
}


def read_weights(path):
    """A state dict: tensors by name.

    Raises:
        UserError: no such file, or one that holds anything else; code in it is never run.
    """
    try:
        with open(path, "rb") as file:
            content = io.BytesIO(file.read())
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); name a state dict")
    if is_damaged(content):
        raise UserError(f"{path}: damaged, its contents lack their checksums; get it again")
    try:
        weights = torch.load(content, map_location="cpu", weights_only=True)
    except Exception:  # of any type, depending on where the file stops making sense
        raise UserError(
            f"{path}: not a state dict that torch loads safely; save it with "
            "torch.save(model.state_dict(), FILE)"
        )
    is_state_dict = isinstance(weights, dict) and all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in weights.items()
    )
    if not is_state_dict or not weights:
        held = f"a dict of {', '.join(map(repr, list(weights)[:5]))}" if weights else "nothing"
        if not isinstance(weights, dict):
            held = f"a {type(weights).__name__}"
        raise UserError(f"{path}: holds {held}, not tensors by name; save the state dict alone")
    return weights


def read_symbols(path):
    """The byte value of each row of the vocabulary.

    Raises:
        UserError: no such file, a line that is no byte value, or one that occurs twice
    """
    try:
        lines = Path(path).read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); name a file of byte values")
    if lines[-1] == b"":
        lines.pop()
    symbols = []
    for number, line in enumerate(lines, 1):
        text = line.rstrip(b"\r")
        if not re.fullmatch(rb"[0-9]{1,3}", text) or int(text) > 255:
            shown = line[:20].decode("ascii", "backslashreplace")
            raise UserError(
                f"{path}, line {number}: {shown!r} is not a byte value; give one decimal number of "
                "0 to 255 a line, in the order of the weights' rows"
            )
        if int(text) in symbols:
            raise UserError(f"{path}, line {number}: byte {int(text)} for the second time")
        symbols.append(int(text))
    return symbols


def build_config(name, family, weights, settings):
    """The model's config: sizes from shapes, the rest from ``settings``, ``name=value`` strings.

    Raises:
        UserError: a setting that does not exist, has no such value, or contradicts a shape
    """
    sizes = family.sizes(weights)
    given = {}
    for setting in settings:
        field, equals, value = setting.partition("=")
        if not equals or field not in family.settings:
            raise UserError(
                f"--set {setting}: give name=value with one of {', '.join(family.settings)}; "
                "other sizes are read off the weights"
            )
        given[field] = value
    try:
        cfg = OmegaConf.merge(
            OmegaConf.structured(family.config(**sizes)),
            OmegaConf.from_dotlist([f"{field}={value}" for field, value in given.items()]),
        )
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        raise UserError(f"--set {' '.join(settings)}: {str(error).splitlines()[0]}")
    for field in set(given) & set(sizes):
        if cfg[field] != sizes[field]:
            raise UserError(
                f"--set {field}={given[field]}: the shapes of the weights say {sizes[field]}"
            )
    return cfg


def convert(family, weights, shapes):
    """The weights under our names.

    Args:
        weights (dict): tensors by the reference's names
        shapes (dict): of our parameters by name, the vocabulary's with as many rows as the weights

    Raises:
        UserError: a tensor that is missing, unused, or of another shape; tied ones that differ
    """
    converted = {}
    for reference, value in weights.items():
        idle = family.idle(reference, weights)
        if idle is not None:
            if value.shape != idle.shape or not torch.allclose(value.float(), idle.float()):
                raise UserError(f"{reference!r} is not what this model family computes there")
            continue
        name = family.our_name(reference)
        if name not in shapes:
            raise UserError(
                f"{reference!r} has no place in this model; leave it out if it is not needed"
            )
        shape = shapes[name]
        bare = value.squeeze() if re.search(family.singletons, reference) else value
        if bare.shape != shape:
            rows = ", one row for each symbol" if name in family.vocabulary else ""
            raise UserError(
                f"{reference!r} has the shape {list(value.shape)}; expected {list(shape)}{rows}"
            )
        value = bare.float()
        if name in converted and not torch.equal(converted[name], value):
            raise UserError(
                f"{reference!r} differs from {family.reference_name(name)!r}, which it is tied to"
            )
        converted[name] = value
    missing = sorted(family.reference_name(name) for name in set(shapes) - set(converted))
    if missing:
        raise UserError(f"the weights lack {', '.join(map(repr, missing))}")
    return converted


def spread_rows(name, rows, symbols, dictionary):
    """Put the rows of a vocabulary tensor where our dictionary has their symbols."""
    if name == "output_bias":
        spread = torch.full((len(dictionary),), NO_PROBABILITY)
    else:
        spread = torch.zeros(len(dictionary), rows.size(1))
    row_of = {byte: row for row, byte in enumerate(symbols)}
    for i, byte in enumerate(dictionary.bytes_by_id()):
        if byte in row_of:
            spread[i] = rows[row_of[byte]]
    return spread


def check_symbols(symbols, dictionary, folder):
    """Raise a UserError unless weights and data folder speak of the same bytes."""
    values = dictionary.bytes_by_id()
    unknown = sorted(set(symbols) - set(values))
    if unknown:
        raise UserError(
            f"{folder}: its dictionary lacks byte {unknown[0]}, to which the weights give "
            "probability; preprocess the corpus with --all-bytes"
        )
    for split in ("train", "valid", "test"):
        if not os.path.exists(os.path.join(folder, f"{split}.idx")):
            continue
        counts = np.bincount(Corpus(os.path.join(folder, split)).tokens, minlength=len(dictionary))
        for i in np.flatnonzero(counts):
            if i >= len(values) or values[i] not in symbols:
                byte = values[i] if i < len(values) else None
                raise UserError(
                    f"{folder}/{split}: holds {counts[i]:,} times "
                    f"{'byte ' + str(byte) if byte is not None else f'token {i}'}, to which the "
                    "weights give no probability; evaluate on what they were trained on"
                )


def make_checkpoint(name, cfg, model, task):
    """What fairseq loads: weights, and the configs of model, task and criterion."""
    root = OmegaConf.to_container(OmegaConf.structured(FairseqConfig), enum_to_str=True)
    root["model"] = {**OmegaConf.to_container(cfg, enum_to_str=True), "_name": name}
    task_cfg = OmegaConf.structured(ByteLanguageModelingConfig)
    root["task"] = {
        **OmegaConf.to_container(task_cfg, enum_to_str=True),
        "_name": "byte_language_modeling",
        "data": task.cfg.data,
    }
    criterion = OmegaConf.to_container(OmegaConf.structured(CrossEntropyCriterionConfig))
    with_losses = model.decoder.has_auxiliary_losses
    criterion["_name"] = "cross_entropy" + "_with_auxiliary_losses" * with_losses
    root["criterion"] = {**criterion, "sentence_avg": False}
    return {
        "args": None,
        "cfg": OmegaConf.to_container(OmegaConf.create(root), resolve=True),
        "model": model.state_dict(),
        "criterion": None,
        "optimizer_history": [
            {
                "criterion_name": "CrossEntropyCriterion",
                "optimizer_name": None,
                "lr_scheduler_state": {},
                "num_updates": 0,
            }
        ],
        "task_state": task.state_dict(),
        "extra_state": {"train_iterator": {"epoch": 1, "iterations_in_epoch": 0}},
        "last_optimizer_state": None,
    }


def import_weights(name, weights_path, symbols_path, folder, save, settings=()):
    """Write a checkpoint; see the module's docstring. Returns the model's config.

    Raises:
        UserError: whatever is wrong, before anything is written
    """
    family = FAMILIES[name]
    weights = family.prepare(read_weights(weights_path))
    symbols = read_symbols(symbols_path)
    dictionary = ByteDictionary.load(os.path.join(folder, "dict.txt"))
    check_symbols(symbols, dictionary, folder)
    cfg = build_config(name, family, weights, settings)
    task = ByteLanguageModelingTask(ByteLanguageModelingConfig(data=folder), dictionary)
    model = family.model.build_model(cfg, task)
    shapes = {
        key: (len(symbols), *p.shape[1:]) if key in family.vocabulary else tuple(p.shape)
        for key, p in model.decoder.named_parameters()
    }
    converted = convert(family, weights, shapes)
    for tensor in family.vocabulary:
        converted[tensor] = spread_rows(tensor, converted[tensor], symbols, dictionary)
    state = OrderedDict((f"decoder.{key}", value) for key, value in converted.items())
    model.load_state_dict(state)
    unfinished = f"{save}.unfinished"
    try:
        torch.save(make_checkpoint(name, cfg, model, task), unfinished)
        os.replace(unfinished, save)
    except (OSError, RuntimeError) as error:
        if os.path.exists(unfinished):
            os.remove(unfinished)
        raise UserError(f"{save}: cannot be written ({str(error).splitlines()[0]})")
    return cfg


def main():
    parser = argparse.ArgumentParser(
        prog="fairseq-sha import_weights",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("family", choices=FAMILIES, metavar="FAMILY", help=", ".join(FAMILIES))
    parser.add_argument("--weights", required=True, metavar="FILE", help="state dict (.pt)")
    parser.add_argument(
        "--symbols", required=True, metavar="FILE", help="byte value of each row, one a line"
    )
    parser.add_argument("--data-bin", required=True, metavar="DIR", help="data folder")
    parser.add_argument("--save", required=True, metavar="FILE", help="checkpoint to write")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="what shapes do not show"
    )
    args = parser.parse_args()
    logging.getLogger().setLevel(logging.WARNING)  # importing fairseq makes all packages talkative
    cfg = import_weights(
        args.family, args.weights, args.symbols, args.data_bin, args.save, args.set
    )
    settings = " ".join(f"{field}={cfg[field]}" for field in FAMILIES[args.family].settings)
    print(f"{args.save}: {args.family} with {settings}, for {args.data_bin}")


if __name__ == "__main__":
    sys.exit(main())
