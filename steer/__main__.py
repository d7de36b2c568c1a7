"""`python -m steer`, for launchers that start a module."""

from steer.cli import main

main()
