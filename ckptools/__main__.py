"""`python -m ckptools`."""

from ckptools.cli import main

main()
