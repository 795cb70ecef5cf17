"""The reader of error bodies is the core's: ``embedcore.provider.error_bodies``."""

from embedcore.provider.error_bodies import ErrorBody, error_in, read_body

__all__ = ["ErrorBody", "error_in", "read_body"]
