"""`python -m sparsecut` is the command `sparsecut`."""

from .cli import main

main()
