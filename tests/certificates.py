"""Certificates for tests: an authority, a server for localhost, and clients, in the files that libnbd and qemu want."""

from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

DAY = timedelta(days=1)


class Authority:
    """Issues certificates, and has its own in `path`."""

    def __init__(self, path: Path, name: str = "tests") -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = _name(name)
        usage = x509.KeyUsage(True, False, False, False, False, True, True, False, False)
        certificate = (
            _begin(self._name, self._name, self._key.public_key(), days=30)
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .add_extension(usage, critical=True)
            .sign(self._key, hashes.SHA256())
        )
        path.write_bytes(certificate.public_bytes(Encoding.PEM))

    def issue(
        self, certificate: Path, key: Path, name: str, *, begins: int = -60, days: int = 30, password: bytes = b""
    ) -> None:
        """A certificate for a server on loopback, or a client called `name`, from one day until another, of now."""
        private = ec.generate_private_key(ec.SECP256R1())
        names = [x509.DNSName(name), x509.IPAddress(ip_address("127.0.0.1"))]
        purposes = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
        usage = x509.KeyUsage(True, False, True, False, False, False, False, False, False)
        issued = (
            _begin(_name(name), self._name, private.public_key(), days=days, begins=begins)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .add_extension(x509.ExtendedKeyUsage(purposes), critical=False)
            .add_extension(usage, critical=True)
            .sign(self._key, hashes.SHA256())
        )
        certificate.write_bytes(issued.public_bytes(Encoding.PEM))
        lock = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
        key.write_bytes(private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, lock))


class Certificates:
    """A directory as clients want it, and as a server does: all certificates that most tests need."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        self.authority = Authority(self.ca)
        self.authority.issue(self.server, self.server_key, "localhost")
        self.authority.issue(directory / "client-cert.pem", directory / "client-key.pem", "alice.example.org")

    @property
    def ca(self) -> Path:
        return self.directory / "ca-cert.pem"

    @property
    def server(self) -> Path:
        return self.directory / "server-cert.pem"

    @property
    def server_key(self) -> Path:
        return self.directory / "server-key.pem"

    def without_client(self) -> Path:
        """A directory for clients that have only the authority's certificate."""
        path = self.directory / "anonymous"
        path.mkdir(exist_ok=True)
        (path / "ca-cert.pem").write_bytes(self.ca.read_bytes())
        return path

    def options(self, *, client_ca: bool = False) -> list[str]:
        """What `nbdram serve` is told."""
        told = ["--tls-cert", str(self.server), "--tls-key", str(self.server_key)]
        return told + (["--tls-client-ca", str(self.ca)] if client_ca else [])


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _begin(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, *, days: int, begins: int = -60
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return x509.CertificateBuilder(
        issuer,
        subject,
        key,
        x509.random_serial_number(),
        not_valid_before=now + begins * DAY,
        not_valid_after=now + days * DAY,
    )
