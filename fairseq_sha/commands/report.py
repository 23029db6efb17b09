"""Write a page about one or several finished comparisons.

    fairseq-sha report OUT [OUT ...] --to FOLDER

OUT is a folder that fairseq-sha compare has written; its results.json is enough. Several
comparisons of the same test text, such as longer budgets, are also drawn together, and those of one
budget get a table of all their models. FOLDER gets report.md, pictures (they need matplotlib: pip
install 'fairseq-sha[plots]'), and index.html, which holds the pictures and needs no other file.

--reach says what each model needs to reach given bits per byte on valid: updates, bytes, FLOPs and
seconds, with the ratio to one model. Of one comparison they are read off learning curves, of
several off whole runs of several lengths, which is the better measure.

--relative-to MODEL compares scores and costs to those of MODEL, such as the one that was changed to
make the others, instead of the best.
"""

import sys
from pathlib import Path


def add_arguments(parser):
    """Declare the options."""
    parser.add_argument(
        "folders", nargs="+", type=Path, metavar="OUT", help="folder of a comparison"
    )
    parser.add_argument(
        "--to", required=True, type=Path, metavar="FOLDER", help="where the report is written"
    )
    parser.add_argument(
        "--reach",
        nargs="+",
        type=float,
        default=[],
        metavar="BITS",
        help="what it costs to reach these bits per byte on valid",
    )
    parser.add_argument(
        "--relative-to",
        metavar="MODEL",
        help="the model to which others are compared (default: the best on test)",
    )


def run(args):
    """Write the report."""
    from fairseq_sha.compare import page

    if not page.write(args.folders, args.to, args.reach, args.relative_to):
        print(
            "no pictures: matplotlib is missing; pip install 'fairseq-sha[plots]'", file=sys.stderr
        )
    print(args.to / "index.html")
