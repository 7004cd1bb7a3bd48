"""Images for sandboxes: the worker and its libraries on a base of one's choice, with a bill of materials; nothing is fetched inside."""
