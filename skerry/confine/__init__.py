"""Which system calls a confined program has, as data, the same as the kernel and the engine read it, and how a program confines itself."""
