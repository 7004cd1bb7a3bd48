"""``skerry-warden``: makes the box what its signed desired document says. It has no network."""
