"""Who may look and act: users with passwords, browsers that are logged in, programs with tokens. Every change is on record."""
