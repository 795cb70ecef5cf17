"""Fakes in this process: an embedder, a tokenizer, a clock, a batch strategy."""
