"""Write a page about one or several finished comparisons.

    fairseq-sha report OUT [OUT ...] --to FOLDER

OUT is a folder that fairseq-sha compare has written; its results.json is enough. Several
comparisons of the same test text, such as longer budgets, are also drawn together. FOLDER gets
report.md, pictures (they need matplotlib: pip install 'fairseq-sha[plots]'), and index.html, which
holds the pictures and needs no other file.
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


def run(args):
    """Write the report."""
    from fairseq_sha.compare import page

    if not page.write(args.folders, args.to):
        print(
            "no pictures: matplotlib is missing; pip install 'fairseq-sha[plots]'", file=sys.stderr
        )
    print(args.to / "index.html")
