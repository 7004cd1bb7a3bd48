"""The demo's broker: mosquitto where it is installed, else the embedded one. Loopback only, no TLS; ``python -m skerry.demo.broker``.

The embedded broker (iotcore: rumqttd in a wheel) has no per-client access list, does not verify client certificates, keeps
nothing over a restart and passes on only some of many retained messages. Anything beyond one machine is mosquitto's work.
"""

import argparse
import os
import shutil
from pathlib import Path

MOSQUITTO = """\
per_listener_settings true
persistence true
persistence_location {folder}/
autosave_interval 10
max_queued_messages 50000
max_inflight_messages 200
memory_limit 1073741824
set_tcp_nodelay true
listener {port} 127.0.0.1
allow_anonymous true
"""

EMBEDDED = """\
id = 0
[router]
id = 0
max_connections = 2000
max_outgoing_packet_count = 500
max_segment_size = 16777216
max_segment_count = 10
[v5.1]
name = "v5-1"
listen = "127.0.0.1:{port}"
next_connection_delay_ms = 1
[v5.1.connections]
connection_timeout_ms = 5000
max_payload_size = 262144
max_inflight_count = 200
dynamic_filters = true
"""


def find_mosquitto() -> str | None:
    """The mosquitto program; Debian puts it where ordinary users do not look."""
    return shutil.which("mosquitto", path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"]))


def main() -> None:
    """Become the broker."""
    parser = argparse.ArgumentParser(prog="skerry.demo.broker", description="An MQTT 5 broker on loopback.")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--dir", type=Path, required=True, help="where its configuration and state go")
    parser.add_argument("--kind", choices=["auto", "mosquitto", "embedded"], default="auto")
    arguments = parser.parse_args()
    folder: Path = arguments.dir.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    mosquitto = None if arguments.kind == "embedded" else find_mosquitto()
    if mosquitto is None and arguments.kind == "mosquitto":
        parser.error("mosquitto is not installed")
    if mosquitto is not None:
        config = folder / "mosquitto.conf"
        user = "user root\n" if os.geteuid() == 0 else ""  # else it would become a user who can't write here
        config.write_text(user + MOSQUITTO.format(folder=folder, port=arguments.port))
        os.execv(mosquitto, [mosquitto, "-c", str(config)])  # noqa: S606 - a fixed list, no shell
    from iotcore import Broker

    config = folder / "embedded.toml"
    config.write_text(EMBEDDED.format(port=arguments.port))
    Broker(config_path=str(config)).run_forever()


if __name__ == "__main__":
    main()
