"""Boxes that boot: systemd as PID 1, reached over ssh, installed by Ansible. ``make test-boxes`` runs these; they need root."""
