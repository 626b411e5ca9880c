"""`python -m sparsecut` is the command `sparsecut`."""

from .cli.main import main

main()
