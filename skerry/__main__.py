"""``python -m skerry`` is the command line."""

from skerry.cli.main import main

main()
