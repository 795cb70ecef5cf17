"""The immediate strategy: texts embedded now."""
