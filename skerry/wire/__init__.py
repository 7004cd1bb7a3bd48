"""The pure protocol that box and coordinator share: no I/O, no clock, no randomness."""
