"""Tests data in object stores: reading, listing, writing, and what is said of errors."""

import errno
import io
import re
import time
from contextlib import suppress
from datetime import timedelta

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from disco_jax.config import default
from disco_jax.data import table_source
from disco_jax.data.patterns import expand
from disco_jax.data.source import BadSample
from disco_jax.data.sources import open_source
from disco_jax.data.table_source import TableSource
from disco_jax.errors import DataLost, UserError
from disco_jax.storage import access, stores
from disco_jax.storage.files import RemoteFile, download
from disco_jax.storage.stores import Patience
from disco_jax.storage.urls import Url, beside, place
from tests.object_stores import forget
from tests.tars import picture

CONTENT = bytes(range(256)) * 40
DENIED = "<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"
EXPIRED = "<Error><Code>ExpiredToken</Code><Message>The token has expired.</Message></Error>"


@pytest.fixture
def impatient(monkeypatch):
    """Makes retries short."""
    monkeypatch.setattr(stores, "PATIENCE", Patience(0.3, 0.6, 0.2, 0.05, 0.1))
    monkeypatch.setattr(access, "RETRIES", {"max_retries": 0})
    forget()


def test_urls_have_the_parts_of_paths():
    url = Url("s3://b/dir/0.tar")
    assert (url.name, url.suffix, url.parent) == ("0.tar", ".tar", "s3://b/dir")
    assert url.parent.parent == Url("s3://b/top").parent == "s3://b"
    assert url.parent / "x.idx" == "s3://b/dir/x.idx"
    assert Url("s3://b") / "x" == "s3://b/x"
    assert Url("https://h/a.jpg?w=5").suffix == ".jpg"
    assert beside(Url("s3://b/d/t.csv"), "../i/1.jpg") == "s3://b/i/1.jpg"
    assert beside(place("/d/t.csv"), "gs://b/1.jpg") == "gs://b/1.jpg"
    assert str(beside(place("/d/t.csv"), "i/1.jpg")) == "/d/i/1.jpg"


@pytest.mark.parametrize("store", ["s3", "gcs"])
def test_ranges_and_versions_are_those_of_the_object(store, request):
    bucket = request.getfixturevalue(store)
    url = bucket.put("dir/a b#c%d.bin", CONTENT)
    meta = stores.head(url)
    assert meta.size == len(CONTENT)
    assert stores.fetch(url) == (CONTENT, meta)
    rng = np.random.default_rng(0)
    for start, stop in np.sort(rng.integers(0, len(CONTENT) + 1, (20, 2))).tolist():
        assert stores.read(url, start, stop, meta.stamp) == CONTENT[start:stop]
    assert stores.fetch(url, 10_000, 99_999)[0] == CONTENT[10_000:]
    assert [(each, each.listed) for each in stores.listing(Url(f"{bucket.url}/dir"))] == [
        (url, meta)
    ]
    bucket.put("dir/a b#c%d.bin", CONTENT[::-1])
    with pytest.raises(OSError, match="it has changed") as changed:
        stores.read(url, 5, 9, meta.stamp)
    assert changed.value.errno == errno.ESTALE
    assert stores.read(url, 5, 9) == CONTENT[::-1][5:9]
    bucket.put("dir/a b#c%d.bin", b"short")
    for start in (3, 300):
        with pytest.raises(OSError, match="it has changed"):
            stores.read(url, start, start + 100)


def test_patterns_of_urls_name_what_those_of_paths_do(s3, tmp_path):
    names = ["0.tar", "1.tar", "10.tar", "[x]/0.tar", "a/0.tar", "a/b/0.tar", "a-b/0.tar", "z.txt"]
    for name in names:
        s3.put(f"top/{name}", b"x")
        (tmp_path / "top" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "top" / name).touch()
    s3.put("topmost/0.tar", b"x")
    for pattern in ("*.tar", "?.tar", "{1,0}.tar", "*/*.tar", "**/*.tar", "[[]x]/*.tar"):
        local = [str(path) for path in expand(f"{tmp_path}/top/{pattern}")]
        assert local
        found = expand(f"{s3.url}/top/{pattern}")
        assert [url.replace(s3.url, str(tmp_path)) for url in found] == local
    assert expand(f"{s3.url}/nowhere/{{0..2}}.tar") == [
        f"{s3.url}/nowhere/{i}.tar" for i in (0, 1, 2)
    ]
    with pytest.raises(UserError, match="no object matches"):
        expand(f"{s3.url}/top/*.zip")
    with pytest.raises(UserError, match="web servers have no listings; use braces"):
        expand("https://h/*.tar")


