"""`python -m sparsecut` is the command `sparsecut`."""

from .cli.app import main

main()
