"""Checkpoints made from the weights of reference implementations."""

import contextlib
import io
import json
import re
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch
import yaml
from fairseq.criterions.cross_entropy import CrossEntropyCriterionConfig
from fairseq.dataclass.configs import FairseqConfig
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

import fairseq_sha
from fairseq_sha.checkpoints import is_damaged
from fairseq_sha.data import pieces
from fairseq_sha.data.codecs import CODECS
from fairseq_sha.data.corpus import Corpus
from fairseq_sha.errors import UserError
from fairseq_sha.files import unfinished
from fairseq_sha.models.family import FAMILIES
from fairseq_sha.models.heads import NO_PROBABILITY


def family(name):
    """The family of this name.

    Raises:
        UserError: there is none, or no weights of it were published
    """
    fairseq_sha.register()
    known = [family.name for family in FAMILIES.values() if family.published]
    if name not in known:
        raise UserError(f"{name}: not a family with published weights; name {', '.join(known)}")
    return FAMILIES[name]


def read_weights(path):
    """A state dict: tensors by name. Code that the file may hold is never run.

    Raises:
        UserError: no such file, or it holds anything else
    """
    try:
        with open(path, "rb") as file:
            content = io.BytesIO(file.read())
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); name a state dict")
    if is_damaged(content):
        raise UserError(f"{path}: damaged, its contents do not match their checksums; get it again")
    try:
        weights = torch.load(content, map_location="cpu", weights_only=True)
    except Exception:  # of any type, depending on where the file stops making sense
        raise UserError(
            f"{path}: not a state dict that torch loads safely; of a whole model that you trust, "
            "save the weights where its code is installed: "
            f"torch.save(torch.load({str(path)!r}, weights_only=False).state_dict(), FILE)"
        )
    if not isinstance(weights, dict):
        content = f"a {type(weights).__name__}"
    elif not weights:
        content = "nothing"
    elif all(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in weights.items()):
        return weights
    else:
        content = f"a dict of {', '.join(map(repr, list(weights)[:5]))}"
    raise UserError(f"{path}: holds {content}, not tensors by name; save only the state dict")


def read_symbols(path, codec="bytes"):
    """What each row of the vocabulary stands for.

    Args:
        path (str): a file with one symbol a line. A count may follow a word or a piece, as in the
            published vocabulary of Billion Word and in ``dict.txt``. Of pieces, it may also be the
            JSON of the package ``tokenizers``, whose ids are the rows
        codec (str): ``bytes``, ``words`` or ``pieces``

    Returns:
        list of str: the symbols as a dictionary of fairseq names them: decimal byte values, words
        or pieces, ``</s>`` for newline, ``<unk>`` for unknown words

    Raises:
        UserError: no such file, a line that is no symbol, or one that occurs twice
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); name a file of symbols")
    if codec == "pieces":
        symbols = _pieces_by_id(path, content)
        if symbols is not None:
            return symbols
    lines = content.split(b"\n")
    if lines[-1] == b"":
        lines.pop()
    if not lines:
        raise UserError(f"{path}: is empty; list the symbol of each row")
    parse = {"bytes": _parse_byte, "words": _parse_word, "pieces": _parse_piece}[codec]
    symbols, seen = [], set()
    for number, line in enumerate(lines, 1):
        line = line[:-1] if line.endswith(b"\r") else line
        try:
            symbol = parse(line)
        except ValueError as error:
            shown = line[:20].decode("ascii", "backslashreplace")
            raise UserError(f"{path}, line {number}: {shown!r} is not {error}")
        if symbol in seen:
            raise UserError(f"{path}, line {number}: {symbol!r} appears twice; name each row once")
        seen.add(symbol)
        symbols.append(symbol)
    return symbols


def _parse_byte(line):
    if not re.fullmatch(rb"[0-9]{1,3}", line) or int(line) > 255:
        raise ValueError(
            "a byte value; give one decimal number of 0 to 255 a line, in the order of the rows"
        )
    return "</s>" if int(line) == 10 else str(int(line))


#: What the references call the end of a line and unknown words.
SPECIAL_WORDS = {"<eos>": "</s>", "<S>": "</s>", "<UNK>": "<unk>"}


def _parse_word(line):
    words = line.decode("utf-8", "replace").split()
    has_count = len(words) == 2 and words[1].isdigit()
    if not (len(words) == 1 or has_count) or " ".join(words).encode() != line.replace(b"\t", b" "):
        raise ValueError(
            "a word; give one word in UTF-8 a line, without spaces, in the order of the rows"
        )
    return SPECIAL_WORDS.get(words[0], words[0])


def _parse_piece(line):
    words = line.decode("utf-8", "replace").split(" ")
    has_count = len(words) == 2 and words[1].isdigit()
    symbol = SPECIAL_WORDS.get(words[0], words[0])
    known = symbol in ("</s>", "<unk>") or pieces.bytes_of(symbol)
    if not (len(words) == 1 or has_count) or not known:
        raise ValueError(
            "a piece; give one a line, in the symbols of dict.txt and the order of the rows, or "
            "name the tokenizer's own file (.json)"
        )
    return "</s>" if symbol == pieces.NEWLINE else symbol


def _pieces_by_id(path, content):
    """The pieces of a tokenizer in the order of its ids; None if this is not one's JSON."""
    try:
        tokenizer = json.loads(content)
        ids = tokenizer["model"]["vocab"]
        symbols = sorted(ids, key=ids.__getitem__)
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    if [ids[symbol] for symbol in symbols] != list(range(len(symbols))):
        raise UserError(
            f"{path}: the ids of its pieces have gaps; list the symbol of each row instead, one a "
            "line"
        )
    return ["</s>" if symbol == pieces.NEWLINE else symbol for symbol in symbols]


