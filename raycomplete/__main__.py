"""`python -m raycomplete`."""

from raycomplete.cli import main

main()
