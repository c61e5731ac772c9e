import pytest

from bpkd_sdk.export import to_onnx
from bpkd_sdk.serve import Predictor
from tests.serve.cases import NAMES, PALETTE, SIZE, Held, network, served


@pytest.fixture(scope="session")
def model():
    """A network with five classes."""
    return network(class_names=NAMES, palette=PALETTE)


@pytest.fixture(scope="session")
def files(model, tmp_path_factory):
    """ONNX files of the network, one that returns masks and one that returns logits. Both accept only 48x64 pixels."""
    folder = tmp_path_factory.mktemp("files")
    to_onnx(model, folder / "masks.onnx", input_size=SIZE)
    to_onnx(model, folder / "logits.onnx", input_size=SIZE, dynamic_batch=False, argmax=False)
    return folder


@pytest.fixture(scope="module")
def student(model):
    """A predictor of the network."""
    return Predictor(model, "cpu")


@pytest.fixture(scope="module")
def server(student, files):
    """A running server with two students (the network, and its file that returns masks) and a teacher."""
    with served(student, files / "masks.onnx", teacher=network()) as server:
        yield server


@pytest.fixture
def held():
    """A network that waits after `hold()` until its event `go` is set."""
    model = Held()
    yield model
    model.go.set()
