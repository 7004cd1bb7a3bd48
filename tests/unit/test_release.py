"""A release holds what the lock file asks for, and nothing is unpacked that its manifest does not vouch for."""

import hashlib
import io
import json
import tarfile
import zipfile
from pathlib import Path

import pytest

from skerry.release import archive, prune, unpack, wheels

LOCK = """\
msgspec==0.19.0 \\
    --hash=sha256:{msgspec} \\
    --hash=sha256:{other}
    # via skerry
tool==1.0 ; sys_platform == 'win32' \\
    --hash=sha256:{other}
"""


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """Wheels (of a kind) and a lock file."""
    (tmp_path / "wheels").mkdir()
    (tmp_path / "wheels/skerry-1.2.3-py3-none-any.whl").write_bytes(b"ours")
    (tmp_path / "wheels/msgspec-0.19.0-cp311-cp311-manylinux_2_17_x86_64.whl").write_bytes(b"theirs")
    (tmp_path / "lock.txt").write_text(LOCK.format(msgspec=digest(b"theirs"), other=digest(b"of another machine")))
    return tmp_path


def build(site: Path) -> Path:
    out = site / "skerry-1.2.3.tar"
    archive.build(site / "wheels", site / "lock.txt", out, python="3.11", machine="x86_64")
    return out


def extracted(path: Path, folder: Path) -> dict[str, bytes]:
    with tarfile.open(path, "r:") as tar:
        unpack.extract(tar, unpack.read_manifest(tar), folder)
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_what_goes_in_comes_out_and_the_same_wheels_give_the_same_bytes(site):
    first = build(site).read_bytes()
    assert build(site).read_bytes() == first
    found = extracted(site / "skerry-1.2.3.tar", site / "out")
    assert found["wheels/skerry-1.2.3-py3-none-any.whl"] == b"ours"
    assert found["wheels/msgspec-0.19.0-cp311-cp311-manylinux_2_17_x86_64.whl"] == b"theirs"
    assert found["unpack.py"] == Path(unpack.__file__).read_bytes()
    assert "win32" not in found["requirements.txt"].decode(), "the boxes need no marker to be judged"
    assert f"--hash=sha256:{digest(b'theirs')}" in found["requirements.txt"].decode()


def test_a_wheel_that_is_missing_or_another_is_found_where_the_release_is_made(site):
    (site / "wheels/msgspec-0.19.0-cp311-cp311-manylinux_2_17_x86_64.whl").write_bytes(b"tampered with")
    with pytest.raises(archive.NotBuilt, match=r"no wheel of msgspec==0\.19\.0"):
        build(site)


