"""A trained model as torch runs it and exported, with weights in float32 and in 8 bits: bits per
byte of some text, read in one stream, and speed, in segments and one byte at a time.

    python benchmarks/exported.py --checkpoint CHECKPOINT --data data-bin/enwiki6
"""

import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from timing import arguments, describe_machine

from fairseq_sha.data.corpus import Corpus
from fairseq_sha.onnx_export import export
from fairseq_sha.trained_model import TrainedModel

STEPS = 300


class InTorch:
    def __init__(self, model):
        self.model = model

    def start(self):
        return None

    @torch.no_grad()
    def read(self, tokens, state):
        logits, state = self.model.read(torch.from_numpy(tokens), state)
        return logits.numpy(), state


class InOnnxruntime:
    def __init__(self, path, threads):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self.session = onnxruntime.InferenceSession(path, options)
        self.shapes = json.loads(self.session.get_modelmeta().custom_metadata_map["state"])
        types = {"tensor(float)": np.float32, "tensor(int64)": np.int64}
        self.types = {tensor.name: types[tensor.type] for tensor in self.session.get_inputs()}

    def start(self):
        return [np.zeros([s[0], 1, *s[2:]], self.types[n]) for n, s in self.shapes.items()]

    def read(self, tokens, state):
        logits, *state = self.session.run(None, {"tokens": tokens, **dict(zip(self.shapes, state))})
        return logits, state


def score(form, text, length):
    """Bits per byte, and bytes per second."""
    total, state, start = 0.0, form.start(), time.perf_counter()
    for first in range(0, len(text) - length, length):
        tokens, targets = text[first : first + length], text[first + 1 : first + length + 1]
        logits, state = form.read(tokens[:, None], state)
        logits = torch.from_numpy(logits[:, 0]).double()
        total += (
            float(torch.nn.functional.cross_entropy(logits, torch.from_numpy(targets))) * length
        )
    scored = (len(text) - 1) // length * length
    return total / scored / np.log(2), scored / (time.perf_counter() - start)


def steps_per_second(form, text):
    state, times = form.start(), []
    for token in text[:STEPS]:
        start = time.perf_counter()
        _, state = form.read(np.array([[token]]), state)
        times.append(time.perf_counter() - start)
    return 1 / statistics.median(times)


def main(argv=None):
    parser = arguments(__doc__)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--data", required=True, help="data folder; its test part is read")
    parser.add_argument("--bytes", type=int, default=50000, help="how many to score")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    model = TrainedModel.load(args.checkpoint, cpu=True)
    length = model.cfg.task.tokens_per_sample
    corpus = Corpus(f"{args.data}/test")
    text = np.append(model.task.codec.start, corpus.tokens[: args.bytes].astype(np.int64))
    print(f"{describe_machine()}; segments of {length}\n")
    print("| form | bytes of file | bits per byte | bytes/s, in segments | one at a time |")
    print("| --- " * 5 + "|")
    with tempfile.TemporaryDirectory() as folder:
        for name in ("torch", "ONNX, float32", "ONNX, int8"):
            if name == "torch":
                size = Path(args.checkpoint).stat().st_size
                forms = [InTorch(model)] * 2
            else:
                paths = [Path(folder, f"{name[-4:]}{tokens}.onnx") for tokens in (length, 1)]
                for path, tokens in zip(paths, (length, 1)):
                    export(model, path, tokens, int8=name.endswith("int8"))
                size = paths[1].stat().st_size
                forms = [InOnnxruntime(path, args.threads) for path in paths]
            bits, speed = score(forms[0], text, length)
            print(
                f"| {name} | {size:,} | {bits:.4f} | {speed:,.0f} "
                f"| {steps_per_second(forms[1], text):,.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
