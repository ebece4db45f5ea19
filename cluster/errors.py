"""The errors a person meets. Each message says what was required, what was given and what to do."""


class GrailError(Exception):
    """Base of all errors raised on purpose; the command line prints these without a traceback."""


class ConfigError(GrailError):
    """An option or a combination of options cannot work; names the option by its dotted path."""


class DataError(GrailError):
    """Input data is missing, damaged or of another form than required; names the file, shard or chunk."""


class PlanError(GrailError):
    """Tables cannot be placed on the given workers as asked; names the table."""


class CheckpointError(GrailError):
    """A checkpoint is missing, damaged or belongs to another model; names the file and what differs."""


class DamagedCheckpointError(CheckpointError):
    """A file of a checkpoint is missing or does not match its checksum; an older checkpoint may be intact."""


class DivergenceError(GrailError):
    """A loss or gradient is not finite; names step, rank and the users of the batch."""


class StorageError(GrailError, OSError):
    """An object store did not answer, or not as it should, however often it was asked; names the address."""


class ClusterError(GrailError):
    """Machines or workers are missing, did not start in time, or died too often."""
