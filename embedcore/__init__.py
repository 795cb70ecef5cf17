"""Text in, vectors out, from any provider, inside a budget, paying once."""
