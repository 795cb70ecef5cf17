"""``make live PROVIDER=…``: a provider against its real service, with a key, for a few cents."""
