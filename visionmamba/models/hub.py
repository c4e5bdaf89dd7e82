"""Models by name, from disk or from the Hub, and to the Hub.

Talks to the Hub through huggingface_hub only, and only when a file is not on disk.
"""

import os
import re
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Unpack

from torch import nn

from visionmamba import __version__
from visionmamba.models.adapt import LoadReport, Origin, Resize, build_fitted, patch_grid
from visionmamba.models.config import VimConfig, VimOptions
from visionmamba.models.published import load_published
from visionmamba.models.published_file import Which
from visionmamba.models.released import PUBLISHED_MODELS
from visionmamba.models.vim import Vim
from visionmamba.models.weights import (
    METADATA_KEY,
    WEIGHTS_NAME,
    WeightsHeader,
    config_of,
    read_header,
    read_metadata,
    read_tensors,
    save,
)

_SUFFIXES = (".safetensors", ".pth", ".pt")
_CHECKPOINT = ".ckpt"  # of a run of training, which is no weights file


def from_pretrained(
    name_or_path: str | os.PathLike[str],
    *,
    filename: str | None = None,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    which: Which = "model",
    resize: Resize = "grid",
    **config_overrides: Unpack[VimOptions],
) -> Vim:
    """See Vim.from_pretrained."""
    path = find_weights(
        name_or_path,
        filename=filename,
        revision=revision,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
    )
    if path.suffix != ".safetensors" or METADATA_KEY not in read_metadata(path):
        return load_published(path, which=which, resize=resize, **config_overrides)
    header = read_header(path)
    held = config_of(header, path)
    if not isinstance(held, VimConfig):
        raise ValueError(f"{path} holds a DeiT; load it with visionmamba.load")
    wanted = replace(held, **config_overrides)
    model, changes = build_fitted(
        read_tensors(path), held, wanted, source_grid=patch_grid(held), resize=resize, name=path
    )
    model.header = _fitted_header(header, held, wanted)
    told: dict[str, tuple[object, Origin]] = {
        name: (value, "header") for name, value in asdict(held).items()
    }
    told |= {name: (value, "given") for name, value in config_overrides.items()}
    model.load_report = LoadReport(source=str(path), options=told, changes=changes)
    return model


def find_weights(
    name_or_path: str | os.PathLike[str],
    *,
    filename: str | None = None,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Path:
    """Return the file with the weights meant, downloaded when it is on the Hub only.

    Args, Raises: as from_pretrained; ValueError also for a checkpoint of training.
    """
    path, name = Path(name_or_path), os.fspath(name_or_path)
    if path.is_dir():
        return _weights_in(path, filename)
    if path.is_file() and path.suffix == _CHECKPOINT:
        raise ValueError(
            f"{name} is what a run of training goes on from; give the weights beside it, "
            "best.safetensors or last.safetensors"
        )
    if path.is_file():
        return path
    known = {model.name: model for model in PUBLISHED_MODELS}
    if name in known:
        repository, filename = known[name].repository, known[name].filename
    elif _is_repository(name):
        repository, filename = name, filename or _only_weights_of(name)
    elif path.suffix in (*_SUFFIXES, _CHECKPOINT) or len(path.parts) > 1:
        raise FileNotFoundError(f"weights file {name} is missing; check the path")
    else:
        raise ValueError(
            f"there is no file, folder or published model {name!r}; published: {', '.join(known)}"
        )
    return _download(
        repository,
        filename,
        revision=revision,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
    )


def push_to_hub(
    model: nn.Module,
    repository: str,
    *,
    private: bool,
    token: str | None,
    commit_message: str,
) -> str:
    """Upload what `save` writes into a folder, of a Vim or a DeiT: see Vim.push_to_hub."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

    with tempfile.TemporaryDirectory() as folder:
        save(model, folder)
        api = HfApi(token=token)
        try:
            made = api.create_repo(repository, private=private, exist_ok=True)
            if api.file_exists(repository, "README.md"):
                (Path(folder) / "README.md").unlink()
            api.upload_folder(repo_id=repository, folder_path=folder, commit_message=commit_message)
        except (OSError, HTTPError) as error:
            raise ConnectionError(
                f"{repository} could not be written on the Hub ({_first_line(error)}); log in with "
                "`hf auth login`, or save a folder with visionmamba.save(model, 'FOLDER') and "
                f"upload it elsewhere with `hf upload {repository} FOLDER`"
            ) from None
    return str(made)


def _fitted_header(header: WeightsHeader, held: VimConfig, wanted: VimConfig) -> WeightsHeader:
    preprocessing = dict(header.preprocessing)
    if wanted.in_channels != held.in_channels:
        preprocessing = {}
    elif preprocessing and wanted.image_size != held.image_size:
        preprocessing["image_size"] = list(wanted.resolved_image_size)
    return replace(
        header,
        config=asdict(wanted),
        class_names=header.class_names if wanted.num_classes == held.num_classes else (),
        preprocessing=preprocessing,
    )


def _weights_in(folder: Path, filename: str | None) -> Path:
    if filename is not None:
        if not (folder / filename).is_file():
            raise FileNotFoundError(f"folder {folder} has no file {filename}; check the name")
        return folder / filename
    if (folder / WEIGHTS_NAME).is_file():
        return folder / WEIGHTS_NAME
    found = sorted(path for path in folder.iterdir() if path.suffix in _SUFFIXES)
    if not found:
        raise FileNotFoundError(
            f"folder {folder} holds no weights; wanted {WEIGHTS_NAME} or the authors' .pth file"
        )
    if len(found) > 1:
        raise ValueError(
            f"folder {folder} holds {len(found)} weights files; choose one with filename=, of "
            f"{', '.join(path.name for path in found)}"
        )
    return found[0]


def _is_repository(name: str) -> bool:
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and not name.endswith(
        (*_SUFFIXES, _CHECKPOINT)
    )


def _only_weights_of(repository: str) -> str:
    published = [model for model in PUBLISHED_MODELS if model.repository == repository]
    if len(published) > 1:
        raise ValueError(
            f"{repository} holds {len(published)} weights files; choose one by name: "
            f"{' or '.join(model.name for model in published)}"
        )
    return published[0].filename if published else WEIGHTS_NAME


def _download(
    repository: str,
    filename: str,
    *,
    revision: str | None,
    cache_dir: str | Path | None,
    local_files_only: bool,
) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (  # type: ignore[attr-defined]
        EntryNotFoundError,
        HTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        return Path(
            hf_hub_download(
                repository,
                filename,
                revision=revision,
                cache_dir=cache_dir,
                local_files_only=local_files_only,
                library_name="visionmamba",
                library_version=__version__,
            )
        )
    except LocalEntryNotFoundError:
        folder = repository.split("/")[1]
        raise FileNotFoundError(
            f"{repository}/{filename} is not on this machine and the Hub was not reached; where "
            f"there is a connection run `hf download {repository} {filename} --local-dir {folder}`,"
            f" bring the folder here and give the path {folder}/{filename} instead of the name"
        ) from None
    except (RepositoryNotFoundError, RevisionNotFoundError):
        at = f" at revision {revision}" if revision else ""
        raise FileNotFoundError(
            f"the Hub has no repository {repository}{at}, or it is not open to you; check the "
            "name, or log in with `hf auth login`"
        ) from None
    except EntryNotFoundError:
        raise FileNotFoundError(
            f"repository {repository} has no file {filename}; name its weights with filename="
        ) from None
    except HTTPError as error:
        raise ConnectionError(
            f"the Hub did not give {repository}/{filename} ({_first_line(error)}); try again later"
        ) from None


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
