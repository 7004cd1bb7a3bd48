"""The program inside each sandbox: one model, one Unix socket, nothing else. Of ours it imports ``skerry.wire`` alone."""
