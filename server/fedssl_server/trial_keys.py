"""Keys for a trial: a certificate authority, a certificate of the server that it signed, a key pair for each node; and whether a file is a node's key.

Whoever holds ``ca.key`` can pose as the server: an operator with a real authority brings certificates of their own (server/README.md).
Private keys are P-384, in files of mode 0600, not encrypted.
"""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedssl.disk import whole_file
from fedssl.errors import ConfigError

MAKE_KEY = "ssh-keygen -t ecdsa -b 384 -N ''"
"""How a node makes its own key pair."""

DAYS = 365
"""How long the certificates of a trial are good for."""


def make_certificates(folder: Path, names: Sequence[str]) -> None:
    """``ca.key``, ``ca.crt``, ``server.key`` and ``server.crt`` in ``folder``; the server's certificate is good for ``names`` (host names, IP addresses).

    Raises DiskError where they cannot be written.
    """
    authority, server = _new_key(), _new_key()
    issuer = _named("fedssl trial authority")
    of_authority = (
        _certificate(issuer, issuer, authority.public_key())
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(authority.public_key()), critical=False)
        .sign(authority, hashes.SHA384())
    )
    of_server = (
        _certificate(_named("fedssl server"), issuer, server.public_key())
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName([_general_name(name) for name in names]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.public_key()), critical=False)
        .sign(authority, hashes.SHA384())
    )
    for name, key, certificate in (("ca", authority, of_authority), ("server", server, of_server)):
        _write_private(folder / f"{name}.key", key, serialization.PrivateFormat.PKCS8)
        with whole_file(folder / f"{name}.crt") as beside:
            beside.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))


def check_key(path: Path) -> None:
    """Raises ConfigError for a file that is no public key as Flower's nodes have them."""
    try:
        found = serialization.load_ssh_public_key(path.read_bytes())
    except (OSError, ValueError, UnsupportedAlgorithm) as error:
        raise ConfigError(f"{path}: cannot be read as a public key ({error}); wanted the .pub of `{MAKE_KEY}`") from None
    if not isinstance(found, ec.EllipticCurvePublicKey):
        raise ConfigError(f"{path}: a key of another kind than Flower takes; wanted the .pub of `{MAKE_KEY}`")


def make_node_key(folder: Path, name: str) -> None:
    """``NAME.key``, which the node alone should hold, and ``NAME.pub``, by which the server knows it. Raises DiskError where they cannot be written."""
    key = _new_key()
    # Flower's SuperNode reads OpenSSH's form alone.
    _write_private(folder / f"{name}.key", key, serialization.PrivateFormat.OpenSSH)
    with whole_file(folder / f"{name}.pub") as beside:
        beside.write_bytes(key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH))


def _new_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP384R1())


def _write_private(path: Path, key: ec.EllipticCurvePrivateKey, form: serialization.PrivateFormat) -> None:
    text = key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())
    with whole_file(path) as beside:
        os.close(os.open(beside, os.O_CREAT | os.O_WRONLY, 0o600))
        beside.write_bytes(text)


def _named(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _certificate(subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    # A day earlier: clocks of nodes may be behind.
    until = now + timedelta(days=DAYS)
    builder = x509.CertificateBuilder(subject_name=subject, issuer_name=issuer, public_key=key, serial_number=x509.random_serial_number())
    return builder.not_valid_before(now - timedelta(days=1)).not_valid_after(until)


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)
