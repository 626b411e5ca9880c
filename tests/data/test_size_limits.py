"""Nothing takes much memory that is small on disk: limits hold before anything is read."""

import gzip
import json
import tarfile
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from helpers.records import make_record

from sparsecut.config.recipe import Source
from sparsecut.data.access import Access
from sparsecut.data.examples import read_examples, read_source
from sparsecut.data.images import ImageStore
from sparsecut.data.readers import read_records
from sparsecut.schema import UserError

GIB = 2**30
MIB = 2**20


def make_header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info.tobuf(tarfile.GNU_FORMAT)


def make_sparse(name: str, size: int, style: str) -> bytes:
    """A member of a few blocks that unpacks to `size` zeros."""
    if style == "gnu":
        header = bytearray(make_header(name, 512, tarfile.GNUTYPE_SPARSE))
        header[386:398] = b"00000000000\0"
        header[398:410] = b"00000001000\0"
        header[483:495] = b"%011o\0" % size
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
        return bytes(header) + bytes(512)
    info = tarfile.TarInfo(name)
    info.size = 512
    info.pax_headers = {
        "GNU.sparse.size": str(size),
        "GNU.sparse.numblocks": "1",
        "GNU.sparse.map": "0,512",
    }
    return info.tobuf(tarfile.PAX_FORMAT) + bytes(512)


def pack(**contents: bytes) -> bytes:
    parts = []
    for name, content in contents.items():
        name = name.replace("_", ".")
        parts += [make_header(name, len(content)), content, bytes(-len(content) % 512)]
    return b"".join(parts)


@pytest.fixture(scope="module")
def good() -> bytes:
    """The members of one good sample, of a text alone."""
    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "x"}]
    return pack(good_json=json.dumps({"conversations": turns}).encode())


@pytest.mark.parametrize("style", ["gnu", "pax"])
@pytest.mark.parametrize("name", ["bad.json", "bad.png"])
def test_a_sparse_member_of_three_gib_is_one_bad_record(tmp_path, good, style, name):
    path = tmp_path / "x.tar"
    record = pack(bad_json=json.dumps({"conversations": []}).encode()) if "png" in name else b""
    path.write_bytes(record + make_sparse(name, 3 * GIB, style) + good + bytes(1024))
    assert path.stat().st_size < 10_000
    problems = []
    assert [e.id for e in read_source(Source(str(path), on_error="skip"), problems)] == ["good"]
    assert len(problems) == 1
    with pytest.raises(UserError, match=r"member bad.*max_mib"):
        next(read_records(path))[1]()
    with pytest.raises(UserError, match=name.replace(".", r"\.") + ".*max_mib"):
        ImageStore(path).check(name)


def test_a_small_sparse_member_is_refused_as_such(tmp_path, good):
    path = tmp_path / "x.tar"
    path.write_bytes(make_sparse("a.png", 4096, "pax") + good + bytes(1024))
    with pytest.raises(UserError, match=r"a\.png .*sparse"):
        ImageStore(path).load("a.png")


@pytest.mark.parametrize(
    "kind", [tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE]
)
def test_a_header_of_three_gib_is_not_read(tmp_path, good, kind):
    for path in (tmp_path / "x.tar", tmp_path / "y.tar.gz"):
        content = make_header("x", 3 * GIB, kind) + good
        path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
        with pytest.raises(UserError, match=f"{path.name} .*header"):
            ImageStore(path)


def test_damaged_archives_are_refused_and_end_nothing_early(tmp_path, good):
    path = tmp_path / "x.tar"
    damaged = bytearray(good)
    damaged[5] ^= 1  # the header's sum is wrong now
    for content in (good + bytes(damaged), good + good[:300], good[:700], b"", b"x" * 5000):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"x\.tar"):
            read_examples(path)
    backwards = tarfile.TarInfo("a.json")
    backwards.pax_headers = {"size": "-1024"}
    path.write_bytes(good + backwards.tobuf(tarfile.PAX_FORMAT) + good)
    with pytest.raises(UserError, match=r"x\.tar"):
        read_examples(path)


def test_links_in_an_archive_lead_to_its_own_images_only(image_folder):
    path = image_folder / "x.tar"
    with tarfile.open(path, "w") as archive:
        archive.add(image_folder / "a.png", "sub/a.png")
        for name, kind, target in (
            ("hard.png", tarfile.LNKTYPE, "sub/a.png"),
            ("sub/soft.png", tarfile.SYMTYPE, "a.png"),
            ("sub/twice.png", tarfile.SYMTYPE, "../hard.png"),
            ("out.png", tarfile.SYMTYPE, "/etc/hostname"),
            ("loop.png", tarfile.SYMTYPE, "loop.png"),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, target
            archive.addfile(info)
    packed = image_folder / "x.tar.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    for store in (ImageStore(path), ImageStore(packed)):
        for name in ("hard.png", "sub/soft.png", "sub/twice.png"):
            assert store.load(name).size == (10, 12)
        assert "out.png" not in store and "loop.png" not in store


@pytest.mark.parametrize("name", ["x.jsonl", "x.json"])
def test_a_long_line_is_one_bad_record_and_the_limit_may_be_raised(image_folder, name):
    long = make_record(id="long", more="x" * (2 * MIB))
    path = image_folder / name
    texts = [json.dumps(record) for record in (make_record(id="a"), long, make_record(id="b"))]
    path.write_text("\n".join(texts) if name == "x.jsonl" else f"[{', '.join(texts)}]")
    problems = []
    examples = read_source(Source(str(path), on_error="skip", max_mib=1), problems)
    assert [example.id for example in examples] == ["a", "b"]
    assert "max_mib" in str(problems[0])
    assert len(read_source(Source(str(path), max_mib=3), [])) == 3


def test_a_large_image_is_not_read(image_folder):
    with (image_folder / "a.png").open("r+b") as file:
        file.truncate(3 * GIB)  # a file with a hole, which takes no room
    with pytest.raises(UserError, match="max_mib"):
        ImageStore(image_folder).load("a.png")
    assert ImageStore(image_folder, Access(max_mib=1)).load("sub/b.png")


def write_table(path: Path, image: bytes, compression: str) -> Path:
    record = make_record(image={"bytes": image, "path": None})
    table = pyarrow.Table.from_pylist([record, record])
    pyarrow.parquet.write_table(table, path, compression=compression)
    return path


def test_a_table_of_few_bytes_that_unpack_to_many_is_refused(tmp_path):
    path = write_table(tmp_path / "x.parquet", bytes(200 * MIB), "zstd")
    assert path.stat().st_size < MIB
    with pytest.raises(UserError, match=r"x\.parquet.*max_mib"):
        read_examples(path)


def test_a_large_cell_of_a_table_is_one_bad_record(tmp_path, image_folder):
    good = (image_folder / "a.png").read_bytes()
    large = good + bytes(range(256)) * (MIB // 128)
    path = write_table(tmp_path / "x.parquet", large, "none")
    problems = []
    with pytest.raises(UserError, match="max_mib"):
        read_source(Source(str(path), on_error="skip", max_mib=1), problems)
    assert len(problems) == 2
    assert len(read_source(Source(str(path), max_mib=4), [])) == 2
