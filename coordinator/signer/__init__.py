"""The key that signs what boxes are told to do, in a process of its own that has nothing else, and the coordinator's way to it."""
