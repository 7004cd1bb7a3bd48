"""What the coordinator knows, in one SQLite file: the only place with SQL in it."""
