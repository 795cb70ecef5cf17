"""LiteLLM's services for embedcore."""
