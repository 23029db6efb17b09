"""A long training with validation, checkpoints and kills: memory and step time must stay flat.

    python benchmarks/soak.py --data data-bin/enwiki6 --minutes 20

Trains a small SHA-RNN, kills it (SIGKILL) every few minutes and starts it again. Prints, for each
life, resident memory and updates per second, early and late.
"""

import argparse
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

OPTIONS = """
    --user-dir fairseq_sha --task byte_language_modeling --cpu
    --arch sha_rnn_small --width 128 --window 256 --tokens-per-sample 64 --random-segment-lengths
    --batch-size 16 --optimizer min_trust_lamb --clip-norm 0.25 --criterion cross_entropy
    --lr 2e-3 --lr-scheduler fixed --warmup-updates 100 --max-epoch 1000
    --log-format simple --log-interval 20 --save-interval-updates 150 --keep-interval-updates 2
    --no-epoch-checkpoints
"""
POLL_SECONDS = 2


def resident_mb(pid):
    """Resident set of a process in MB."""
    status = Path(f"/proc/{pid}/status").read_text()
    found = re.search(r"VmRSS:\s+(\d+) kB", status)
    return int(found.group(1)) / 1024 if found else None


def live(command, log, seconds):
    """Run a training for a while and kill it; returns its resident memory over time, in MB."""
    memory = []
    with open(log, "wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            time.sleep(POLL_SECONDS)
            if process.poll() is not None:
                end_of_log = Path(log).read_text(errors="replace")[-1000:]
                sys.exit(f"training ended with status {process.returncode}:\n{end_of_log}")
            memory.append(resident_mb(process.pid))
        process.send_signal(signal.SIGKILL)
        process.wait()
    return [value for value in memory if value is not None]


def early_and_late(values):
    """Medians of the second and of the last quarter: the first one holds the start."""
    quarter = len(values) // 4
    return statistics.median(values[quarter : 2 * quarter]), statistics.median(values[-quarter:])


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", default="data-bin/enwiki6")
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--kills", type=int, default=4, help="so many times, evenly spread")
    args = parser.parse_args()
    lives = args.kills + 1
    print("| life | from update | updates/s, early | late | resident MB, early | late |")
    print("| --- | --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        program = Path(sys.executable).parent / "fairseq-train"
        command = [str(program), args.data, *OPTIONS.split(), "--save-dir", folder]
        for number in range(1, lives + 1):
            log = Path(folder) / f"{number}.log"
            memory = live(command, log, args.minutes * 60 / lives)
            text = log.read_text(errors="replace")
            speeds = [float(value) for value in re.findall(r"train_inner.*? ups=([0-9.]+)", text)]
            first = re.search(r"train_inner.*? num_updates=(\d+)", text)
            if len(speeds) < 4 or len(memory) < 4:
                sys.exit(f"a life of {args.minutes / lives:.1f} minutes is too short to tell")
            (ups, later_ups), (mb, later_mb) = early_and_late(speeds), early_and_late(memory)
            print(
                f"| {number} | {first.group(1)} | {ups:.2f} | {later_ups:.2f} "
                f"| {mb:.0f} | {later_mb:.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