@pytest.mark.parametrize(
    "name",
    ["hdfs://h/x.tar", "hf://d/t.parquet", "ftp://x/a.tar", "pipe:cat x.tar", "S3://b/x.tar"],
)
def test_other_urls_are_refused_in_a_line(name):
    with pytest.raises(
        UserError, match=r"^data.name: .* is a URL .*; s3://, gs://, az://, https://"
    ):
        open_source(default().data, name, "")


FAULTS = [
    "reset",
    "short",
    "lie",
    (503, "<Error><Code>SlowDown</Code></Error>"),
    (429, ""),
    (500, ""),
]


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_what_may_pass_is_tried_again(fault, s3, proxy, monkeypatch):
    url = s3.put("d/x.bin", CONTENT)
    monkeypatch.setattr(stores, "PATIENCE", Patience(pause=0.05))
    monkeypatch.setattr(access, "RETRIES", {"max_retries": 1})
    forget()
    for attempts in (1, 3):
        proxy.faults = [fault] * attempts
        assert stores.read(url, 100, 9000) == CONTENT[100:9000]
        assert proxy.faults == []
        proxy.faults = [fault] * attempts
        assert stores.listing(Url(f"{s3.url}/d")) == [url]
        assert proxy.faults == []
        if fault not in ("short", "lie"):
            proxy.faults = [fault] * attempts
            stores.write(f"{s3.url}/y.bin", CONTENT)
            assert s3.get("y.bin") == CONTENT


def test_a_server_that_stops_answering_is_asked_again(s3, proxy, impatient, monkeypatch):
    url = s3.put("x.bin", CONTENT)
    timeouts = access.TIMEOUTS | {"read_timeout": timedelta(seconds=0.2)}
    monkeypatch.setattr(access, "TIMEOUTS", timeouts)
    proxy.faults = ["hang"]
    assert stores.read(url, 0, 10) == CONTENT[:10]
    proxy.faults = ["hang"] * 9
    with pytest.raises(DataLost, match="the server did not answer in time"):
        stores.read(url, 0, 10)


def test_a_long_answer_that_breaks_off_is_continued(s3, proxy):
    url = s3.put("x.bin", CONTENT)
    proxy.faults = ["short"]
    assert stores.read(url, 0, len(CONTENT)) == CONTENT
    ranges = [each for *_, each in proxy.requests]
    assert ranges[0] == f"bytes=0-{len(CONTENT) - 1}"
    assert ranges[1] == f"bytes={len(CONTENT) // 2}-{len(CONTENT) - 1}"


@pytest.mark.parametrize(
    ("fault", "why"),
    [
        ("reset", "the connection was reset"),
        ("lie", "the answer was cut short"),
        ((503, "<Code>SlowDown</Code>"), r"503 Service Unavailable \(SlowDown\)"),
    ],
    ids=str,
)
def test_retries_end_in_a_line_that_names_the_url(fault, why, s3, proxy, impatient, capsys):
    url = s3.put("x.bin", CONTENT)
    assert stores.head(url).size == len(CONTENT)
    proxy.faults = [fault] * 1000
    start = time.monotonic()
    with pytest.raises(DataLost, match=f"^{url} can't be read: {why}; tried for \\d+ s$"):
        stores.read(url, 0, 10)
    assert time.monotonic() - start > stores.PATIENCE.later
    assert re.fullmatch(f"{url}: {why}; trying for 1 s\n", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("fault", "why"),
    [
        ((403, DENIED), r"access denied: 403 Forbidden \(AccessDenied: Access Denied\); check the"),
        ((400, EXPIRED), r"the credentials have expired \(400 Bad Request \(ExpiredToken: .*renew"),
        ((301, ""), "the bucket is in another region; set AWS_REGION"),
        ((200, "all of it"), "its server does not support range requests"),
    ],
    ids=str,
)
def test_what_stays_wrong_is_said_at_once(fault, why, s3, proxy):
    proxy.faults = [fault]
    with pytest.raises(UserError, match=f"^{s3.url}/x.tar: {why}") as error:
        stores.read(f"{s3.url}/x.tar", 0, 10)
    assert "\n" not in str(error.value)
    assert len(proxy.requests) == 1


