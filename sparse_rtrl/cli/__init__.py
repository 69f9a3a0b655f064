"""The command line: `sparse-rtrl`."""

from sparse_rtrl.cli.app import app

__all__ = ["app"]
