"""A release of Skerry in one file: made where wheels can be had, unpacked beside the others on a machine that has no way to an index."""
