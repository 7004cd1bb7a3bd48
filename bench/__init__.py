"""Measurements behind the numbers in SPECIFICATION.md. Each program prints one line of JSON with the command that gave it."""
