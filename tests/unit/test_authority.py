"""The fleet's own certificate authority: what it makes, what it keeps from others, and what it does without its root's key."""

import stat

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.verification import PolicyBuilder, Store

from coordinator.ca.authority import DAY_MS, ISSUING_DAYS, Authority, AuthorityUnusable, BadRequest, requested_key
from skerry.runtime.keys import signing_request
from skerry.wire.identity import NotOurs, Subject, subject_of

NOW_MS = 1_800_000_000_000
BOX = Subject("fleet", "box", "box-1", "shop 7/ü")


@pytest.fixture
def authority(tmp_path):
    return Authority(tmp_path / "ca", "fleet", now_ms=NOW_MS)


def leaf(chain: str) -> x509.Certificate:
    return x509.load_pem_x509_certificates(chain.encode())[0]


def test_a_certificate_names_its_holder_and_its_chain_leads_to_the_root(authority):
    key = ec.generate_private_key(ec.SECP256R1())
    issued = authority.issue(key.public_key(), BOX, now_ms=NOW_MS, life_ms=DAY_MS, hosts=["10.0.0.7", "box.example"])
    certificate, *others = x509.load_pem_x509_certificates(issued.chain.encode())
    assert subject_of(certificate) == BOX
    assert f"{certificate.serial_number:x}" == issued.serial
    root = x509.load_pem_x509_certificate(authority.root_pem.encode())
    verifier = PolicyBuilder().store(Store([root])).time(certificate.not_valid_before_utc)
    for name in ("box-1.box.fleet.skerry", "box.example"):
        assert verifier.build_server_verifier(x509.DNSName(name)).verify(certificate, others)[-1] == root
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert [str(address) for address in names.get_values_for_type(x509.IPAddress)] == ["10.0.0.7"]
    assert certificate.subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)[0].value == "box-1"


def test_no_box_can_bear_the_name_under_which_the_broker_knows_the_coordinator(authority):
    key = ec.generate_private_key(ec.SECP256R1()).public_key()
    names = {
        role: leaf(
            authority.issue(key, Subject("fleet", role, "coordinator"), now_ms=NOW_MS, life_ms=DAY_MS).chain
        ).subject.rfc4514_string()
        for role in ("box", "coordinator")
    }
    assert names == {"box": "CN=coordinator,O=fleet", "coordinator": "CN=_coordinator,O=fleet"}


def test_private_keys_are_for_their_owner_alone_and_one_that_is_not_is_refused(authority, tmp_path):
    del authority
    keys = list((tmp_path / "ca").glob("*.key"))
    assert {path.name for path in keys} == {"root.key", "issuing.key"}
    assert {stat.S_IMODE(path.stat().st_mode) for path in keys} == {0o600}
    (tmp_path / "ca" / "issuing.key").chmod(0o640)
    with pytest.raises(AuthorityUnusable, match=r"issuing\.key: others may read this key"):
        Authority(tmp_path / "ca", "fleet", now_ms=NOW_MS)


def test_it_works_on_without_the_roots_key_and_makes_a_new_issuing_certificate_with_it(authority, tmp_path):
    folder = tmp_path / "ca"
    away = tmp_path / "safe.key"
    (folder / "root.key").rename(away)
    late_ms = NOW_MS + (ISSUING_DAYS - 30) * DAY_MS
    without = Authority(folder, "fleet", now_ms=late_ms)
    assert without.fingerprint == authority.fingerprint
    assert without.issuing_ends_in_ms == pytest.approx(30 * DAY_MS, abs=2000)
    key = ec.generate_private_key(ec.SECP256R1()).public_key()
    issued = without.issue(key, BOX, now_ms=late_ms, life_ms=365 * DAY_MS)
    assert issued.not_after_ms - late_ms <= 30 * DAY_MS, "no certificate outlasts the one that it was issued with"
    away.rename(folder / "root.key")
    again = Authority(folder, "fleet", now_ms=late_ms)
    assert again.issuing_ends_in_ms == pytest.approx(ISSUING_DAYS * DAY_MS, abs=2000)
    assert again.judge(issued.chain)[0] == BOX, "what the old certificate issued is known to the new one"


