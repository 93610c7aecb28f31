"""Before the first step all ranks compare what must be the same on each; one rank's mistake would be silent, or hang the others."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from src.parallel.communicator import Communicator
from src.utils.errors import UserError

_SHOWN = 60


def agree(communicator: Communicator, facts: Mapping[str, Any], remedy: str = "start all of them with the same command on the same data",
          ) -> None:
    """Compare {what: value} over all ranks. Every rank must call it, with JSON-serialisable values.

    Args:
        remedy: what to do about a difference.

    Raises:
        UserError: on every rank, if a value differs between ranks; names it, the values, their ranks and, if there are several,
            their hosts.
    """
    every = communicator.gather(dict(facts))
    for what in dict.fromkeys(name for of_rank in every for name in of_rank):
        ranks: dict[str, list[int]] = {}
        for rank, of_rank in enumerate(every):
            ranks.setdefault(_text(of_rank, what), []).append(rank)
        if len(ranks) > 1:
            values = " and ".join(f"{what}={_shortened(text)} on {_named(found, communicator.hosts)}" for text, found in ranks.items())
            raise UserError(f"the ranks do not agree: {values}; {remedy}")


def _text(facts: Mapping[str, Any], what: str) -> str:
    return json.dumps(facts[what], ensure_ascii=False) if what in facts else "(nothing)"


def _shortened(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _named(ranks: list[int], hosts: Sequence[str]) -> str:
    shown = ", ".join(map(str, ranks[:4])) + (" ..." if len(ranks) > 4 else "")
    where = f" ({', '.join(dict.fromkeys(hosts[rank] for rank in ranks))})" if len(set(hosts)) > 1 else ""
    return (f"rank {shown}" if len(ranks) == 1 else f"ranks {shown}") + where
