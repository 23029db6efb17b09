"""Export a trained model to ONNX, for programs without torch.

    fairseq-sha export --path checkpoint.pt --save model.onnx [--length 1] [--int8]

The graph takes ``tokens``, int64 ``[length, streams]``, and the state that the text before left,
and gives ``logits``, float32 ``[length, streams, symbols]``, and for each NAME of the state
NAME.next. The file's metadata say, in JSON, what else is needed: ``bytes``, the byte of each symbol
(null for those that stand for none, which are not to be generated); ``start``, the symbol that
comes before a text; ``state``, shapes by NAME at a start, when all is zero, with 0 for the number
of streams. examples/onnx/generate.py shows all of it.

--int8 rounds weights to 8 bits, as onnxruntime's dynamic quantisation does.
"""

import contextlib
import importlib.util
import json
import logging
import os
import sys
import tempfile
import warnings
from pathlib import Path

import torch
from torch import nn

from fairseq_sha.checks import torch_is_at_least
from fairseq_sha.commands.common import check_new, load, model_parser
from fairseq_sha.errors import UserError


def main(argv=None):
    parser = model_parser("export", __doc__)
    parser.add_argument("--save", required=True, type=Path, metavar="FILE", help="to write")
    parser.add_argument(
        "--length", type=int, default=1, help="tokens of each call (default: %(default)s)"
    )
    parser.add_argument("--int8", action="store_true", help="quantise the weights")
    args = parser.parse_args(argv)
    if args.length < 1:
        raise UserError(f"--length {args.length}: must be at least 1")
    check_new([args.save])
    args.cpu = True
    export(load(args), args.save, args.length, args.int8)
    print(f"{args.save}: {args.save.stat().st_size:,} bytes")


class Segment(nn.Module):
    """A decoder whose state is a plain list of tensors."""

    def __init__(self, decoder, names):
        super().__init__()
        self.decoder = decoder
        self.names = names

    def forward(self, tokens, state):
        layers = [{} for _ in self.decoder.layers]
        for (layer, key), tensor in zip(self.names, state):
            layers[layer][key] = tensor
        features, left = self.decoder.read(tokens, layers)
        return self.decoder.output_layer(features), [left[layer][key] for layer, key in self.names]


def export(model, path, length=1, int8=False):
    """Write a :class:`~fairseq_sha.trained_model.TrainedModel` as ONNX.

    Raises:
        UserError: a package is missing, or torch's exporter is too old
    """
    _check_packages(int8)
    model.models[0].prepare_for_onnx_export_()
    decoder = model.decoder
    one, two = (model.read(torch.zeros(tokens, 2, dtype=torch.long))[1] for tokens in (1, 2))
    names = [(layer, key) for layer, tensors in enumerate(one) for key in sorted(tensors)]
    rows, streams = torch.export.Dim("rows"), torch.export.Dim("streams")
    state, shapes, dynamic = [], {}, []
    for layer, key in names:
        before, after = one[layer][key], two[layer][key]
        grows = len(before) != len(after)
        state.append(before.new_zeros(3 if grows else len(before), *before.shape[1:]))
        shapes[f"{layer}.{key}"] = [0 if grows else len(before), 0, *before.shape[2:]]
        dynamic.append({0: rows, 1: streams} if grows else {1: streams})
    tokens = torch.zeros(length, 2, dtype=torch.long)
    with quiet(), torch.no_grad():
        program = torch.onnx.export(
            Segment(decoder, names),
            (tokens, state),
            dynamo=True,
            dynamic_shapes=({1: streams}, dynamic),
            input_names=["tokens", *shapes],
            output_names=["logits", *(f"{name}.next" for name in shapes)],
            verbose=False,
        )
    program.model.metadata_props.update(
        bytes=json.dumps(model.dictionary.bytes_by_id()),
        start=json.dumps(model.dictionary.eos()),
        state=json.dumps(shapes),
    )
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        written = Path(folder) / "model.onnx"
        program.save(written)
        if int8:
            with quiet():
                written = quantise(written)
        os.replace(written, path)


def quantise(path):
    """Write a model with its weights in 8 bits beside another; returns its path."""
    from onnxruntime.quantization import quantize_dynamic
    from onnxruntime.quantization.shape_inference import quant_pre_process

    prepared, quantised = path.with_name("prepared.onnx"), path.with_name("int8.onnx")
    # Weights that the graph computes from others, as the LSTM's, must be constants first.
    quant_pre_process(path, prepared, skip_symbolic_shape=True)
    quantize_dynamic(prepared, quantised)
    return quantised


@contextlib.contextmanager
def quiet():
    """The exporter and the quantiser say hundreds of things about their insides."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _check_packages(int8):
    if not torch_is_at_least(2, 6):
        raise UserError(f"torch {torch.__version__}: its exporter is too old; 2.6 or newer can")
    needed = ["onnx", "onnxscript"] + ["onnxruntime"] * int8
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"{missing[0]} is missing; pip install 'fairseq-sha[export]'")


if __name__ == "__main__":
    sys.exit(main())
