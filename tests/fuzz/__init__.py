"""Every decoder that meets bytes from outside, under bytes that nobody meant."""
