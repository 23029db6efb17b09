"""Models. Each file of this folder is imported, which registers what it holds."""

from pathlib import Path

from fairseq.models import import_models

# As fairseq does it for --user-dir: so a new file is found by this package's own commands too.
import_models(str(Path(__file__).parent), __name__)
