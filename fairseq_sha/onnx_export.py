"""Trained models as ONNX."""

import contextlib
import importlib.util
import itertools
import json
import logging
import os
import tempfile
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from fairseq_sha.checks import torch_is_at_least
from fairseq_sha.data import pieces
from fairseq_sha.errors import UserError

#: A file holds its weights up to this size in bytes. Protocol buffers end at 2 GB; torch and
#: onnxruntime's quantisation need some room below that.
MAX_BYTES_IN_ONE_FILE = 1_500_000_000


class Segment(nn.Module):
    """A decoder whose state is a plain list of tensors.

    Args:
        decoder (~fairseq_sha.models.segment_decoder.SegmentDecoder): what reads the segment
        names (list of (int, str)): layer and key of each tensor of the state
        padding (list of int): number of rows, which mean nothing, before those of each tensor
    """

    def __init__(self, decoder, names, padding):
        super().__init__()
        self.decoder = decoder
        self.names = names
        self.padding = padding

    def forward(self, tokens, state):
        """Tokens ``[T, B]`` and state to logits ``[T, B, V]`` and the new state."""
        layers = [{} for _ in range(self.decoder.num_states)]
        for (layer, key), rows, tensor in zip(self.names, self.padding, state):
            layers[layer][key] = tensor[rows:] if rows else tensor
        features, layers = self.decoder.read(tokens, layers)
        new_state = [layers[layer][key] for layer, key in self.names]
        new_state = [pad(tensor, rows) for tensor, rows in zip(new_state, self.padding)]
        return self.decoder.output_layer(features), new_state


class AllBands(nn.Module):
    """An adaptive embedding as a graph computes it: each token is looked up in every band, and the
    right one is chosen. Sorting tokens by band would need sizes that depend on them.

    Args:
        embedding (~fairseq_sha.models.embeddings.AdaptiveEmbedding): whose parameters it shares
    """

    def __init__(self, embedding):
        super().__init__()
        self.embedding = embedding
        self.embedding_dim = embedding.embedding_dim

    def forward(self, tokens, training=False):
        """Tokens ``[...]`` to ``[..., H]``."""
        embedding, bands = self.embedding, self.embedding.bands
        rows = (tokens - bands.first).clamp(min=0)
        embedded = 0.0
        for i, weight in enumerate(embedding.weights):
            start, end = bands.edges[i], bands.edges[i + 1]
            e = F.embedding((rows - start).clamp(0, end - start - 1), weight)
            e = F.linear(e, embedding.projections[i]) if bands.projected else e
            is_here = (rows >= start) & (rows < end)
            embedded = embedded + torch.where(is_here[..., None], e, torch.zeros_like(e))
        return embedded


def pad(tensor, rows):
    """The tensor after so many rows of zeros."""
    return torch.cat([tensor.new_zeros(rows, *tensor.shape[1:]), tensor]) if rows else tensor


def export(model, path, length=1, int8=False):
    """Write a model as ONNX.

    Args:
        model (~fairseq_sha.trained_model.TrainedModel): on the CPU
        path (Path): what to write
        length (int): tokens of each call
        int8 (bool): whether to round the weights to 8 bits

    Returns:
        list of Path: what was written: ``path``, and for large models a second file with the
        weights, whose name ends in ``.data``

    Raises:
        UserError: a package is missing, torch's exporter is too old, or the model is too large
    """
    check_packages(int8)
    path = Path(path)
    size = sum(p.numel() * p.element_size() for p in model.decoder.parameters())
    separate = size > MAX_BYTES_IN_ONE_FILE
    if separate and int8:
        raise UserError(
            f"--int8: the model's weights take {size:,} bytes, and at most "
            f"{MAX_BYTES_IN_ONE_FILE:,} can be quantised; leave it out"
        )
    weights_path = path.with_name(f"{path.name}.data")
    if separate and weights_path.exists():
        raise UserError(f"{weights_path}: exists already; move it away")
    model.models[0].prepare_for_onnx_export_()
    names, start, rows_after = find_state(model, length)
    if model.decoder.bands is not None:
        model.decoder.embedding = AllBands(model.decoder.embedding)
    grows = [rows != len(tensor) for rows, tensor in zip(rows_after, start)]
    program = trace(model.decoder, length, names, start, grows)
    outputs = program.model.graph.outputs[1:]
    if any(isinstance(out.shape[0], int) for out, g in zip(outputs, grows) if g):
        # torch takes for granted that a number that may vary is at least 2, and has concluded that
        # a tensor that grows has a constant number of rows. Two more rows make it right.
        start = [pad(tensor, 2) if g else tensor for tensor, g in zip(start, grows)]
        program = trace(model.decoder, length, names, start, grows)
    shapes = {
        f"{layer}.{key}": [len(tensor), 0, *tensor.shape[2:]]
        for (layer, key), tensor in zip(names, start)
    }
    program.model.metadata_props.update(metadata(model.task.codec))
    program.model.metadata_props["state"] = json.dumps(shapes)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        # The graph refers to the file of its weights by name.
        written = Path(folder) / path.name
        program.save(str(written), external_data=separate)
        if int8:
            with quiet():
                written = quantise(written)
        if separate:  # first, so that the graph is never without its weights
            os.replace(written.with_name(weights_path.name), weights_path)
        os.replace(written, path)
    return [path, weights_path] if separate else [path]


