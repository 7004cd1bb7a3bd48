"""What every Skerry program needs to run: settings, logs, signals, systemd, durable files."""
