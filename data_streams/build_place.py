"""Where a build writes: beside its place until all is there, and never over what is no data set."""

import os
from dataclasses import dataclass

from cluster.errors import ConfigError
from cluster.storage import Storage
from data_streams.item_table import EMBEDDINGS_NAME, ITEMS_NAME
from data_streams.manifest import MANIFEST_NAME, Manifest
from data_streams.user_table import USERS_NAME

OWN_NAMES = {MANIFEST_NAME, ITEMS_NAME, USERS_NAME, EMBEDDINGS_NAME, "shards", "inspect.png"}
"""What builds and inspections write."""


@dataclass(frozen=True, kw_only=True)
class BuildPlace:
    """A folder for a data set, and two beside it: the new one on its way, and the old one while they change places."""

    home: Storage
    """Where the three lie."""
    name: str

    @staticmethod
    def of(out: str, *, overwrite: bool) -> "BuildPlace":
        """Raises: ConfigError where nothing may be written to `out`, or no data set may be replaced there."""
        home, name = _home_and_name(out)
        place = BuildPlace(home=Storage(home), name=name)
        if place.home.is_file(name):
            raise ConfigError(f"--out must be a folder, and {out} is a file; name another one")
        place._recover()
        there = place.home.list(name)
        if there and not overwrite:
            raise ConfigError(
                f"--out must be new or empty, but {out} holds files; name another or add --overwrite"
            )
        others = [entry for entry in there if entry not in OWN_NAMES]
        if others and MANIFEST_NAME not in there:
            raise ConfigError(
                f"--overwrite replaces a data set, and {out} is none: it holds {', '.join(others[:3])} and no "
                f"{MANIFEST_NAME}; name another folder, or remove what is there yourself"
            )
        return place

    @property
    def staged(self) -> str:
        return f".{self.name}.building"

    @property
    def replaced(self) -> str:
        return f".{self.name}.replaced"

    def open_staging(self) -> Storage:
        """An empty folder for the files on their way."""
        self.home.delete(self.staged)
        self.home.make_directory(self.staged)
        return self.home.folder(self.staged)

    def publish(self, manifest: Manifest) -> None:
        """The manifest appears when all else is there: with the rename of a local disk, else after the move."""
        home = self.home
        if home.is_local:
            manifest.save(home.folder(self.staged))
            if home.exists(self.name):
                home.rename(self.name, self.replaced)
            home.rename(self.staged, self.name)
            home.delete(self.replaced)
            return
        # In this order, so that what is left of a broken deletion is no data set.
        home.delete(f"{self.name}/{MANIFEST_NAME}")
        home.delete(self.name)
        home.rename(self.staged, self.name)
        manifest.save(home.folder(self.name))

    def discard(self) -> None:
        """Take away what a build that failed has left."""
        self.home.delete(self.staged)

    def _recover(self) -> None:
        """Clear up after a build that was killed while the new and the old data set changed places."""
        if not self.home.exists(self.name) and self.home.exists(self.replaced):
            self.home.rename(self.replaced, self.name)
        self.home.delete(self.replaced)


def _home_and_name(out: str) -> tuple[str, str]:
    """The folder that `out` lies in, and what it is called there; both are on the disk a link leads to."""
    if "://" in out:
        home, _, name = out.rstrip("/").rpartition("/")
        if home.endswith(":/"):
            raise ConfigError(f"--out must be a folder in a store, and {out} is all of it; name one below")
        return f"{home}/", name
    path = os.path.realpath(os.path.expanduser(out))
    if os.path.commonpath([path, os.getcwd()]) == path:
        raise ConfigError(
            f"--out must be a folder of its own, and '{out}' is the one the command runs in, or holds it; name "
            "another one"
        )
    if os.path.ismount(path):
        raise ConfigError(
            f"--out must be a folder that can be renamed, and {out} is where a disk is mounted; name one below"
        )
    return os.path.split(path)
