"""The package's exceptions: each is one sentence that says what is wrong and what to do."""


class PocketError(ValueError):
    """Bad input or an unmet request. The message is one sentence a user can act on."""


class CheckpointError(PocketError):
    """A checkpoint folder is missing, damaged, tampered with or of an unknown format version."""
