"""Google's Gemini embedding models."""
