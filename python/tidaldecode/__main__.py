"""python -m tidaldecode: the command line (cli.py)."""

import sys

from tidaldecode.cli import main

if __name__ == "__main__":
    sys.exit(main())
