"""Runs the command as ``python -m bpkd_sdk.cli``."""

from bpkd_sdk.cli import main

main()
