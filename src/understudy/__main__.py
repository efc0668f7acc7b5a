"""`python -m understudy` is the command line."""

from .cli import main

main()
