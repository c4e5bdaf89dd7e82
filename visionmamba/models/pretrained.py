"""What a Vim knows of the weights it was loaded with: where they came from, where they can go.

The work is in hub.py, published.py and weights.py, imported at the first use.
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

from torch import nn

from visionmamba.models.config import VimOptions

if TYPE_CHECKING:
    from visionmamba.models.adapt import LoadReport, Resize
    from visionmamba.models.published_file import Which
    from visionmamba.models.vim import Vim
    from visionmamba.models.weights import WeightsHeader


class Pretrained(nn.Module):
    """A model that can come from the Hub and go there."""

    header: "WeightsHeader | None" = None
    """What the weights file said of outputs and pictures; None for a model that was not loaded."""
    load_report: "LoadReport | None" = None
    """How load_published or from_pretrained made the model."""

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike[str],
        *,
        filename: str | None = None,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        which: "Which" = "model",
        resize: "Resize" = "grid",
        **config_overrides: Unpack[VimOptions],
    ) -> "Vim":
        """Return a model with weights from disk or from the Hub, in evaluation mode on the CPU.

        `model.load_report` tells what was guessed and what was changed to fit; `model.header` what
        is known of classes and pictures.

        Args:
            name_or_path: a file or folder on disk; else a name that `visionmamba models` lists;
                else a repository OWNER/NAME of the Hub.
            filename: weights in the folder or repository; by default model.safetensors, or the
                only weights in a folder.
            revision: branch, tag or commit of the repository.
            cache_dir: where downloads are kept; by default the Hub's own cache.
            local_files_only: never ask the Hub.
            which, resize, config_overrides: as in load_published, for weights of either format.

        Raises:
            FileNotFoundError: no such file, or it is not here and the Hub cannot be reached; the
                message has the steps by hand.
            ConnectionError: the Hub failed.
            ValueError: an unknown name, or weights that do not fit.
        """
        from visionmamba.models.hub import from_pretrained

        return from_pretrained(
            name_or_path,
            filename=filename,
            revision=revision,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            which=which,
            resize=resize,
            **config_overrides,
        )

    def push_to_hub(
        self,
        repository: str,
        *,
        private: bool = False,
        token: str | None = None,
        commit_message: str = "Upload a visionmamba model",
    ) -> str:
        """Upload weights, configuration and, where there is none, a model card; return the address.

        Args:
            repository: OWNER/NAME; made when missing.
            private: whether a new repository is for its owner only.
            token: by default that of `hf auth login`.
            commit_message: of the upload.

        Raises:
            ConnectionError: the Hub cannot be reached, or refuses; the message has the steps by
                hand.
        """
        from visionmamba.models.hub import push_to_hub

        return push_to_hub(
            self, repository, private=private, token=token, commit_message=commit_message
        )
