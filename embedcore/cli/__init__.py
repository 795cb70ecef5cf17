"""The command line. ``main`` is the entry point; every command is a module of its own."""

from embedcore.cli.app import main

__all__ = ["main"]
