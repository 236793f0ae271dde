"""``python -m scvi_sams``: the command line."""

import sys

from scvi_sams.cli._command import main

if __name__ == "__main__":
    sys.exit(main())