def wheel_file(folder: Path, name: str, version: str, tag: str) -> str:
    """Makes one that pip takes; its digest."""
    path = folder / f"{name}-{version}-{tag}.whl"
    with zipfile.ZipFile(path, "w") as archived:
        archived.writestr(f"{name}-{version}.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        archived.writestr(f"{name}-{version}.dist-info/WHEEL", f"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: {tag}\n")
        archived.writestr(f"{name}-{version}.dist-info/RECORD", "")
    return digest(path.read_bytes())


@pytest.mark.parametrize(
    ("python", "machine", "fetched"),
    [
        ("3.11", "x86_64", {"both-1.0-py3-none-any.whl", "part-1.0-cp311-cp311-manylinux_2_28_x86_64.whl"}),
        ("3.13", "x86_64", {"both-1.0-py3-none-any.whl", "part-2.0-cp313-cp313-manylinux_2_28_x86_64.whl"}),
        ("3.13", "aarch64", {"both-1.0-py3-none-any.whl", "part-2.0-cp313-cp313-manylinux_2_28_aarch64.whl"}),
    ],
)
def test_wheels_are_fetched_for_the_boxes_python_and_processor_and_not_for_ours(tmp_path, monkeypatch, python, machine, fetched):
    index = tmp_path / "index"
    index.mkdir()
    both = wheel_file(index, "both", "1.0", "py3-none-any")
    parts = {
        version: [wheel_file(index, "part", version, f"{tag}-{tag}-manylinux_2_28_{one}") for one in ("x86_64", "aarch64")]
        for version, tag in (("1.0", "cp311"), ("2.0", "cp313"))
    }
    lock = tmp_path / "lock.txt"
    lines = [f"both==1.0 --hash=sha256:{both}"]
    for version, marker in (("1.0", "python_full_version < '3.12'"), ("2.0", "python_full_version >= '3.12'")):
        lines.append(f"part=={version} ; {marker} " + " ".join(f"--hash=sha256:{one}" for one in parts[version]))
    lock.write_text("\n".join(lines) + "\n")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    wheels.fetch(lock, tmp_path / "wheels", python=python, machine=machine)
    assert {path.name for path in (tmp_path / "wheels").iterdir()} == fetched


def test_a_wheel_that_nobody_has_is_not_fetched(tmp_path, monkeypatch):
    (tmp_path / "lock.txt").write_text(f"both==1.0 --hash=sha256:{digest(b'')}\n")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(wheels.NotFetched, match=r"lock\.txt: pip could not fetch all of it for Python 3\.13 on x86_64"):
        wheels.fetch(tmp_path / "lock.txt", tmp_path / "wheels", python="3.13", machine="x86_64")


@pytest.mark.parametrize("own", [[], ["skerry-1.2.3-py3-none-any.whl", "skerry-1.2.4-py3-none-any.whl"]])
def test_there_is_one_wheel_of_skerry_itself(site, own):
    for path in (site / "wheels").glob("skerry-*"):
        path.unlink()
    for name in own:
        (site / "wheels" / name).write_bytes(b"ours")
    with pytest.raises(archive.NotBuilt, match="wheels of Skerry itself, not one"):
        build(site)


def remade(path: Path, change) -> Path:
    """The release with its members changed: a list of (TarInfo, bytes)."""
    with tarfile.open(path, "r:") as tar:
        members = [(member, file.read() if (file := tar.extractfile(member)) else b"") for member in tar]
    changed = change(members)
    with tarfile.open(path, "w") as tar:
        for member, content in changed:
            if member.isreg():
                member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def another(name: str, content: bytes = b"x", kind: bytes = tarfile.REGTYPE, link: str = "") -> tuple[tarfile.TarInfo, bytes]:
    member = tarfile.TarInfo(name)
    member.type, member.linkname, member.size = kind, link, len(content) if kind == tarfile.REGTYPE else 0
    return member, content if kind == tarfile.REGTYPE else b""


def with_manifest(members, **changes):
    manifest = json.loads(members[0][1]) | changes
    return [(members[0][0], json.dumps(manifest).encode()), *members[1:]]


GOOD = {"size": 1, "sha256": "0" * 64}
HOSTILE = {
    "a byte that is another": lambda m: [*m[:-1], (m[-1][0], bytes(len(m[-1][1])))],
    "a file that is shorter": lambda m: [*m[:-1], (m[-1][0], m[-1][1][:-1])],
    "a file that is missing": lambda m: m[:-1],
    "a file that nobody vouches for": lambda m: [*m, another("wheels/evil-1.0-py3-none-any.whl")],
    "a file twice": lambda m: [*m, m[-1]],
    "a link": lambda m: [*m, another("wheels/link.whl", kind=tarfile.SYMTYPE, link="/etc/passwd")],
    "a device": lambda m: [*m, another("wheels/null", kind=tarfile.CHRTYPE)],
    "a way out": lambda m: [*m, another("../../etc/cron.d/evil")],
    "an absolute path": lambda m: [*m, another("/etc/cron.d/evil")],
    "no manifest": lambda m: m[1:],
    "a manifest that is no JSON": lambda m: [(m[0][0], b"{"), *m[1:]],
    "a manifest of another kind": lambda m: [(m[0][0], b"[]"), *m[1:]],
    "another format": lambda m: with_manifest(m, format=2),
    "a version that is a way out": lambda m: with_manifest(m, version="../../etc"),
    "a version that is a number": lambda m: with_manifest(m, version=1),
    "no lock file": lambda m: with_manifest(m, files={}),
    "files that are a list": lambda m: with_manifest(m, files=["requirements.txt"]),
    "a name with a way out in the manifest": lambda m: with_manifest(m, files={"requirements.txt": GOOD, "wheels/../x": GOOD}),
    "a size below nothing": lambda m: with_manifest(m, files={"requirements.txt": {"size": -1, "sha256": "0" * 64}}),
    "a size that fills the disk": lambda m: with_manifest(m, files={"requirements.txt": {"size": 2**50, "sha256": "0" * 64}}),
    "a digest that is none": lambda m: with_manifest(m, files={"requirements.txt": {"size": 1, "sha256": "x"}}),
}  # fmt: skip


@pytest.mark.parametrize("what", HOSTILE)
def test_a_release_that_is_not_what_its_manifest_says_is_refused(site, what):
    path = remade(build(site), HOSTILE[what])
    with pytest.raises(unpack.NotUnpacked):
        extracted(path, site / "out")
    found = {str(file.relative_to(site)) for file in site.rglob("*") if file.is_file() or file.is_symlink()}
    assert {name.partition("/")[0] for name in found} <= {"wheels", "lock.txt", "skerry-1.2.3.tar", "out"}
    assert not any((site / "out").rglob("*.whl")) or what not in ("no manifest", "another format")


@pytest.mark.parametrize("content", [b"", b"not a tar", bytes(10240)])
def test_what_is_no_archive_is_refused(site, content):
    (site / "x.tar").write_bytes(content)
    with pytest.raises(unpack.NotUnpacked):
        unpack.unpack(site / "x.tar", site / "opt", python="/bin/false", say=lambda line: None)
    assert not (site / "opt").exists()


def test_a_release_for_another_python_or_machine_is_refused_before_anything_is_made(site):
    import sys

    out = site / "skerry-1.2.3.tar"
    archive.build(site / "wheels", site / "lock.txt", out, python="3.99", machine="x86_64")
    with pytest.raises(unpack.NotUnpacked, match=r"is for Python 3\.99 on x86_64"):
        unpack.unpack(out, site / "opt", python=sys.executable, say=lambda line: None)
    assert not (site / "opt").exists()


# -- releases that nothing needs


@pytest.fixture
def machine(tmp_path: Path) -> tuple[Path, Path]:
    """Where releases lie, and processes."""
    root, processes = tmp_path / "skerry", tmp_path / "proc"
    for version in ("1.0", "1.1", "1.2", "1.3", "1.4"):
        (root / version / "lib").mkdir(parents=True)
        (root / version / unpack.COMPLETE).touch()
    (root / "notes").mkdir()
    (root / "current").symlink_to("1.4")
    (root / "previous").symlink_to("1.3")
    for pid in ("1", "77", "self", "sys"):
        (processes / pid).mkdir(parents=True)
    (processes / "1/cmdline").write_bytes(b"/sbin/init\0")
    return root, processes


def test_what_is_present_before_or_run_from_stays_and_the_rest_goes(machine):
    root, processes = machine
    (processes / "1/cmdline").write_bytes(f"{root}/1.1/bin/python\0{root}/current/bin/skerry-warden\0".encode())
    (processes / "77/mountinfo").write_text(
        "31 28 0:4 /opt/skerry/1.0/lib/python3.11/site-packages /usr/lib/skerry ro - ext4 /dev/sda1 rw\n"
    )
    assert [path.name for path in prune.unneeded(root, processes=processes)] == ["1.2"]
    assert [path.name for path in prune.prune(root, processes=processes)] == ["1.2"]
    assert sorted(path.name for path in root.iterdir()) == ["1.0", "1.1", "1.3", "1.4", "current", "notes", "previous"]


def test_a_version_is_not_taken_for_one_that_begins_like_it(machine):
    root, processes = machine
    (processes / "77/cmdline").write_bytes(f"{root}/1.22/bin/python".encode())
    assert "1.2" in [path.name for path in prune.unneeded(root, processes=processes)]


def test_one_that_is_being_unpacked_is_left_for_a_day(machine):
    root, processes = machine
    (root / "1.2" / unpack.COMPLETE).unlink()
    now_s = (root / "1.2").stat().st_mtime
    assert "1.2" not in [path.name for path in prune.unneeded(root, processes=processes, now_s=now_s + 3600)]
    assert "1.2" in [path.name for path in prune.unneeded(root, processes=processes, now_s=now_s + 25 * 3600)]


def test_without_a_present_one_nothing_goes(machine):
    root, processes = machine
    (root / "current").unlink()
    assert prune.unneeded(root, processes=processes) == []