@pytest.mark.parametrize("store", ["s3", "gcs"])
def test_what_is_missing_is_named(store, request, impatient):
    bucket = request.getfixturevalue(store)
    for url in (f"{bucket.url}/t.csv", f"{bucket.url}/t.parquet"):
        with pytest.raises(
            UserError, match=f"^data.name: {url} can't be read: there is no such obj"
        ):
            open_source(default().data, url, "")
    scheme = bucket.url.partition("://")[0]
    for ask in (stores.head, download, expand) if store == "s3" else ():  # fake-gcs-server: 500
        with pytest.raises(UserError, match=r"^(?!.*\n).*: there is no such bucket$"):
            ask(Url(f"{scheme}://not-there/{'*' if ask is expand else 'x'}.tar"))


def test_what_keeps_a_store_from_being_opened_is_said_in_a_line(
    no_credentials, impatient, monkeypatch, tmp_path
):
    def message(url: str) -> str:
        forget()
        with pytest.raises(UserError, match=r"^(?!.*\n)") as error:
            stores.read(url, 0, 1)
        return str(error.value)

    assert re.match(r"no credentials were found for s3://b; set AWS_PROFILE", message("s3://b/x"))
    monkeypatch.setenv("AWS_PROFILE", "gone")
    assert message("s3://b/x") == (
        "s3://b can't be opened: The config profile (gone) could not be found"
    )
    monkeypatch.delenv("AWS_PROFILE")
    assert message("az://b/x") == "az://b needs the name of an account: AZURE_STORAGE_ACCOUNT"
    assert message("s3:///x") == "s3:///x names no bucket"
    monkeypatch.setenv("AWS_SKIP_SIGNATURE", "true")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    assert message("s3://b/x") == "s3://b/x can't be read: the connection was refused"
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://no-such-host.invalid")
    assert message("s3://b/x") == (
        "s3://b/x can't be read: its host is unknown: no network, or a wrong name"
    )
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "gone.json"))
    assert message("gs://b/x").startswith("gs://b can't be opened: ")


def test_profiles_are_read_as_the_command_line_of_aws_does(s3, proxy, monkeypatch, tmp_path):
    url = s3.put("x", b"content")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name)
    (tmp_path / "aws_credentials").write_text(
        "[mine]\naws_access_key_id = AKIAMINE\naws_secret_access_key = secret\n"
    )
    (tmp_path / "aws_config").write_text(
        f"[profile mine]\nregion = eu-west-3\nendpoint_url = {proxy.url}\n"
    )
    monkeypatch.setenv("AWS_PROFILE", "mine")
    forget()
    assert stores.read(url, 0, 7) == b"content"
    assert re.search(r"Credential=AKIAMINE/\d+/eu-west-3/s3/", proxy.signatures[0])


def test_uploads_outlast_a_disturbance(s3, proxy, monkeypatch):
    backoff = {"init_backoff": timedelta(milliseconds=1), "max_backoff": timedelta(milliseconds=9)}
    retries = access.UPLOAD_RETRIES | {"backoff": backoff}
    monkeypatch.setattr(access, "UPLOAD_RETRIES", retries)
    monkeypatch.setattr(stores, "PART", 5 << 20)
    big = np.random.default_rng(0).bytes(6 << 20)
    with stores.writer(f"{s3.url}/big.bin") as file:
        file.write(big[: 1 << 20])
        proxy.faults = ["reset", (503, "<Code>SlowDown</Code>")] * 10
        file.write(big[1 << 20 :])
    assert proxy.faults == []
    assert s3.get("big.bin") == big


