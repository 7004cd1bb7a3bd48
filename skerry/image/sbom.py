"""The bill of materials of an image, CycloneDX 1.6 in JSON: what pip installed, by its wheel's digest, and what Debian's list holds."""

import uuid
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from skerry import __version__
from skerry.image.build import Built
from skerry.image.engine import Engine, ImageError
from skerry.image.lock import EXTRA_HINT

if TYPE_CHECKING:  # an optional dependency
    from cyclonedx.model.bom import Bom

STATUS = "/var/lib/dpkg/status"
OS_RELEASE = "/usr/lib/os-release"
"""The file itself: what lies in /etc is a link to it."""


class Package(msgspec.Struct, frozen=True):
    """A Debian package that is installed."""

    name: str
    version: str
    architecture: str


def packages_of(status: str) -> list[Package]:
    """The installed packages in the text of dpkg's status file, by name."""
    found = []
    for paragraph in status.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in paragraph.splitlines() if ": " in line and not line[0].isspace())
        if fields.get("Status", "").endswith(" installed") and "Package" in fields and "Version" in fields:
            found.append(Package(fields["Package"], fields["Version"], fields.get("Architecture", "")))
    return sorted(found, key=lambda package: (package.name, package.architecture))


def system_of(os_release: str) -> tuple[str, str]:
    """The system's id and version in the text of its os-release file, such as debian and 12; empty where it does not say."""
    fields = dict(line.split("=", 1) for line in os_release.splitlines() if "=" in line)
    return fields.get("ID", "").strip('"'), fields.get("VERSION_ID", "").strip('"')


def write_sbom(engine: Engine, built: Built, target: Path) -> int:
    """Write the bill of an image that was just built; returns the number of its components. Raises ImageError."""
    try:
        from cyclonedx.output.json import JsonV1Dot6
    except ImportError as exc:
        raise ImageError("the package 'cyclonedx-python-lib' is not installed", hint=EXTRA_HINT) from exc
    status, release = (engine.read_file(built.id, path) or b"" for path in (STATUS, OS_RELEASE))
    bom = _bom(built, packages_of(status.decode(errors="replace")), *system_of(release.decode(errors="replace")))
    try:
        target.write_text(JsonV1Dot6(bom).output_as_string(indent=2) + "\n")
    except OSError as exc:
        raise ImageError(f"{target}: {exc.strerror or exc}") from exc
    return len(bom.components)


def _bom(built: Built, packages: list[Package], system: str, system_version: str) -> "Bom":
    from cyclonedx.model import HashAlgorithm, HashType, Property
    from cyclonedx.model.bom import Bom
    from cyclonedx.model.component import Component, ComponentType
    from packageurl import PackageURL

    bom = Bom(serial_number=uuid.uuid5(uuid.NAMESPACE_URL, built.id))
    repository, _, tag = built.tag.partition(":")
    image = Component(
        name=repository, version=tag or built.id, type=ComponentType.CONTAINER, bom_ref=built.id,
        hashes=[HashType(alg=HashAlgorithm.SHA_256, content=built.id.removeprefix("sha256:"))],
        properties=[Property(name="skerry:base", value=built.base.name), Property(name="skerry:base:id", value=built.base.id)],
    )  # fmt: skip
    parts = [Component(name="skerry", version=__version__, type=ComponentType.APPLICATION, bom_ref=f"skerry@{__version__}")]
    for one in built.distributions:
        purl = PackageURL("pypi", name=one.name.lower().replace("_", "-"), version=one.version)
        hashes = [HashType(alg=HashAlgorithm.SHA_256, content=one.sha256)] if one.sha256 else []
        parts.append(Component(name=one.name, version=one.version, purl=purl, bom_ref=str(purl), hashes=hashes))
    for package in packages:
        qualifiers = {"arch": package.architecture} | ({"distro": f"{system}-{system_version}"} if system and system_version else {})
        purl = PackageURL("deb", namespace=system or "debian", name=package.name, version=package.version, qualifiers=qualifiers)
        parts.append(Component(name=package.name, version=package.version, purl=purl, bom_ref=str(purl)))
    bom.metadata.component = image
    bom.components.update(parts)
    bom.register_dependency(image, parts)
    return bom
