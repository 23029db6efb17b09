"""Generate text with an exported model; needs numpy and onnxruntime, and tokenizers for pieces.

python examples/onnx/generate.py model.onnx "The history of" --length 300
"""

import argparse
import json
import os
import re
import sys

import numpy as np
import onnxruntime

parser = argparse.ArgumentParser()
parser.add_argument("model", help="file that fairseq-sha export --length 1 wrote")
parser.add_argument("prompt")
parser.add_argument("--length", type=int, default=300, help="symbols to generate")
parser.add_argument("--temperature", type=float, default=1.0, help="0: always the likeliest symbol")
args = parser.parse_args()

session = onnxruntime.InferenceSession(args.model)
metadata = session.get_modelmeta().custom_metadata_map
symbols = [symbol.encode("latin-1") for symbol in json.loads(metadata["symbols"])]
token = json.loads(metadata["start"])
types = {"tensor(float)": np.float32, "tensor(int64)": np.int64}
types = {tensor.name: types[tensor.type] for tensor in session.get_inputs()}
state = {
    name: np.zeros([shape[0], 1, *shape[2:]], types[name])
    for name, shape in json.loads(metadata["state"]).items()
}
if metadata["codec"] == "pieces":
    from tokenizers import Tokenizer

    prompt = Tokenizer.from_str(metadata["tokenizer"]).encode(args.prompt).ids
else:
    if metadata["codec"] == "bytes":
        parts = [bytes([value]) for value in os.fsencode(args.prompt)]
    else:  # words, and ends of lines
        parts = [part.encode() for part in re.findall(r"\S+|\n", args.prompt)]
        parts = [part if part == b"\n" else part + b" " for part in parts]
        parts = [part if part in symbols else b"<unk> " for part in parts]
    unknown = [part for part in parts if part not in symbols]
    if unknown:
        sys.exit(f"error: the model has no symbol for {unknown[0]}; remove it from the prompt")
    prompt = [symbols.index(part) for part in parts]

for number in range(len(prompt) + args.length):
    logits, *new_state = session.run(None, {"tokens": np.array([[token]]), **state})
    state = dict(zip(state, new_state))
    if number < len(prompt):
        token = prompt[number]
    else:
        scores = logits[0, 0].astype(float)
        scores[json.loads(metadata["not_generated"])] = -np.inf
        noise = np.random.gumbel(size=scores.shape)  # the largest sum is a draw from the softmax
        token = int(np.argmax(scores + args.temperature * noise))
    sys.stdout.buffer.write(symbols[token])
    sys.stdout.buffer.flush()
