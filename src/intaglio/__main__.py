"""`python -m intaglio`, which `torchrun -m intaglio` starts in several processes."""

from intaglio.cli import main

main()
