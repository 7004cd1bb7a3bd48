"""Changes the box's own programs, and takes back what is no good. Root, without a network; runs when there is something to change."""
