"""Voyage's embedding models."""