def test_files_are_written_whole_or_not_at_all(s3):
    stores.write(f"{s3.url}/a/b.bin", CONTENT)
    assert s3.get("a/b.bin") == CONTENT
    big = np.random.default_rng(0).bytes(3 * stores.PART // 2)
    with stores.writer(f"{s3.url}/big.bin") as file:
        for start in range(0, len(big), 1 << 20):
            file.write(big[start : start + (1 << 20)])
    assert s3.get("big.bin") == big
    with suppress(RuntimeError), stores.writer(f"{s3.url}/never.bin") as file:
        file.write(big)
        raise RuntimeError
    assert s3.names() == ["a/b.bin", "big.bin"]
    for write in (lambda url: stores.write(url, b""), lambda url: stores.writer(url).__enter__()):
        with pytest.raises(UserError, match=r"^http://h/x: web servers can't be written to"):
            write("http://h/x")


def test_a_remote_file_is_like_a_local_one(s3, proxy):
    url = s3.put("x.bin", CONTENT)
    remote, local = RemoteFile(url), io.BytesIO(CONTENT)
    for offset, whence, size in ((5, 0, 10), (-7, 2, 100), (-3, 1, 2), (0, 0, 0), (100, 0, None)):
        assert remote.seek(offset, whence) == local.seek(offset, whence)
        assert remote.read(size) == local.read(size)
        assert remote.tell() == local.tell()
    proxy.requests.clear()
    first = download(Url(url))
    assert first.read_bytes() == CONTENT
    asked = len(proxy.requests)
    assert download(Url(url)) == first
    assert len(proxy.requests) == asked + 1  # just for its version
    s3.put("x.bin", CONTENT[::-1])
    assert download(Url(url)).read_bytes() == CONTENT[::-1]
    with pytest.raises(OSError, match="it has changed"):
        remote.seek(0) or remote.read()


@pytest.mark.parametrize("place_of_images", ["bytes", "relative", "urls"])
@pytest.mark.parametrize("form", ["csv", "parquet"])
def test_tables_are_read_from_buckets_as_from_folders(form, place_of_images, s3, tmp_path):
    if form == "csv" and place_of_images == "bytes":
        return
    images = [picture(i) for i in range(12)]
    values: list = images
    if place_of_images != "bytes":
        values = [f"i/{i}.jpg" for i in range(12)]
        (tmp_path / "i").mkdir()
        for name, image in zip(values, images, strict=True):
            (tmp_path / name).write_bytes(image)
            s3.put(f"d/{name}", image)
    if place_of_images == "urls":
        web = f"{s3.server}/{s3.name}/d"
        values = [f"{(f'{s3.url}/d', web)[i % 2]}/{name}" for i, name in enumerate(values)]
    captions = [f"number {i}" for i in range(12)]
    table = tmp_path / f"t.{form}"
    if form == "csv":
        lines = [f"{v},{c}" for v, c in zip(values, captions, strict=True)]
        table.write_text("\n".join(["image,caption", *lines]))
    else:
        columns = pa.table({"image": values, "caption": captions})
        pa.parquet.write_table(columns, table, row_group_size=5)
    local = TableSource(table, "image", "caption")
    remote = TableSource(Url(s3.put(f"d/t.{form}", table.read_bytes())), "image", "caption")
    assert remote.fingerprint == local.fingerprint
    assert [remote[i].image for i in (3, 11, 0, 4)] == [images[i] for i in (3, 11, 0, 4)]
    assert [remote[i].captions for i in range(12)] == [local[i].captions for i in range(12)]
    assert not remote.left_out()


def test_urls_of_web_servers_are_encoded_and_may_have_a_query(s3, proxy):
    s3.put("a b/ü#1%.jpg", CONTENT)
    url = f"{proxy.url}/{s3.name}/a%20b/%C3%BC%231%25.jpg?width=5"
    assert stores.fetch(url)[0] == CONTENT
    assert stores.read(url, 3, 9) == CONTENT[3:9]
    assert {path.partition("?")[2] for _, path, _ in proxy.requests} == {"width=5"}


def test_images_that_are_gone_are_bad_samples(s3, impatient, monkeypatch):
    monkeypatch.setattr(table_source, "MAX_IMAGE_BYTES", 10)
    s3.put("large.jpg", b"?" * 11)
    table = s3.put("large.csv", b"image,caption\nlarge.jpg,c")
    with pytest.raises(BadSample, match="11 bytes") as bad:
        _ = TableSource(Url(table), "image", "caption")[0]
    assert bad.value.kind == "too_large"
    rows = ["1.jpg", f"{s3.server}/{s3.name}/2.jpg", "http://127.0.0.1:1/3.jpg", "ftp://h/4.jpg"]
    s3.put("1.jpg", b"")
    table = s3.put("t.csv", "\n".join(["image,caption", *(f"{row},c" for row in rows)]).encode())
    source = TableSource(Url(table), "image", "caption")
    assert source[0].image == b""
    for row, detail in ((1, "no such object"), (2, "connection was refused"), (3, "unknown kind")):
        with pytest.raises(BadSample, match=detail) as bad:
            _ = source[row]
        assert bad.value.kind == "unreadable"
        assert bad.value.key == rows[row]
