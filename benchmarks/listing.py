"""A million pictures in a bucket: seconds and memory until they are listed with their classes.

A stand-in for S3 answers requests for lists in pages of 1,000 names, each after a tenth of a second. The other
side is pyarrow's recursive listing alone, which most readers of buckets use, without any look at the names.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from benchmarks.harness import Comparison, summarize

OBJECTS, PAGE, SECONDS_A_PAGE = 1_000_000, 1000, 0.1
PAIRS = 2

_OURS = """
from cvdist import storage
from cvdist.config import PicturesConfig
from cvdist.data import forms
storage.locate("s3://bucket/pictures")
def work():
    return len(forms.look(PicturesConfig(uri="s3://bucket/pictures")).table)
"""
_OTHER = """
from pyarrow import fs
def work():
    selector = fs.FileSelector("bucket/pictures", recursive=True)
    return sum(one.is_file for one in filesystem.get_file_info(selector))
filesystem = fs.S3FileSystem(endpoint_override=os.environ["AWS_ENDPOINT_URL"], region="us-east-1")
"""
_MEASURE = """
import json, resource, time
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
began = time.monotonic()
found = work()
seconds = time.monotonic() - began
print(json.dumps([found, seconds, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024]))
"""


def measure() -> Iterator[Comparison]:
    """Measure seconds, and MiB above those of the imported program."""
    for classes in (1000, 2):
        measured = [(_run(_OURS, classes), _run(_OTHER, classes)) for _ in range(PAIRS)]
        # In few folders, there is little to list side by side.
        targets = (0.5, 0.7) if classes > 2 else (0.9, 1.3)
        for number, (name, unit) in enumerate((("seconds", "s"), ("memory", "MiB"))):
            yield summarize(
                f"{name}, {OBJECTS:,} objects in {classes:,} classes",
                [(ours[number], other[number]) for ours, other in measured],
                unit=unit,
                target=targets[number],
                at_most=True,
            )


def _run(work: str, classes: int) -> tuple[float, float]:
    """Return the seconds and MiB of a listing in a separate process, from a server in another one."""
    server = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.listing", str(classes), str(OBJECTS)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).resolve().parent.parent,
    )
    try:
        assert server.stdout is not None
        keys = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_REGION": "us-east-1"}
        place = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.stdout.readline().strip()}"}
        command = [sys.executable, "-c", f"import os\n{work}{_MEASURE}"]
        done = subprocess.run(
            command, env=os.environ | keys | place, stdout=subprocess.PIPE, timeout=900, check=True
        )
    finally:
        server.kill()
        server.wait()
    found, seconds, memory = json.loads(done.stdout)
    assert found == OBJECTS, found
    return seconds, memory


class _Bucket(BaseHTTPRequestHandler):
    """Answers ListObjectsV2 for `pictures/CLASS/NUMBER.jpg`, which it makes up from their numbers."""

    protocol_version = "HTTP/1.1"
    classes, objects = 0, 0

    def do_GET(self) -> None:
        asked = {name: values[0] for name, values in parse_qs(urlsplit(self.path).query).items()}
        start = int(asked.get("continuation-token", 0))
        prefix, by_folder = asked.get("prefix", ""), "delimiter" in asked
        each = self.objects // self.classes
        if prefix == "pictures/" and by_folder:
            total = self.classes
            names = (f"{prefix}class-{number:04}/" for number in range(start, min(start + PAGE, total)))
            rows = [f"<CommonPrefixes><Prefix>{name}</Prefix></CommonPrefixes>" for name in names]
        else:
            first = 0 if prefix == "pictures/" else int(prefix.split("-")[1].strip("/")) * each
            total = self.objects if prefix == "pictures/" else each
            rows = [_object(first + number, each) for number in range(start, min(start + PAGE, total))]
        more = start + PAGE < total
        token = f"<NextContinuationToken>{start + PAGE}</NextContinuationToken>" if more else ""
        body = (
            '<?xml version="1.0" encoding="UTF-8"?><ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
            f"<Name>bucket</Name><Prefix>{prefix}</Prefix><KeyCount>{len(rows)}</KeyCount><MaxKeys>{PAGE}</MaxKeys>"
            f"<IsTruncated>{str(more).lower()}</IsTruncated>{token}{''.join(rows)}</ListBucketResult>"
        ).encode()
        time.sleep(SECONDS_A_PAGE)
        self.send_response(200)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing of requests."""


def _object(number: int, each: int) -> str:
    return (
        f"<Contents><Key>pictures/class-{number // each:04}/{number:07}.jpg</Key>"
        "<LastModified>2026-01-01T00:00:00.000Z</LastModified>"
        f"<ETag>&quot;{number:032x}&quot;</ETag><Size>{20_000 + number % 1000}</Size>"
        "<StorageClass>STANDARD</StorageClass></Contents>"
    )


def _serve() -> None:
    _Bucket.classes, _Bucket.objects = map(int, sys.argv[1:])
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Bucket)
    print(server.server_address[1], flush=True)
    server.serve_forever()


if __name__ == "__main__":
    _serve()
