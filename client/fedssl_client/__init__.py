"""The client door: the thin Flower app of a node, and the child process that trains."""
