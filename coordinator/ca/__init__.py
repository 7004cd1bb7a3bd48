"""The fleet's keys."""
