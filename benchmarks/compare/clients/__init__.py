"""One file per client: how a user of it gets vectors, in the way its own documentation shows."""
