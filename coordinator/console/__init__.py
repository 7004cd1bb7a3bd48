"""The web console: pages rendered here, kept up to date by the API's stream."""
