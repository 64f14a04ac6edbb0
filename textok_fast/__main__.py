"""``python -m textok_fast`` is the ``textok-fast`` command."""

import sys

from textok_fast.cli import main

if __name__ == "__main__":
    sys.exit(main())
