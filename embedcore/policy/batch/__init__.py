"""Batches: texts embedded within a day, durable across processes."""
