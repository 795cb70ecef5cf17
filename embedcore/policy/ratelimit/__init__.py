"""Rate limits: when the next request may leave."""