#: What to do if a data folder lacks a symbol.
REMEDIES = {
    "bytes": "preprocess the corpus with --all-bytes",
    "words": "preprocess the corpus, with this symbol",
    "pieces": "name the data folder with whose pieces the weights were trained",
}


def check_symbols(symbols, codec, folder):
    """Check that weights and data folder have the same symbols.

    Args:
        symbols (list of str): of the weights' rows
        codec (~fairseq_sha.data.codecs.Codec): of the data folder
        folder (str): the data folder

    Returns:
        LongTensor: the token id of each row

    Raises:
        UserError: the data folder lacks a symbol of the weights, or its text holds one that the
            weights lack
    """
    indices = codec.dictionary.indices
    for symbol in symbols:
        if symbol not in indices:
            raise UserError(
                f"{folder}: its dictionary lacks {symbol!r}, a symbol of the weights; "
                f"{REMEDIES[codec.name]}"
            )
    ids = torch.tensor([indices[symbol] for symbol in symbols], dtype=torch.long)
    for split in ("train", "valid", "test"):
        prefix = Path(folder) / split
        if not prefix.with_suffix(".idx").exists():
            continue
        counts = Corpus(str(prefix)).counts(len(codec.dictionary))
        counts[ids.numpy()] = 0
        for token in np.flatnonzero(counts):
            known = token < len(codec.dictionary)
            symbol = repr(codec.dictionary[token]) if known else f"token {token}"
            raise UserError(
                f"{prefix}: contains {symbol} {counts[token]:,} times, which has probability zero "
                "since it is missing from the weights; evaluate on what they were trained on"
            )
    return ids


def check_bands(symbols, ids, cutoffs, codec, folder):
    """Check that every symbol of a vocabulary in bands keeps its band.

    Args:
        symbols (list of str): of the weights' rows
        ids (LongTensor): token id of each row, ``[R]``
        cutoffs (list of int): how many rows come before each band but the first
        codec (~fairseq_sha.data.codecs.Codec): of the data folder
        folder (str): the data folder

    Raises:
        UserError: the data folder has more symbols than the weights, or another order
    """
    dictionary = codec.dictionary
    remedy = "preprocess the corpus with the order of the weights, without padding"
    for row in (ids < dictionary.eos()).nonzero().flatten().tolist():
        raise UserError(f"{symbols[row]!r} is no word; </s> is the end of a line, <unk> any other")
    words = len(dictionary) - dictionary.eos()
    if words != len(symbols):
        raise UserError(
            f"{folder}: its dictionary has {words:,} words with </s> and <unk>, the weights have "
            f"{len(symbols):,}, and an adaptive softmax has no place for others; {remedy}"
        )
    edges = torch.tensor(cutoffs)
    theirs = torch.bucketize(torch.arange(len(symbols)), edges, right=True)
    ours = torch.bucketize(ids - dictionary.eos(), edges, right=True)
    for row in (theirs != ours).nonzero().flatten().tolist():
        raise UserError(
            f"{folder}: its dictionary has {symbols[row]!r} in band {ours[row] + 1} of the "
            f"adaptive softmax, the weights have it in band {theirs[row] + 1}; {remedy}"
        )


