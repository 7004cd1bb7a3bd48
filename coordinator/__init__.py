"""One per fleet: registry, planner, model store, signing key, API and console."""
