"""The errors a person meets. Each message says what was required, what was given and what to do."""

import errno


class GrailError(Exception):
    """Base of all errors raised on purpose; the command line prints these without a traceback."""


class ConfigError(GrailError):
    """An option or a combination of options cannot work; names the option by its dotted path."""


class DataError(GrailError):
    """Input data is missing, damaged or of another form than required; names the file, shard or chunk."""


class NobodyHeldOutError(DataError):
    """A split that models are measured on is empty; names the split."""


class PlanError(GrailError):
    """Tables cannot be placed on the given workers as asked; names the table."""


class CheckpointError(GrailError):
    """A checkpoint is missing, damaged or belongs to another model; names the file and what differs."""


class DamagedCheckpointError(CheckpointError):
    """A file of a checkpoint is missing, does not match its checksum or lies on a lost block of its disk; an older
    checkpoint may be intact."""


class MissingRanksError(CheckpointError):
    """Other ranks did not write their part of a checkpoint in time; another start may mend it."""


class DivergenceError(GrailError):
    """A loss or gradient is not finite; names step, rank and the users of the batch."""


class StorageError(GrailError, OSError):
    """A disk is full, or an object store did not answer as it should, however often it was asked."""


class ClusterError(GrailError):
    """Machines or workers are missing, did not start in time, or died too often."""


class LeaseLostError(ClusterError):
    """Another job has taken a run directory over; nothing more may be written to it."""


class MeetingError(ClusterError):
    """The workers of a gang could not all reach each other at its start; another start may mend it."""


class PoolGoneError(ClusterError):
    """A pool has had no member for too long; the work can be taken up again later."""


class RewardError(GrailError):
    """A reward failed, or returned something that is no reward; names the reward and the user."""


_WRONG_PLACE = (errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.EACCES, errno.EPERM, errno.EROFS)


def ours(error: BaseException) -> GrailError | None:
    """The error itself if it was raised on purpose; a full disk, or a path that cannot be used, as such a one.

    None for any other.
    """
    if isinstance(error, GrailError):
        return error
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        place = error.filename or "the run directory or a temporary folder"
        return StorageError(
            f"{place} must have room to write, and the system says: {error.strerror}; make room, then start again "
            "to go on from the latest checkpoint"
        )
    if isinstance(error, OSError) and error.errno in _WRONG_PLACE and error.filename:
        return StorageError(
            f"{error.filename} must be a path that can be used here, and the system says: {error.strerror}; look at "
            "the paths you gave (a file where a folder should be, or the reverse) and at what you may read and write"
        )
    return None
