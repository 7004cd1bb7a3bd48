"""The operator's ``skerry``."""
