"""Generate text with an exported model; needs numpy and onnxruntime.

python examples/onnx/generate.py model.onnx "The history of" --length 300
"""

import argparse
import json
import sys

import numpy as np
import onnxruntime

parser = argparse.ArgumentParser()
parser.add_argument("model", help="of fairseq_sha.commands.export, --length 1")
parser.add_argument("prompt")
parser.add_argument("--length", type=int, default=300)
parser.add_argument("--temperature", type=float, default=1.0, help="0: the likeliest byte always")
args = parser.parse_args()

session = onnxruntime.InferenceSession(args.model)
metadata = session.get_modelmeta().custom_metadata_map  # quantisation adds some that are not JSON
about = {key: json.loads(metadata[key]) for key in ("bytes", "start", "state")}
byte_of, token = about["bytes"], about["start"]
state = {
    name: np.zeros([shape[0], 1, *shape[2:]], np.float32) for name, shape in about["state"].items()
}
forbidden = [byte is None for byte in byte_of]
prompt = args.prompt.encode()
for number in range(len(prompt) + args.length):
    logits, *left = session.run(None, {"tokens": np.array([[token]]), **state})
    state = dict(zip(state, left))
    if number < len(prompt):
        if prompt[number] not in byte_of:
            sys.exit(f"error: the model knows no byte {prompt[number]}; remove it from the prompt")
        token = byte_of.index(prompt[number])
    else:
        scores = np.where(forbidden, -np.inf, logits[0, 0])
        noise = np.random.gumbel(size=scores.shape)  # the largest sum is a draw from the softmax
        token = int(np.argmax(scores + args.temperature * noise))
    sys.stdout.buffer.write(bytes([byte_of[token]]))
    sys.stdout.buffer.flush()
