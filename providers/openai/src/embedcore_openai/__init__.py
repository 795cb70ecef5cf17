"""embedcore's provider for OpenAI, Azure OpenAI and servers that speak the same API.

Found through the entry point ``embedcore`` → ``openai``; nothing here needs to be imported by hand.
"""
