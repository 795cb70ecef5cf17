"""Mistral's embedding models."""
