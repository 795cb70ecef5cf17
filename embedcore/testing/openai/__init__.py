"""A fake OpenAI server on a real socket."""
