"""Fleets larger than one machine holds: boxes without sandboxes, and the real broker and coordinator that they talk to."""
