"""Lets ``python -m swaft`` run the ``swaft`` program."""

from swaft.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