@pytest.mark.parametrize("lost", ["root.crt", "issuing.crt", "issuing.key"])
def test_a_file_that_is_lost_is_said_and_never_replaced_by_another_root(authority, tmp_path, lost):
    folder = tmp_path / "ca"
    (folder / lost).unlink()
    if lost == "root.crt":
        with pytest.raises(AuthorityUnusable, match=r"root.key is there and root.crt is not"):
            Authority(folder, "fleet", now_ms=NOW_MS)
        return
    (folder / "root.key").unlink()
    with pytest.raises(AuthorityUnusable, match=lost.replace(".", r"\.")):
        Authority(folder, "fleet", now_ms=NOW_MS)
    del authority


@pytest.mark.parametrize("role", ["coordinator", "broker"])
def test_a_programs_own_certificate_is_made_anew_for_other_hosts_and_towards_its_end(authority, tmp_path, role):
    def made(now_ms: int, *hosts: str) -> int:
        authority.own(Subject("fleet", role, role), now_ms=now_ms, life_ms=90 * DAY_MS, hosts=hosts)
        return x509.load_pem_x509_certificate((tmp_path / "ca" / f"{role}.crt").read_bytes()).serial_number

    first = made(NOW_MS, "a.example")
    assert made(NOW_MS + 50 * DAY_MS, "a.example") == first
    assert made(NOW_MS, "a.example", "b.example") != first
    assert made(NOW_MS + 70 * DAY_MS, "a.example", "b.example") != made(NOW_MS, "a.example")


def test_the_list_names_what_was_revoked_and_outlasts_a_holiday(authority):
    listed = x509.load_pem_x509_crl(authority.revoked_list([("ab12", NOW_MS - DAY_MS), ("1", NOW_MS)], now_ms=NOW_MS))
    assert {entry.serial_number for entry in listed} == {0xAB12, 1}
    assert listed.next_update_utc.timestamp() * 1000 >= NOW_MS + 14 * DAY_MS
    issuing = x509.load_pem_x509_certificates(authority.trusted_pem.encode())[1]
    assert listed.is_signature_valid(issuing.public_key())


def test_a_certificate_of_another_fleet_or_another_authority_is_judged_to_be_none(authority, tmp_path):
    key = ec.generate_private_key(ec.SECP256R1()).public_key()
    foreign = Authority(tmp_path / "other", "fleet", now_ms=NOW_MS).issue(key, BOX, now_ms=NOW_MS, life_ms=DAY_MS)
    with pytest.raises(BadRequest, match="not issued by this fleet"):
        authority.judge(foreign.chain)
    other = authority.issue(key, Subject("another", "box", "b"), now_ms=NOW_MS, life_ms=DAY_MS)
    with pytest.raises(BadRequest, match="of fleet 'another'"):
        authority.judge(other.chain)
    for text in ("", "x", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"):
        with pytest.raises(BadRequest):
            authority.judge(text)
    with pytest.raises(NotOurs):
        subject_of(x509.load_pem_x509_certificate(authority.root_pem.encode()))


def test_only_a_request_with_a_key_of_the_usual_kind_that_signed_it_is_taken():
    key = ec.generate_private_key(ec.SECP256R1())
    good = signing_request(key, "box-1")
    assert requested_key(good) == key.public_key()
    changed = bytearray(x509.load_pem_x509_csr(good.encode()).public_bytes(Encoding.DER))
    changed[changed.index(b"box-1")] ^= 1
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "box-1")])
    others = [
        x509.CertificateSigningRequestBuilder()
        .subject_name(name)
        .sign(other, None if isinstance(other, ed25519.Ed25519PrivateKey) else SHA256())
        for other in (ed25519.Ed25519PrivateKey.generate(), rsa.generate_private_key(65537, 2048), ec.generate_private_key(ec.SECP384R1()))
    ]
    texts = [x509.load_der_x509_csr(bytes(changed)), *others]
    for text in texts:
        with pytest.raises(BadRequest, match="csr:"):
            requested_key(text.public_bytes(Encoding.PEM).decode())


def test_another_start_finds_the_same_authority_in_a_folder_of_its_own(tmp_path):
    first = Authority(tmp_path / "ca", "fleet", now_ms=NOW_MS)
    assert Authority(tmp_path / "ca", "fleet", now_ms=NOW_MS).fingerprint == first.fingerprint
    assert stat.S_IMODE((tmp_path / "ca").stat().st_mode) == 0o700
