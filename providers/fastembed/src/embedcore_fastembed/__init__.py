"""Embedding models on this machine, by FastEmbed and ONNX Runtime, for embedcore."""
