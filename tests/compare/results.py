"""Made-up results of comparisons, and what reports say of them."""

import math
import re

from numpy.random import RandomState

FAST = {"cpu": "Fast CPU", "cpus": 2, "omp_num_threads": "1", "torch": "2.13.0", "commit": "abc123"}
SLOW = {"cpu": "Slow CPU", "cpus": 4, "omp_num_threads": None, "torch": "2.13.0"}
BLOCKS, BLOCK = 30, 10_000
SIZE = BLOCKS * BLOCK
#: What each model can reach, and how much it differs between seeds.
MODELS = {
    "sha_lstm": (2.05, 0.004),
    "sha_sru": (2.052, 0.004),
    "sha_rnn": (2.12, 0.005),
    "adaptive_span": (2.3, 0.01),
    "transformer_xl": (2.6, 0.02),
}


def run(model, seed, bits, random, seconds=720, machine=FAST, with_blocks=True, **changes):
    """A run of ``model``; nan for ``bits`` is a run that diverged."""
    # What makes a block hard is the same for all models.
    hard = RandomState(7).normal(0, 0.2, BLOCKS)
    hard -= hard.mean()
    blocks = [round(float(v), 3) for v in BLOCK * (bits + hard + random.normal(0, 0.01, BLOCKS))]
    bits = math.fsum(blocks) / SIZE
    test = {"bits": bits, "tokens": SIZE, "tokens_per_second": 9000.0, "bytes": SIZE}
    test.update(policy="state carried, 8 streams, segments of 64", block_bytes=BLOCK)
    test.update(block_bits=blocks)
    if not with_blocks:
        test = {key: test[key] for key in ("bits", "tokens", "tokens_per_second")}
    updates = 2 * seconds
    steps = [round(updates * share / 40) for share in range(1, 41)]
    start = 3.0 if bits == bits else bits
    curve = [[step, bits + start * math.exp(-8 * step / updates)] for step in steps]
    return {
        **{"model": model, "seed": seed, "parameters": 3_500_000, "updates": updates},
        **{"bytes": 2000 * updates, "training_seconds": float(seconds), "device": "CPU"},
        **{"training_tokens_per_second": 4000.0, "peak_memory_mb": 800, "machine": machine},
        **{"training_flops": 6.0 * 3_500_000 * 2000 * updates, "train_curve": curve},
        **{"valid": {**test, "bits": bits + 0.01}, "test": test, "valid_curve": curve[9::10]},
        **changes,
    }


def with_text(found, sha256):
    """Results whose models have scored a text with this hash."""
    for run in found["runs"]:
        run["test"]["sha256"] = sha256
    return found


def trials(bits, random, count):
    """Trials of a model: trial 0 is the paper's recipe, and one of them fails."""
    made = []
    for trial in range(count):
        lr = 1.0 if trial == 0 else float(10 ** random.uniform(-1, 1))
        settings = {"lr": lr, "warmup": float(random.choice([0.02, 0.05, 0.1, 0.2]))}
        settings.update(dropout=float(random.uniform(0, 1)), streams=int(random.choice([8, 16])))
        score = bits + 0.3 * (math.log10(lr) - 0.6) ** 2 + random.normal(0, 0.01)
        made.append({"trial": trial, "settings": settings, "bits": None if trial == 3 else score})
        made[-1].update(updates=700, bytes=1_400_000, machine=FAST)
    chosen = min((t for t in made if t["bits"] is not None), key=lambda t: t["bits"])["trial"]
    return {"trials": made, "chosen": chosen, "on_border": ["lr"] if count > 8 else []}


def comparison(seconds=720, tuned=True, rivals=True, seeds=(1, 2, 3), shift=0.0):
    """Results of ``fairseq-sha compare``, with a model that diverged."""
    random = RandomState(seconds)
    runs = []
    for name, (level, spread) in MODELS.items():
        for recipe, loss in {"paper": 0.15, "tuned": 0.0}.items() if tuned else [("paper", 0.15)]:
            for seed in seeds:
                bits = level + loss + shift + random.normal(0, spread)
                more = {"recipe": recipe} if tuned else {}
                runs.append(run(name, seed, bits, random, seconds, **more))
    more = {"recipe": "tuned"} if tuned else {}
    runs.append(run("min_gru", 1, float("nan"), random, seconds, **more))
    found = {
        "command": f"fairseq-sha compare --configs a.yaml --seconds {seconds} --out 'runs/<x> & y'",
        "settings": {"budget": f"{seconds} seconds", "data": "data-bin/enwiki6", "eval_streams": 8},
        "not_finished": ["min_gru seed 2"],
        "runs": runs,
    }
    if tuned:
        models = {name: trials(level, random, 8) for name, (level, _) in MODELS.items()}
        found["tuning"] = {"space": {"lr": [0.1, 10]}, "budget": "360 seconds", "models": models}
    if rivals:
        primed = {"name": "PPMd, order 16", "primed_with": 5_480_772, "bits": 1.79}
        primed.update(seconds=1.2, version="pyppmd 1.1.0")
        xz = {"name": "xz -9e", "primed_with": 0, "bits": 2.481, "seconds": 0.3, "version": "lzma"}
        found["rivals"] = [primed, {**primed, "primed_with": 0, "bits": 2.08}, xz]
    return found


def cells_of(report, title=None):
    """The rows of a table of a report, by model; by default of the first table."""
    table = report.split(f"**{title}**\n\n" if title else "```\n\n")[1].split("\n\n")[0]
    rows = [re.split(r" \| ", line.strip("| ")) for line in table.splitlines()]
    return {row[0]: dict(zip(rows[0], row)) for row in rows[2:]}
