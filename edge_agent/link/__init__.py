"""The agent: the box's only program that speaks to broker and coordinator. Starts nothing, reaches no container engine."""