def trace(decoder, length, names, start, grows):
    """The graph of a decoder that reads a segment.

    Args:
        decoder (~fairseq_sha.models.segment_decoder.SegmentDecoder): of the model
        length (int): tokens of each call
        names, start (list): see :func:`find_state`; the start has the rows of padding, too
        grows (list of bool): whether the number of rows of each tensor of the state varies

    Returns:
        torch.onnx.ONNXProgram
    """
    streams, rows = torch.export.Dim("streams"), torch.export.Dim("rows")
    padding = [len(tensor) if g else 0 for tensor, g in zip(start, grows)]
    # In the example, sizes that vary must not be 0 or 1, which torch takes for constants.
    state = [pad(tensor, 3) if g else tensor for tensor, g in zip(start, grows)]
    dynamic = [{0: rows, 1: streams} if g else {1: streams} for g in grows]
    names_of_state = [f"{layer}.{key}" for layer, key in names]
    with quiet(), torch.no_grad():
        return torch.onnx.export(
            Segment(decoder, names, padding),
            (torch.zeros(length, 2, dtype=torch.long), state),
            dynamo=True,
            dynamic_shapes=({1: streams}, dynamic),
            input_names=["tokens", *names_of_state],
            output_names=["logits", *(f"{name}.next" for name in names_of_state)],
            verbose=False,
        )


def metadata(codec):
    """What the command's help says of the symbols: strings by name."""
    texts = codec.texts()
    tokenizer = {"tokenizer": _tokenizer(codec)} if codec.name == "pieces" else {}
    return {
        **tokenizer,
        "codec": codec.name,
        "symbols": json.dumps([text.decode("latin-1") for text in texts]),
        "not_generated": json.dumps([token for token, text in enumerate(texts) if not text]),
        "start": json.dumps(codec.start),
    }


def _tokenizer(codec):
    """The tokenizer of a codec of pieces, with token ids in place of its own ids, in JSON."""
    tokenizer = json.loads(codec.tokenizer)
    vocab = {symbol: codec.dictionary.index(symbol) for symbol in tokenizer["model"]["vocab"]}
    tokenizer["model"]["vocab"] = {**vocab, pieces.NEWLINE: codec.dictionary.eos()}
    return json.dumps(tokenizer)


@torch.no_grad()
def find_state(model, length):
    """The state with which a graph, which has no other start, begins a text.

    At a start the model has no state at all. The graph needs tensors that mean the same: zeros for
    what a recurrence or a convolution keeps, and no rows for what grows with the text. Which one a
    tensor needs does not follow from its shape: after a token, both a recurrence and a memory of
    one token have one row. So both are tried: the right ones give exactly what no state gives.

    Args:
        model (~fairseq_sha.trained_model.TrainedModel): what to export
        length (int): tokens of each call

    Returns:
        names (list of (int, str)): layer and key of each tensor of the state
        start (list of Tensor): the state at a start, for two streams
        rows_after (list of int): rows of each after a segment

    Raises:
        UserError: no such state exists
    """
    tokens = torch.randint(len(model.dictionary), (length, 2))
    expected = model.read(tokens)
    names = [(layer, key) for layer, tensors in enumerate(expected[1]) for key in sorted(tensors)]
    rows_after = [len(expected[1][layer][key]) for layer, key in names]
    keys = sorted({key for _, key in names})  # one kind each, in all layers
    for is_empty in itertools.product([False, True], repeat=len(keys)):
        empty = {key for key, no_rows in zip(keys, is_empty) if no_rows}
        if len(empty & {"keys", "values"}) == 1:
            continue  # Fused attention reads past the end of the shorter of the two.
        start = [{} for _ in expected[1]]
        for layer, key in names:
            after = expected[1][layer][key]
            rows = 0 if key in empty else len(after)
            start[layer][key] = after.new_zeros(rows, *after.shape[1:])
        try:
            actual = model.read(tokens, start)
        except (RuntimeError, IndexError):  # torch's errors where rows are missing
            continue
        if _same(actual, expected):
            return names, [start[layer][key] for layer, key in names], rows_after
    raise UserError(
        "cannot be exported: no state of zeros or empty tensors gives what this model computes at "
        "the start of a text"
    )


def _same(actual, expected):
    """Whether logits and states are the same."""
    pairs = [(actual[0], expected[0])]
    for layer, reference in zip(actual[1], expected[1]):
        pairs += [(layer[key], reference[key]) for key in reference]
    return all(a.shape == b.shape and torch.allclose(a, b, atol=1e-5) for a, b in pairs)


def quantise(path):
    """Write a model with weights in 8 bits beside another one; returns its path."""
    from onnxruntime.quantization import quantize_dynamic
    from onnxruntime.quantization.shape_inference import quant_pre_process

    prepared, quantised = (path.with_name(f"{path.name}.{n}") for n in ("prepared", "int8"))
    # Weights that the graph computes from others, as the LSTM's, must be constants first.
    quant_pre_process(path, prepared, skip_symbolic_shape=True)
    quantize_dynamic(prepared, quantised)
    return quantised


@contextlib.contextmanager
def quiet():
    """Hide the hundreds of messages by which exporter and quantiser report what they do."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def check_packages(int8=False):
    """Raise a UserError if a package is missing or torch is too old."""
    if not torch_is_at_least(2, 6):
        raise UserError(
            f"torch {torch.__version__}: its exporter is too old; install torch 2.6 or newer"
        )
    needed = ["onnx", "onnxscript"] + ["onnxruntime"] * int8
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"{missing[0]} is missing; pip install 'fairseq-sha[export]'")
