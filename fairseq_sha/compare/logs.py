"""Reads what commands leave: logs of fairseq's, JSON of ``fairseq-sha evaluate``."""

import json
import math
import re
import statistics
from typing import List, NamedTuple, Tuple

SETTLING = 10  # first updates of a run, which are not timed
ENDED = "fairseq-sha compare: ended with status"  # our own line after each command


class Training(NamedTuple):
    """The log of a training run. If a resumed run repeats an update, the later one counts."""

    finished: bool
    train: List[Tuple[int, float]]  # (update, bits per byte since the previous line)
    valid: List[Tuple[int, float]]
    tokens_per_update: float
    bytes_per_token: float  # 1 if the log does not tell
    seconds_per_update: float  # median, without validation and checkpoints


def read_training(text):
    """Read the output of fairseq-hydra-train with ``log_format=json``.

    Returns None if it has no line of numbers yet. fairseq logs ``train_wall`` in whole seconds, and
    its value is wrong after a resume. So times come from the tokens per second between two lines
    (``wps``), without the intervals in which fairseq started, validated or saved.
    """
    train, valid, tokens, seconds, all_seconds = {}, {}, {}, {}, {}
    bits_per_token = {}
    steady = False
    for line in text.splitlines():
        if line.startswith("training on "):  # fairseq started
            steady = False
        if not line.startswith('{"epoch"'):
            continue
        try:
            stats = json.loads(line)
        except ValueError:  # still being written, or cut off because the run was killed
            continue
        if "valid_num_updates" in stats:
            valid[int(stats["valid_num_updates"])] = bits(stats, "valid_")
            steady = False
        elif "num_updates" in stats:
            update = int(stats["num_updates"])
            train[update] = bits(stats, "")
            tokens[update] = float(stats["wpb"])
            if {"nats", "bpb"} <= set(stats):
                bits_per_token[update] = float(stats["nats"]) / math.log(2)
            if float(stats["wps"]) > 0:  # it is 0 for a run's first update
                all_seconds[update] = tokens[update] / float(stats["wps"])
                if steady and update > SETTLING:
                    seconds[update] = all_seconds[update]
            steady = True
    if not train:
        return None
    return Training(
        finished="done training in" in text,
        train=sorted(train.items()),
        valid=sorted(valid.items()),
        tokens_per_update=mean(tokens.values()),
        bytes_per_token=sum(bits_per_token.values()) / sum(train[u] for u in bits_per_token)
        if bits_per_token
        else 1.0,
        # The median is robust against other load on the machine for less than half of the run.
        seconds_per_update=statistics.median([*(seconds or all_seconds).values()] or [math.nan]),
    )


def bits(stats, prefix):
    """Bits per byte with a task of this package, or else per token: fairseq logs base 2;
    ``nll_loss`` excludes what a criterion adds."""
    for key in ("bpb", "nll_loss", "loss"):
        if prefix + key in stats:
            return float(stats[prefix + key])
    return float("nan")


def read_parameters(text):
    """Number of parameters, or None."""
    found = re.search(r"num\. (?:shared )?model params: ([0-9,]+)", text)
    return int(found.group(1).replace(",", "")) if found else None


def read_device(text):
    """Name of the GPU that a training ran on, or "CPU"."""
    gpu = re.search(r"^rank .* name = (.+?)\s*$", text, re.MULTILINE)
    return gpu.group(1) if gpu else "CPU"


def read_peak(text):
    """Peak resident memory in MB over all commands of a run; None if it is not known, since a
    launcher ran it or the process that watched it was killed."""
    peaks = re.findall(rf"^{ENDED} \S+, peak memory (\d+) MB$", text, re.MULTILINE)
    return max(map(int, peaks), default=None)


def read_evaluation(path):
    """What ``fairseq-sha evaluate --json`` wrote, or None if it is not done.

    Returns a dict of ``bits`` per byte, ``nats`` in all, ``tokens``, ``bytes``, ``words``,
    ``sha256``, ``policy``, ``streams``, ``tokens_per_second``, ``block_bytes`` and ``block_bits``.
    """
    if not path.is_file():
        return None
    score = json.loads(path.read_text(encoding="utf-8"))
    bits, seconds = score.pop("bits_per_byte"), score.pop("seconds")
    speed = float(f"{score['tokens'] / max(seconds, 1e-3):.6g}")
    return {"bits": bits, "tokens_per_second": speed, **score}


def read_eval_lm(text):
    """Bits per token, tokens and tokens per second that fairseq-eval-lm printed, or None."""
    score = re.findall(r"Loss \(base 2\): (\S+),", text)
    counted = re.findall(r"Evaluated ([0-9,]+) tokens in \S+ \((\S+) tokens/s\)", text)
    if not score or not counted:
        return None
    tokens, speed = counted[-1]
    return {
        "bits": float(score[-1]),
        "tokens": int(tokens.replace(",", "")),
        "tokens_per_second": float(speed),
    }


def read(path):
    """The text of a file; empty if there is none."""
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def mean(values):
    """The mean; nan if there are no values."""
    values = list(values)
    return sum(values) / len(values) if values else float("nan")
