"""An inventory of the boxes that a Skerry coordinator knows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ansible.errors import AnsibleParserError
from ansible.module_utils.urls import open_url

from ansible.plugins.inventory import BaseInventoryPlugin, Constructable

DOCUMENTATION = """
name: nodes
short_description: The boxes that a Skerry coordinator knows
description:
  - Asks the coordinator for its boxes. Each is a host of the group C(edge), whichever its tier, as the playbooks expect.
  - Groups are C(tier_edge), C(state_online), C(site_store_1) and so on, one for each label, and what C(groups), C(keyed_groups) and
    C(compose) say.
  - Boxes that were thrown out are left out.
options:
  plugin:
    description: This plugin's name, C(skerry.fleet.nodes); C(nodes) from a checkout.
    required: true
    choices: [skerry.fleet.nodes, nodes]
  url:
    description: Where the coordinator is reached.
    required: true
    env: [{name: SKERRY_URL}]
  token_file:
    description: A file that holds a token of a viewer or above, as C(skerry token make) prints it.
    type: path
    required: true
    env: [{name: SKERRY_TOKEN_FILE}]
  ca_file:
    description: The fleet's root certificate, C(/var/lib/skerry/coordinator/ca/root.crt) on the coordinator's machine.
    type: path
    env: [{name: SKERRY_CA_FILE}]
  timeout:
    description: Seconds to wait for an answer.
    type: int
    default: 30
extends_documentation_fragment: [constructed]
"""

EXAMPLES = """
# fleet.skerry.yml
plugin: skerry.fleet.nodes
url: https://coordinator.example.org:8443
token_file: ~/.config/skerry/viewer.token
ca_file: ~/.config/skerry/root.crt
compose:
  ansible_user: "'root'"
"""

ENDINGS = (".skerry.yml", ".skerry.yaml")


class InventoryModule(BaseInventoryPlugin, Constructable):
    """``ansible-inventory -i fleet.skerry.yml --graph``."""

    NAME = "skerry.fleet.nodes"

    def verify_file(self, path: str) -> bool:
        """Whether a file is meant for this plugin."""
        return bool(super().verify_file(path)) and path.endswith(ENDINGS)

    def parse(self, inventory: Any, loader: Any, path: str, cache: bool = True) -> None:
        """Fill the inventory. Raises AnsibleParserError."""
        super().parse(inventory, loader, path, cache)
        self._read_config_data(path)
        self.inventory.add_group("edge")
        for node in self._nodes():
            if node["state"] != "revoked":
                self._add(node)

    def _nodes(self) -> list[dict[str, Any]]:
        url, token_file = self.get_option("url"), Path(self.get_option("token_file")).expanduser()
        ca_file = self.get_option("ca_file")
        try:
            headers = {"Authorization": f"Bearer {token_file.read_text().strip()}"}
            ca_path = str(Path(ca_file).expanduser()) if ca_file else None
            address = f"{url.rstrip('/')}/v1/nodes"
            answer = open_url(address, headers=headers, ca_path=ca_path, timeout=self.get_option("timeout"))
            return list(json.loads(answer.read()))
        except OSError as exc:
            raise AnsibleParserError(f"{exc.filename or url}: {exc.strerror or exc}") from exc
        except ValueError as exc:
            raise AnsibleParserError(f"{url}: answers what is no list of boxes: {exc}") from exc

    def _add(self, node: dict[str, Any]) -> None:
        host = self.inventory.add_host(node["id"], group="edge")
        variables = {
            "ansible_host": urlsplit(node["gateway_url"]).hostname or node["id"],
            "edge_agent_node": node["id"],
            "edge_agent_tier": node["tier"] or "edge",
            "edge_agent_labels": node["labels"],
            "skerry_state": node["state"],
            "skerry_version_running": node["version"],
            "skerry_is_drained": node["drained_at_ms"] > 0,
        }
        for name, value in variables.items():
            self.inventory.set_variable(host, name, value)
        words = [("tier", variables["edge_agent_tier"]), ("state", node["state"]), *sorted(node["labels"].items())]
        for key, value in words:
            group = self.inventory.add_group(self._sanitize_group_name(f"{key}_{value}"))
            self.inventory.add_host(host, group=group)
        strict = self.get_option("strict")
        known = self.inventory.get_host(host).get_vars()
        self._set_composite_vars(self.get_option("compose"), known, host, strict=strict)
        self._add_host_to_composed_groups(self.get_option("groups"), known, host, strict=strict)
        self._add_host_to_keyed_groups(self.get_option("keyed_groups"), known, host, strict=strict)
