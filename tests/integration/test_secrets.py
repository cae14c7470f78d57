"""No secret is kept or shown."""

from __future__ import annotations

from tests.helpers.jobs import call


def test_no_secret_is_kept_or_shown(tmp_path):
    """Of environment and URIs, in whatever a job writes and prints; nobody listens at the server named."""
    secret = "hunter2hunter2"
    environment = {
        "AWS_SECRET_ACCESS_KEY": secret,
        "AWS_ACCESS_KEY_ID": secret,
        "MLFLOW_TRACKING_PASSWORD": secret,
        "RAY_AUTH_TOKEN": secret,
        "CVDIST_CACHE": str(tmp_path / "cache"),
    }
    words = ["digits-cnn", "--runtime", "inline", "--epochs", "1", "--batch-size", "500", "--no-system-metrics"]
    done = call("train", *words, storage=tmp_path / "runs", **environment)
    assert done.returncode == 0, done.stderr
    uri = f"http://me:{secret}@127.0.0.1:9"
    failed = [
        call("train", *words, "--debug", "--tracking-uri", uri, storage=tmp_path / "runs", **environment),
        call("train", *words, "--tracking", "none", "--resume",
             f"s3://me:{secret}@bucket/x?endpoint_override=127.0.0.1:9",
             storage=tmp_path / "runs", AWS_MAX_ATTEMPTS="1", **environment),
        call("replay", f"s3://me:{secret}@bucket/x", storage=tmp_path),
    ]  # fmt: skip
    for attempt in failed:
        assert attempt.returncode == 2, attempt.stderr
    for output in (done, *failed):
        assert secret not in output.stdout + output.stderr
    for file in tmp_path.rglob("*"):
        assert not file.is_file() or secret.encode() not in file.read_bytes(), file
