"""The coordinator's decisions: pure functions of state and time."""
