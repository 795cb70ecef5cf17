"""The rules, in the order they apply."""
