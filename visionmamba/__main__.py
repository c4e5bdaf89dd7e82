"""`python -m visionmamba`: the same as the command `visionmamba`."""

import sys

from visionmamba.cli import main

if __name__ == "__main__":
    sys.exit(main())
