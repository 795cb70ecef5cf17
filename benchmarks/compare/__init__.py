"""embedcore and its peers, one after the other, against one fake OpenAI server."""
