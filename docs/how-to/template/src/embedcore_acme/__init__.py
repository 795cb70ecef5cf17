"""Acme's embedding service as a provider for embedcore."""
