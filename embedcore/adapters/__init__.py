"""Thin adapters to other frameworks, each an optional extra.

``langchain``: ``EmbedcoreEmbeddings``, a client as LangChain's ``Embeddings``.
``opentelemetry``: ``OpenTelemetryObserver``, events as spans and metrics.
"""
