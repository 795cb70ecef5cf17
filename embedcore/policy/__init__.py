"""The rules between a caller and a provider."""