def read_settings(family, settings):
    """The values of ``--set``.

    Args:
        family (Family): of the model
        settings (list of str): ``name=value``

    Returns:
        dict by the reference's names. Those that are fields of the config have their types

    Raises:
        UserError: a setting that does not exist or has no such value
    """
    known = family.published.settings
    given = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals or name not in known:
            raise UserError(
                f"--set {setting}: give name=value with one of {', '.join(known)}; other sizes are "
                "read off the weights"
            )
        is_list = "," in value and not value.startswith("[")
        given[name] = f"[{value}]" if is_list else value
    with _explained(settings):
        values = OmegaConf.from_dotlist([f"{name}={value}" for name, value in given.items()])
        fields = {name: value for name, value in values.items() if known[name].field == name}
        typed = OmegaConf.merge(OmegaConf.structured(family.config), fields)
        return {name: typed[name] if name in fields else values[name] for name in given}


@contextlib.contextmanager
def _explained(settings):
    """Say that a setting has no such value."""
    try:
        yield
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        raise UserError(f"--set {' '.join(settings)}: {str(error).splitlines()[0]}")


def build_config(family, weights, settings, values):
    """The model's config: sizes from shapes, the rest from settings.

    Args:
        family (Family): of the model
        weights (dict of str to Tensor): prepared
        settings (list of str): ``name=value``, for messages
        values (dict): of :func:`read_settings`

    Raises:
        UserError: a setting that has no such value, or contradicts a shape
    """
    published = family.published
    sizes = published.sizes(weights)
    names = {published.settings[name].field: name for name in values}
    fields = {
        field: published.settings[name].convert(values[name], sizes)
        for field, name in names.items()
    }
    with _explained(settings):
        cfg = OmegaConf.merge(OmegaConf.structured(family.config(**sizes)), fields)
    # No shape shows which projections are tied; converting checks what the user says.
    for field in set(fields) & set(sizes) - {"tied_projections"}:
        if cfg[field] != sizes[field]:
            raise UserError(
                f"--set {names[field]}={values[names[field]]}: the shapes of the weights say "
                f"{sizes[field]}; leave it out"
            )
    return cfg


def place_rows(rows, ids, size):
    """Put the rows of a vocabulary tensor at the token ids of their symbols.

    Args:
        rows (Tensor): ``[R, H]``, or ``[R]`` for a bias
        ids (LongTensor): token id of each row, ``[R]``
        size (int): of our vocabulary

    Returns:
        Tensor ``[size, H]`` or ``[size]``
    """
    # A bias decides that symbols that are missing from the weights get probability zero.
    placed = rows.new_full((size, *rows.shape[1:]), NO_PROBABILITY if rows.dim() == 1 else 0.0)
    placed[ids] = rows
    return placed


def place_in_bands(converted, ids, bands):
    """Put the rows of an adaptive input and softmax in the order of their symbols, in place. No
    symbol changes its band.

    Args:
        converted (dict of str to Tensor): parameters by our names
        ids (LongTensor): token id of each of the weights' rows, ``[R]``
        bands (~fairseq_sha.models.embeddings.Bands): of the model
    """
    for i, (start, end) in enumerate(zip(bands.edges, bands.edges[1:])):
        names = ["embedding.weight", "head.bias"]
        if i > 0:
            names = [f"embedding.tail_weights.{i - 1}", f"head.tail_biases.{i - 1}"]
        places = ids[start:end] - bands.first - start
        for name in names:
            converted[name] = place_rows(converted[name], places, end - start)


