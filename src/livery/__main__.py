"""`python -m livery` is the `livery` command."""

from livery.cli import main

main()
