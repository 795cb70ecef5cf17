"""Static embedding models on this machine, by model2vec, for embedcore."""
