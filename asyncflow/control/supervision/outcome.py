"""The outcome of a failed run: all of its errors as one text and one exit code. Pure."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from asyncflow.control.admission.staleness import StalenessExceeded
from asyncflow.control.store.ledger import LedgerError
from asyncflow.control.store.storage import StorageFailed
from asyncflow.services.channels.endpoint import ServiceError, ServiceGone, causes
from asyncflow.services.weight_sync import PublicationFailed
from protocols.control.errors import RunFailed


class TrainerGone(ServiceGone):
    """The process of a service with trained state is gone."""

    def __init__(self, service: str, cause: str) -> None:
        super().__init__(cause)
        self.service = service


class Outcome(msgspec.Struct, frozen=True):
    """What a run's errors mean for its end."""

    exit_code: int
    text: str
    unexpected: bool
    may_follow_a_death: bool  # each error can be what a service's death led to


def outcome_of(error: BaseException) -> Outcome:
    """One outcome for all errors of a run: it names every cause; a violated invariant decides the exit code."""
    leaves = list(leaves_of(error))
    broken = any(isinstance(e, LedgerError | StalenessExceeded) for e in leaves)
    unexpected = any(not isinstance(e, _FORESEEN) for e in leaves)
    prefix = "an invariant is broken: " if broken else "unexpected, see logs/controller.log: " if unexpected else ""
    texts = dict.fromkeys(str(e) if isinstance(e, _FORESEEN) else causes(e) for e in leaves)
    follows = all(isinstance(e, RunFailed | ServiceError | PublicationFailed) for e in leaves)
    return Outcome(3 if broken else 1, prefix + "; ".join(texts), unexpected, follows)


_FORESEEN = (RunFailed, ServiceError, PublicationFailed, LedgerError, StalenessExceeded, StorageFailed)


def leaves_of(error: BaseException) -> Iterator[BaseException]:
    """The errors in an exception group, at any depth; else the error itself."""
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from leaves_of(inner)
    else:
        yield error
