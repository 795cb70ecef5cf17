"""What survives a restart: the state file, the vector cache, batches."""
