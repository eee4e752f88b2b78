"""Who holds a pair, as the ledger keeps it: the highest fencing epoch seen, and the coordinator that showed it."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True, kw_only=True)
class EpochRecord:
    """The highest fencing epoch seen for a pair, and whose it is; empty where that was not told.

    Attributes:
        holder, fingerprint: the first name in that coordinator's certificate, and its SHA-256.
        place: which registry its orders come from; what follows the last # tells it from others.
        run: the run that they are for.
        since_s: when this coordinator first showed an epoch without another in between, seconds since 1970. For people:
            nothing is decided by it.
    """

    pair: str
    epoch: int
    holder: str = ""
    fingerprint: str = ""
    place: str = ""
    run: str = ""
    since_s: float = 0.0

    def is_held_by(self, fingerprint: str, place: str) -> bool:
        """Whether that is the same coordinator: by its registry where both are known, which outlives a certificate,
        else by its certificate."""
        if not self.fingerprint:
            return True
        if self.place and place:
            return self.place.rpartition("#")[2] == place.rpartition("#")[2]
        return self.fingerprint == fingerprint

    @property
    def who(self) -> str:
        """The coordinator in words."""
        name = f"the coordinator {self.holder}" if self.holder else "the coordinator"
        if self.place:
            return f"{name} at {self.place}"
        return f"{name} with the certificate {self.fingerprint[:16]}" if self.fingerprint else "an unknown coordinator"


def epoch_of(records: tuple[EpochRecord, ...], pair: str) -> EpochRecord:
    """The record of that pair; epoch 0 when none was seen."""
    return next((record for record in records if record.pair == pair), EpochRecord(pair=pair, epoch=0))


def with_epoch(records: tuple[EpochRecord, ...], fresh: EpochRecord) -> tuple[EpochRecord, ...]:
    """The records with a higher epoch in it, or with the holder of the same one; a lower one changes nothing."""
    known = epoch_of(records, fresh.pair)
    if fresh.epoch < known.epoch or (fresh.epoch == known.epoch and (known.fingerprint or not fresh.fingerprint)):
        return records
    if known.fingerprint and known.is_held_by(fresh.fingerprint, fresh.place):
        fresh = replace(fresh, since_s=known.since_s)
    return (*(record for record in records if record.pair != fresh.pair), fresh)