def make_task(codec, folder):
    """The task that reads a data folder with a codec."""
    from fairseq_sha.tasks import byte_language_modeling, segment_language_modeling

    if codec.name == "bytes":
        cfg = byte_language_modeling.ByteLanguageModelingConfig(data=str(folder))
        return byte_language_modeling.ByteLanguageModelingTask(cfg, codec)
    cfg = segment_language_modeling.SegmentLanguageModelingConfig(
        data=str(folder), codec=codec.name
    )
    return segment_language_modeling.SegmentLanguageModelingTask(cfg, codec)


def make_checkpoint(name, cfg, model, task):
    """What fairseq loads: weights, and the configs of model, task and criterion."""

    def plain(config):
        return OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True)

    byte_level = task.codec.name == "bytes"
    root = plain(FairseqConfig)
    root["model"] = {**OmegaConf.to_container(cfg, enum_to_str=True), "_name": name}
    root["task"] = {
        **plain(task.cfg),
        "_name": "byte_language_modeling" if byte_level else "segment_language_modeling",
    }
    # It makes no logits of the whole vocabulary, either.
    with_losses = model.decoder.has_auxiliary_losses or model.decoder.bands is not None
    root["criterion"] = {
        **plain(CrossEntropyCriterionConfig),
        "_name": "cross_entropy" + "_with_auxiliary_losses" * with_losses,
        "sentence_avg": False,
    }
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


def import_weights(name, weights_path, symbols_path, folder, save, settings=(), codec="bytes"):
    """Write a checkpoint.

    Args:
        name (str): of the model family
        weights_path (str): see :func:`read_weights`
        symbols_path (str): see :func:`read_symbols`
        folder (str): data folder
        save (str): the checkpoint to write
        settings (list of str): see :func:`read_settings`
        codec (str): ``bytes``, ``words`` or ``pieces``

    Returns:
        the model's config

    Raises:
        UserError: whatever is wrong, before anything is written
    """
    chosen = family(name)
    published = chosen.published
    values = read_settings(chosen, settings)
    weights = published.prepare(read_weights(weights_path), values)
    cfg = build_config(chosen, weights, settings, values)
    symbols = read_symbols(symbols_path, codec)
    cutoffs = list(getattr(cfg, "cutoffs", []))
    if cutoffs and codec == "pieces":
        raise UserError(
            f"{weights_path}: has an adaptive softmax, whose bands have no place for <unk> and the "
            "padding of a dictionary of pieces; import weights without cutoffs"
        )
    if cutoffs and len(symbols) != published.num_rows(weights):
        raise UserError(
            f"{symbols_path}: has {len(symbols):,} symbols, but the vocabulary of the weights has "
            f"{published.num_rows(weights):,} rows; list the symbol of each row"
        )
    codec = CODECS[codec].load(str(folder))
    ids = check_symbols(symbols, codec, folder)
    if cutoffs:
        check_bands(symbols, ids, cutoffs, codec, folder)
    task = make_task(codec, folder)
    model = chosen.model.build_model(cfg, task)
    by_symbol = () if cutoffs else published.vocabulary
    shapes = {
        key: (len(symbols), *p.shape[1:]) if key in by_symbol else tuple(p.shape)
        for key, p in model.decoder.named_parameters()
    }
    converted = published.convert(weights, shapes, model.decoder.tied_parameters())
    if cutoffs:
        place_in_bands(converted, ids, model.decoder.bands)
    else:
        for key in published.vocabulary:
            converted[key] = place_rows(converted[key], ids, len(codec.dictionary))
    state = OrderedDict((f"decoder.{key}", value) for key, value in converted.items())
    model.load_state_dict(state)
    try:
        with unfinished(save) as temporary:
            torch.save(make_checkpoint(name, cfg, model, task), temporary)
    except (OSError, RuntimeError) as error:
        raise UserError(f"{save}: cannot be written ({str(error).splitlines()[0]})")
    return cfg
