"""A certificate of one's own, for a server on this computer."""

from __future__ import annotations

import atexit
import ipaddress
import ssl
import tempfile
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

_NAME = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "dstack tests")])


@dataclass(frozen=True)
class Trust:
    """A server's side, and what its clients have to trust.

    Attributes:
        server: for the server.
        bundle: file with the certificate of the authority.
    """

    server: ssl.SSLContext
    bundle: str


@cache
def trust() -> Trust:
    """One authority and one certificate for 127.0.0.1, for the whole process."""
    folder = tempfile.TemporaryDirectory(prefix="azure-tls-")
    # Kept for as long as the process lives, and removed with it.
    atexit.register(folder.cleanup)
    authority = ec.generate_private_key(ec.SECP256R1())
    root = _certificate(authority.public_key(), authority, _NAME, ca=True)
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.1")])
    leaf = _certificate(key.public_key(), authority, subject, ca=False)
    bundle, both = Path(folder.name) / "ca.pem", Path(folder.name) / "server.pem"
    bundle.write_bytes(root.public_bytes(serialization.Encoding.PEM))
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    both.write_bytes(private + leaf.public_bytes(serialization.Encoding.PEM))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(both)
    return Trust(context, str(bundle))


def _certificate(
    public: ec.EllipticCurvePublicKey, signer: ec.EllipticCurvePrivateKey, subject: x509.Name, *, ca: bool
) -> x509.Certificate:
    now = datetime.now(UTC)
    usage = x509.KeyUsage(
        digital_signature=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=ca,
        crl_sign=ca,
        encipher_only=False,
        decipher_only=False,
    )
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(_NAME)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=7))
        .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False)
    )
    if not ca:
        host = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
        builder = builder.add_extension(x509.SubjectAlternativeName([host]), critical=False)
    return builder.sign(signer, hashes.SHA256())
