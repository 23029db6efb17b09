"""Options of ``fairseq-train`` for a tiny model of each family, which learns something at once."""

import fairseq_sha
from fairseq_sha.models import family

fairseq_sha.register()

COMMON = """
    --tokens-per-sample 40 --random-segment-lengths --batch-size 4 --num-workers 0
    --log-interval 1 --log-format simple --cpu
"""


def options_of(family):
    """A family's own options: its sizes, and the optimiser, schedule and criterion."""
    sizes = {name.replace("_", "-"): value for name, value in family.tiny.model.items()}
    sizes = " ".join(f"--{name} {str(value).replace(' ', '')}" for name, value in sizes.items())
    criterion = "" if "--criterion" in family.tiny.training else "--criterion cross_entropy"
    return f"--arch {family.name} {sizes} {family.tiny.training} {criterion} {COMMON}"


#: By the name of the model class.
FAMILIES = {f.model.__name__: options_of(f) for f in family.FAMILIES.values()}
SHA_RNN = FAMILIES["SHARNN"]
