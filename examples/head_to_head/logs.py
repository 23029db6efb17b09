"""What fairseq's commands wrote into their logs."""

import json
import math
import re
import statistics
from typing import List, NamedTuple, Tuple

SETTLING = 10  # updates of a calibration that are not timed
ENDED = "head_to_head: ended with status"  # our own line after each piece of a run


class Training(NamedTuple):
    """The log of a training run; a resumed run's has several pieces, the last of which counts."""

    finished: bool
    train: List[Tuple[int, float]]  # (update, bits per token since the line before)
    valid: List[Tuple[int, float]]
    tokens_per_update: float
    seconds_per_update: float  # median, without validation and checkpoints


def read_training(text):
    """Read the output of fairseq-hydra-train with ``log_format=json``; None before its first line
    of numbers.

    fairseq logs ``train_wall`` in whole seconds, and what a checkpoint holds of it stands still
    after a resume. So time is taken from tokens per second between two lines (``wps``), without
    those in between which it validated, saved or started.
    """
    train, valid, tokens, seconds, all_seconds = {}, {}, {}, {}, {}
    steady = False
    for line in text.splitlines():
        if line.startswith("training on "):  # fairseq started
            steady = False
        if not line.startswith('{"epoch"'):
            continue
        try:
            stats = json.loads(line)
        except ValueError:  # still being written, or cut off when the run was killed
            continue
        if "valid_num_updates" in stats:
            valid[int(stats["valid_num_updates"])] = bits(stats, "valid_")
            steady = False
        elif "num_updates" in stats:
            update = int(stats["num_updates"])
            train[update] = bits(stats, "")
            tokens[update] = float(stats["wpb"])
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
        # The median stands a disturbance of the machine for less than half of the run.
        seconds_per_update=statistics.median([*(seconds or all_seconds).values()] or [math.nan]),
    )


def bits(stats, prefix):
    """Bits per token. fairseq's losses are base 2; nll_loss is without what a criterion adds."""
    for key in ("bpc", "nll_loss", "loss"):
        if prefix + key in stats:
            return float(stats[prefix + key])
    return float("nan")


def read_parameters(text):
    """Number of parameters, or None."""
    found = re.search(r"num\. (?:shared )?model params: ([0-9,]+)", text)
    return int(found.group(1).replace(",", "")) if found else None


def read_peak(text):
    """Peak resident memory in MB over all pieces of a run; None where it ran elsewhere."""
    peaks = re.findall(rf"^{ENDED} \S+, peak memory (\d+) MB$", text, re.MULTILINE)
    return max(map(int, peaks), default=None)


def read_evaluation(text):
    """Bits per token, tokens and tokens per second as fairseq-eval-lm printed them, or None."""
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


def mean(values):
    """The mean; nan of nothing."""
    values = list(values)
    return sum(values) / len(values) if values else float("nan")
