"""A real S3-compatible server on this machine: SeaweedFS, with keys, on free ports of the loopback interface."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pyarrow import fs

from tests.processes import free_ports

KEYS = {"AWS_ACCESS_KEY_ID": "tests", "AWS_SECRET_ACCESS_KEY": "not-a-secret", "AWS_EC2_METADATA_DISABLED": "true"}
BUCKET = "bucket"
PORTS = ("s3.port", "s3.port.grpc", "master.port", "master.port.grpc", "volume.port", "volume.port.grpc")
PORTS += ("filer.port", "filer.port.grpc")


@dataclass(frozen=True)
class S3Server:
    """One bucket is there."""

    port: int

    @property
    def query(self) -> str:
        return f"?endpoint_override=127.0.0.1:{self.port}&scheme=http&region=us-east-1"

    def uri(self, path: str) -> str:
        """Of ``path``, which begins with a bucket."""
        return f"s3://{path}{self.query}"


@contextmanager
def s3_server(folder: Path) -> Iterator[S3Server]:
    """Keeps its data under ``folder``."""
    keys = {"accessKey": KEYS["AWS_ACCESS_KEY_ID"], "secretKey": KEYS["AWS_SECRET_ACCESS_KEY"]}
    (folder / "keys.json").write_text(
        json.dumps({"identities": [{"name": "tests", "credentials": [keys], "actions": ["Admin"]}]})
    )
    ports = free_ports(len(PORTS))
    command = [str(Path(sys.executable).with_name("weed")), f"-logdir={folder}", "server", f"-dir={folder}", "-s3"]
    command += ["-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-s3.config={folder}/keys.json", "-s3.port.iceberg=0"]
    command += ["-s3.port.lance=0", "-volume.max=20", "-master.volumeSizeLimitMB=64"]
    command += [f"-{name}={port}" for name, port in zip(PORTS, ports, strict=True)]
    with (folder / "server.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder)
    try:
        server = S3Server(ports[0])
        _make_bucket(server, process)
        yield server
    finally:
        process.kill()  # a polite end takes half a minute
        process.wait(60)


def _make_bucket(server: S3Server, process: subprocess.Popen) -> None:
    files = fs.S3FileSystem(
        access_key=KEYS["AWS_ACCESS_KEY_ID"],
        secret_key=KEYS["AWS_SECRET_ACCESS_KEY"],
        endpoint_override=f"127.0.0.1:{server.port}",
        scheme="http",
        region="us-east-1",
        allow_bucket_creation=True,
    )
    for _ in range(120):
        try:
            files.create_dir(BUCKET)
            with files.open_output_stream(f"{BUCKET}/ready") as stream:
                stream.write(b"yes")
            return
        except OSError as error:
            assert process.poll() is None, "the server has ended"
            last = error
            time.sleep(0.5)
    raise last
