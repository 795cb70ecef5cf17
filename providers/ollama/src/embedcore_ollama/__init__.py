"""Embedding models of an Ollama server."""
