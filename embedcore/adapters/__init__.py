"""Thin adapters to other frameworks, each an optional extra."""
