"""A lexical embedding without network: signed hashing of words and character n-grams."""
