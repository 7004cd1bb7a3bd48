"""The programs of an edge box: agent (link), warden, gateway, and the worker inside each sandbox."""
