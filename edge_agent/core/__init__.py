"""Decisions of the box as pure functions of state and time."""
