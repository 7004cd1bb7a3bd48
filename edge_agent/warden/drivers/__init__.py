"""One module for each kind of sandbox; all pass ``tests/contract/test_drivers.py``."""
