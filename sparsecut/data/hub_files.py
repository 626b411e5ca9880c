"""Files of a data set on the hub, fetched one by one when they are read.

They lie in the cache of the hub's client, where another run finds them again.
"""

from __future__ import annotations

import posixpath
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from ..hub import explain_hub_error
from ..schema import UserError
from .access import Access, read_file
from .images import ImageStore

ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".7z")


@dataclass(frozen=True)
class Remote:
    """A data set of the hub at one commit.

    Attributes:
        name: Its name, owner/name.
        revision: The commit.
        files: Names of all its files.
    """

    name: str
    revision: str
    files: frozenset[str] = field(default=frozenset(), repr=False)

    @cached_property
    def folder(self) -> Path:
        """The folder where fetched files lie."""
        from huggingface_hub import constants
        from huggingface_hub.file_download import repo_folder_name

        name = repo_folder_name(repo_id=self.name, repo_type="dataset")
        return Path(constants.HF_HUB_CACHE, name, "snapshots", self.revision)

    def name_file(self, path: Path) -> str:
        """Return the name, inside the data set, of a file in `folder`."""
        return path.relative_to(self.folder).as_posix()

    def show(self, path: Path) -> str:
        """Return what messages call a file."""
        return f"{self.name}/{self.name_file(path)}"

    def fetch(self, path: Path) -> Path:
        """Fetch a file unless it is here, and return its path.

        Raises:
            UserError: The hub does not give it.
        """
        if path.is_file():
            return path
        from huggingface_hub import errors, hf_hub_download

        try:
            hf_hub_download(
                self.name, self.name_file(path), repo_type="dataset", revision=self.revision
            )
        except errors.LocalEntryNotFoundError as error:
            cause = error.__cause__ or error
            raise UserError(
                f"{self.show(path)} cannot be fetched from the hub ({type(cause).__name__}); it has"
                " not been fetched before, so mend the connection, or fetch the data set first"
                f" (hf download {self.name} --repo-type dataset)"
            ) from None
        except (errors.HTTPError, OSError) as error:
            raise explain_hub_error(error, self.name, "dataset", self.revision) from None
        return path


class HubImages(ImageStore):
    """Images beside a file of records on the hub; each is fetched when it is needed."""

    def __init__(self, remote: Remote, folder: Path, access: Access):
        remote.folder.mkdir(parents=True, exist_ok=True)
        super().__init__(remote.folder, access)
        self.path = folder
        self.remote = remote

    def check(self, name: str) -> None:
        """Raise UserError where the data set has no such file."""
        folder = self.remote.name_file(self.path)
        full = posixpath.normpath(posixpath.join(folder, name))
        if full not in self.remote.files:
            archives = [file for file in sorted(self.remote.files) if file.endswith(ARCHIVES)]
            remedy = "correct the record's `image`"
            if archives:
                remedy = (
                    f"if it is in {archives[0]}, fetch that (hf download {self.remote.name}"
                    f" {archives[0]} --repo-type dataset), unpack it and give the folder as"
                    " `images`"
                )
            raise UserError(f"there is no image {full} in {self.remote.name} of the hub; {remedy}")

    def find_file(self, name: str) -> Path:
        """Return the file of an image, which is fetched."""
        self.check(name)
        return self.remote.fetch(Path(posixpath.normpath(self.path / name)))

    def read_bytes(self, name: str) -> bytes:
        """Return the encoded bytes of an image."""
        return read_file(self.find_file(name), self.access)
