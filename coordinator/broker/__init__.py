"""What mosquitto is told: the templates that the Ansible role renders too, and a command that renders them beside the authority's files."""
