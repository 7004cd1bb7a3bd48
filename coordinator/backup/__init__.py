"""All that a coordinator is, in one encrypted file, and back."""
