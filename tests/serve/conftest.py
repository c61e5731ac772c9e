import pytest

from bpkd_sdk.export import to_onnx
from bpkd_sdk.serve import Predictor
from tests.serve.cases import NAMES, PALETTE, SIZE, Held, network, served


@pytest.fixture(scope="session")
def model():
    """A network of five classes."""
    return network(class_names=NAMES, palette=PALETTE)


@pytest.fixture(scope="session")
def files(model, tmp_path_factory):
    """The same network as a file that returns masks, and as one that returns logits; both take 48x64 pixels only."""
    folder = tmp_path_factory.mktemp("files")
    to_onnx(model, folder / "masks.onnx", input_size=SIZE)
    to_onnx(model, folder / "logits.onnx", input_size=SIZE, dynamic_batch=False, argmax=False)
    return folder


@pytest.fixture(scope="module")
def student(model):
    """The network, in this process."""
    return Predictor(model, "cpu")


@pytest.fixture(scope="module")
def server(student, files):
    """A running server: the student; its file, which returns masks; a teacher."""
    with served(student, files / "masks.onnx", teacher=network()) as server:
        yield server


@pytest.fixture
def held():
    """A network that waits when it is told to."""
    model = Held()
    yield model
    model.go.set()
