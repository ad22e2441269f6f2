"""The commands of `fedssl`, one file a group. Each reads, calls one function, prints and leaves, and loads what it needs when it is called."""
