"""What a plugin implements: ``protocol``, ``types``, ``hookspecs``, and ``base`` to start from."""
