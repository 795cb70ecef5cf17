"""``embedcore batch`` and its commands."""
