"""`python -m tilestream`."""

from .cli import main

main()
