"""python -m tidaldecode and the console script: the command line (cli/app.py)."""

import sys

EXIT_INTERRUPTED = 130


def main() -> int:
    """Runs the command line; Ctrl-C ends it with one line from the first import on."""
    try:
        from tidaldecode.cli.app import main as run

        return run()
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
