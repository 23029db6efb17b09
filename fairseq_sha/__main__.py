"""``python -m fairseq_sha COMMAND``."""

import sys

from fairseq_sha.commands import main

if __name__ == "__main__":
    sys.exit(main())
