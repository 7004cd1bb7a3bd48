"""A whole fleet on one machine: real broker, coordinator, boxes and sandboxes, and a story that puts them to the test."""
