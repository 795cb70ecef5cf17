"""Streams: any number of rows, in bounded memory."""
