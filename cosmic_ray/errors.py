"""The errors that a user can mend: each names the thing, what is wrong with it, and the remedy."""

from __future__ import annotations

import base64
import pickle


class CosmicError(Exception):
    """Base of every error that is the user's to mend; `cosmic-ray` prints it without a traceback and exits 1."""

    exit_code = 1

    def __reduce__(self) -> tuple:
        # Pickled as class and message by default; these take other arguments, and come back from other processes.
        return _restored, (type(self), self.args, self.__dict__)


def _restored(kind: type[CosmicError], args: tuple, facts: dict) -> CosmicError:
    error = kind.__new__(kind, *args)
    error.__dict__.update(facts)
    return error


def packed(error: CosmicError) -> str:
    """An error as text, for a task of a Ray cluster to return: raised there, Ray would bury it in one of its own."""
    return base64.b64encode(pickle.dumps(error)).decode()


def unpacked(text: str) -> CosmicError:
    """The error that `packed` made `text` of, with its type, text and facts. Only for what one's own tasks return."""
    return pickle.loads(base64.b64decode(text))


class JobError(CosmicError):
    """A job that must not start: an unknown or ill-typed key, a missing input, too few resources. Exits 2."""

    exit_code = 2

    def __init__(self, key: str, value: object, problem: str, remedy: str = ""):
        self.key, self.value, self.problem, self.remedy = key, value, problem, remedy
        shown = "" if value is _ABSENT else f" = {value!r}"
        super().__init__(f"{key}{shown}: {problem}" + (f" ({remedy})" if remedy else ""))


class JobErrors(JobError):
    """Several `JobError`s found at once, one a line."""

    def __init__(self, errors: list[JobError]):
        self.errors = errors
        Exception.__init__(self, "\n".join(str(error) for error in errors))


class DataError(CosmicError):
    """Stored data that cannot be trusted or read: names the URI and what is wrong."""

    def __init__(self, uri: str, problem: str, remedy: str = ""):
        self.uri, self.problem, self.remedy = uri, problem, remedy
        super().__init__(f"{uri}: {problem}" + (f" ({remedy})" if remedy else ""))


class NotFoundError(DataError):
    """Nothing is stored at this URI."""


class DamagedError(DataError):
    """What is stored at this URI is not what was written."""


class FencedError(CosmicError):
    """Another live run holds this output."""


class _Absent:
    def __repr__(self) -> str:
        return "absent"


_ABSENT = _Absent()
ABSENT: object = _ABSENT
