"""python -m tidaldecode: the command line (cli.py)."""

import sys

from tidaldecode.cli.app import main

if __name__ == "__main__":
    sys.exit(main())
