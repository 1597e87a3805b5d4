"""`python -m detrdistill`, which torchrun needs."""

from detrdistill.cli import main

main()
