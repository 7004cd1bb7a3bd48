"""Which system calls a sandbox has, as data, and the same as the kernel and the engine read it. Pure; used by the warden and the worker."""
