"""Models by name: folders laid out like repositories, a Hub of our own, and no Hub at all."""

import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import huggingface_hub
import pytest
import torch

from tests.models.published import golden_case
from visionmamba import Vim, VimConfig, save
from visionmamba.models import DeiTConfig
from visionmamba.models.hub import find_weights
from visionmamba.models.released import PUBLISHED_MODELS, models_table

CONFIG = VimConfig(image_size=32, patch_size=8, d_model=16, depth=2, num_classes=3)
COMMIT = "0" * 40


@pytest.fixture
def published(tmp_path):
    """A folder laid out like the authors' repository, with two checkpoints."""
    folder = tmp_path / "Vim-tiny-midclstok"
    folder.mkdir()
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    for model, case in zip(PUBLISHED_MODELS, ("v2_mid_div2", "v2_stride8"), strict=False):
        torch.save({"model": golden_case(case)[1]}, folder / model.filename)
    return folder


@pytest.fixture
def own(tmp_path):
    """A folder that save wrote, and its model."""
    model = CONFIG.build().eval()
    save(model, tmp_path / "own", class_names=("a", "b", "c"), preprocessing={"channels": "RGB"})
    return tmp_path / "own", model


@pytest.fixture
def no_hub(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@torch.no_grad()
def test_checkpoint_in_a_folder_like_the_repository_loads(published):
    _, _, images, logits, _ = golden_case("v2_mid_div2")
    model = Vim.from_pretrained(published, filename="vim_t_midclstok_76p1acc.pth")
    torch.testing.assert_close(model(images), logits, rtol=1e-4, atol=1e-4)


def test_folder_with_two_checkpoints_asks_for_one(published):
    with pytest.raises(
        ValueError, match=r"holds 2 weights files.*76p1acc\.pth, vim_t_midclstok_ft"
    ):
        Vim.from_pretrained(published)


def test_only_checkpoint_in_a_folder_is_found(published):
    (published / "vim_t_midclstok_ft_78p3acc.pth").unlink()
    assert Vim.from_pretrained(published).config.depth == 4


def test_absent_file_of_a_folder_is_named(published):
    with pytest.raises(FileNotFoundError, match=r"has no file other\.pth"):
        Vim.from_pretrained(published, filename="other.pth")


def test_folder_without_weights_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no weights; wanted model"):
        Vim.from_pretrained(tmp_path)


@torch.no_grad()
def test_saved_folder_and_file_come_back(own):
    folder, model = own
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(Vim.from_pretrained(folder)(images), model(images))
    loaded = Vim.from_pretrained(str(folder / "model.safetensors"))
    assert loaded.config == CONFIG and loaded.header.class_names == ("a", "b", "c")
    assert loaded.load_report.guessed == {}


@torch.no_grad()
def test_own_weights_are_fitted_too(own):
    folder, model = own
    images = torch.randn(2, 3, 40, 24)
    loaded = Vim.from_pretrained(folder, num_classes=5, image_size=(40, 24))
    assert loaded(images).shape == (2, 5)
    assert torch.equal(loaded.forward_features(images), model.forward_features(images))
    assert loaded.header.class_names == ()
    assert loaded.header.preprocessing == {"channels": "RGB", "image_size": [40, 24]}
    assert loaded.load_report.options["num_classes"] == (5, "given")


def test_deit_is_sent_to_load(tmp_path):
    config = DeiTConfig(image_size=32, patch_size=8, d_model=16, depth=1, num_heads=2)
    save(config.build(), tmp_path / "deit")
    with pytest.raises(ValueError, match="holds a DeiT; load it with visionmamba"):
        Vim.from_pretrained(tmp_path / "deit")


def test_card_of_converted_weights_names_origin_and_licence(published, tmp_path):
    model = Vim.from_pretrained(published, filename="vim_t_midclstok_76p1acc.pth")
    save(model, tmp_path / "mine")
    card = (tmp_path / "mine" / "README.md").read_text()
    assert "license: apache-2.0\nbase_model: hustvl/Vim-tiny-midclstok\n" in card
    assert "- Made from vim_t_midclstok_76p1acc.pth of hustvl/Vim-tiny-midclstok" in card
    assert "guessed, as in the released models: readout='middle'" in card
    assert str(tmp_path) not in card


@pytest.mark.parametrize("name", ["vim_tiny_patch16_224", "someone/their-vim"])
def test_without_the_hub_the_steps_by_hand_are_given(no_hub, tmp_path, name):
    with pytest.raises(FileNotFoundError) as failure:
        Vim.from_pretrained(name, cache_dir=tmp_path)
    message = str(failure.value)
    assert "is not on this machine and the Hub was not reached" in message
    assert "run `hf download " in message and "give the path" in message
    assert "\n" not in message


def test_steps_by_hand_name_repository_and_file(no_hub, tmp_path):
    steps = (
        "hf download hustvl/Vim-tiny-midclstok vim_t_midclstok_76p1acc.pth "
        "--local-dir Vim-tiny-midclstok"
    )
    with pytest.raises(FileNotFoundError, match=steps):
        Vim.from_pretrained("vim_tiny_patch16_224", cache_dir=tmp_path)


def test_repository_with_two_checkpoints_asks_for_a_name():
    with pytest.raises(ValueError, match="vim_tiny_patch16_224 or vim_tiny_patch16_stride8_224"):
        Vim.from_pretrained("hustvl/Vim-tiny-midclstok")


def test_unknown_name_lists_the_published_ones():
    with pytest.raises(ValueError, match="model 'vim_tny'; published: vim_tiny_patch16_224, vim"):
        Vim.from_pretrained("vim_tny")


@pytest.mark.parametrize("path", ["weights/vim.pth", "a/b/c", "vim.safetensors"])
def test_missing_path_is_named(path):
    with pytest.raises(FileNotFoundError, match=f"weights file {path} is missing"):
        Vim.from_pretrained(path)


@pytest.fixture
def served(tmp_path, monkeypatch):
    """A Hub on this machine, with the repositories in a folder, which it returns."""
    root = tmp_path / "hub"

    class Hub(BaseHTTPRequestHandler):
        def answer(self, *, with_body):
            repository, _, filename = self.path[1:].partition("/resolve/main/")
            path = root / repository / filename
            if not path.is_file():
                code = "EntryNotFound" if (root / repository).is_dir() else "RepoNotFound"
                self.send_response(404)
                self.send_header("X-Error-Code", code)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            self.send_response(200)
            self.send_header("Content-Length", str(path.stat().st_size))
            self.send_header("ETag", '"1"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.end_headers()
            if with_body:
                self.wfile.write(path.read_bytes())

        def do_HEAD(self):
            self.answer(with_body=False)

        def do_GET(self):
            self.answer(with_body=True)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
    monkeypatch.setattr(
        huggingface_hub.constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        address + "/{repo_id}/resolve/{revision}/{filename}",
    )
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    yield root
    server.shutdown()
    server.server_close()


@torch.no_grad()
def test_published_name_is_downloaded_and_kept(served, published, tmp_path, monkeypatch):
    (served / "hustvl").mkdir(parents=True)
    published.rename(served / "hustvl" / "Vim-tiny-midclstok")
    cache = tmp_path / "cache"
    assert Vim.from_pretrained("vim_tiny_patch16_224", cache_dir=cache).config.depth == 4
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    model = Vim.from_pretrained("vim_tiny_patch16_224", cache_dir=cache, num_classes=2)
    assert model.num_classes == 2


def test_repository_of_a_saved_folder_is_downloaded(served, own, tmp_path):
    folder, model = own
    (served / "someone").mkdir(parents=True)
    folder.rename(served / "someone" / "vim")
    loaded = Vim.from_pretrained("someone/vim", cache_dir=tmp_path / "cache")
    assert torch.equal(loaded.head.weight, model.head.weight)


def test_absent_repository_and_file_are_named(served, tmp_path):
    (served / "someone" / "vim").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=r"repository someone/vim has no file model\.safet"):
        Vim.from_pretrained("someone/vim", cache_dir=tmp_path)
    with pytest.raises(FileNotFoundError, match="the Hub has no repository someone/else, or it is"):
        Vim.from_pretrained("someone/else", cache_dir=tmp_path)


class RecordedApi:
    """What push_to_hub asks of the Hub."""

    uploaded = None
    has_card = False

    def __init__(self, token):
        assert token is None

    def create_repo(self, repository, *, private, exist_ok):
        assert private and exist_ok
        return f"https://huggingface.co/{repository}"

    def file_exists(self, repository, filename):
        return self.has_card

    def upload_folder(self, *, repo_id, folder_path, commit_message):
        files = {path.name: path.read_bytes() for path in Path(folder_path).iterdir()}
        type(self).uploaded = repo_id, files


def test_hub_that_breaks_off_is_reported(tmp_path, monkeypatch):
    def break_off(*_args, **_options):
        raise huggingface_hub.errors.HTTPError("read timed out")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", break_off)
    message = r"the Hub did not give someone/vim/model\.safetensors \(read timed out\); try again"
    with pytest.raises(ConnectionError, match=message):
        Vim.from_pretrained("someone/vim", cache_dir=tmp_path)


@pytest.mark.parametrize("has_card", [False, True])
def test_pushing_uploads_weights_configuration_and_a_card(monkeypatch, has_card):
    monkeypatch.setattr(huggingface_hub, "HfApi", RecordedApi)
    monkeypatch.setattr(RecordedApi, "has_card", has_card)
    address = CONFIG.build().push_to_hub("me/vim", private=True)
    repository, files = RecordedApi.uploaded
    assert address == "https://huggingface.co/me/vim" and repository == "me/vim"
    assert json.loads(files["config.json"])["config"]["d_model"] == 16
    assert ("README.md" in files) is not has_card


def test_pushing_without_the_hub_gives_the_steps_by_hand(no_hub):
    steps = r"log in with `hf auth login`, or save a folder .* `hf upload me/vim FOLDER`"
    with pytest.raises(ConnectionError, match=steps):
        CONFIG.build().push_to_hub("me/vim")


def test_table_lists_every_published_file():
    lines = models_table().splitlines()
    assert len(lines) == 1 + len(PUBLISHED_MODELS)
    assert lines[1].split() == [
        "vim_tiny_patch16_224",
        "76.1",
        "93.0",
        "115",
        "apache-2.0",
        "hustvl/Vim-tiny-midclstok",
        "vim_t_midclstok_76p1acc.pth",
    ]


def test_checkpoint_of_a_run_is_told_from_weights(tmp_path):
    (tmp_path / "last.ckpt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"last\.ckpt is what a run .*, best\.safetensors or last"):
        find_weights(tmp_path / "last.ckpt")
    with pytest.raises(FileNotFoundError, match=r"weights file run/last\.ckpt is missing"):
        find_weights("run/last.ckpt")
