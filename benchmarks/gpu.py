"""What a GPU does with the models of the papers: their steps, the optimiser, the recurrences. Each
part can be run by itself, with --device cuda.

    python benchmarks/gpu.py | tee my_card.md
"""

import optimizer
import recurrences
import steps
import torch
from timing import arguments

from fairseq_sha import UserError


def main():
    parser = arguments(__doc__)
    parser.set_defaults(repeats=5)
    parser.add_argument("--compile", action="store_true", help="measure compiled layers, too")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise UserError("torch sees no CUDA GPU here; make bench measures on the CPU")
    common = ["--device", "cuda", "--repeats", str(args.repeats)]
    paper = ["--sizes", "paper", *common]
    print("# Training step and evaluation pass, models of the papers")
    for precision in ("amp", "float32"):
        steps.main([*paper, "--precision", precision])
    if args.compile:
        print("\n# Compiled")
        steps.main([*paper, "--precision", "amp", "--compile"])
    print("\n# Optimiser\n")
    optimizer.main(common)
    print("\n# Recurrences\n")
    recurrences.main(common)


if __name__ == "__main__":
    main()
