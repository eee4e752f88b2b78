"""How many TLS connections ("lanes") one disk should get. Pure."""

from __future__ import annotations

import math

CORES_A_LANE = 2
"""A lane at full speed keeps nearly a core busy on each side with TLS and TCP; reading, hashing and proving what it
carries wants as much again."""

MOST_LANES_FOR_SPEED = 4
"""At about 1 GB/s each they fill 25 Gbit/s (3.1 GB/s); beyond that the disks, not the lanes, are in the way."""

IN_FLIGHT_BYTES = 2.8e6
"""What one connection keeps on its way with the kernel's default buffers (``tcp_wmem`` up to 4 MB): measured as
226 Mbit/s at a round trip of 100 ms. `protocol.link` raises it where it may; here it is not counted on."""

LONG_LINK_BYTES_PER_S = 125e6
"""1 Gbit/s: what a link over long distance is taken to carry, as its rate is not known beforehand."""


def lanes_wanted(rtt_s: float, cores: int, most: int) -> int:
    """How many connections one disk should get, from 1 to `most`.

    One where a single TLS thread on each side is all that the cores give; more on hosts with many cores; and as many as
    it takes to have 1 Gbit/s on its way where round trips are long, whatever the cores, since those lanes mostly wait.

    Args:
        rtt_s: round trip time of the path (`LinkFacts.rtt_s` of the first connection), seconds.
        cores: of the weaker host, or of ours where the other's are not known.
        most: the budget, at least 1.
    """
    for_cores = min(cores // CORES_A_LANE, MOST_LANES_FOR_SPEED)
    for_distance = math.ceil(rtt_s * LONG_LINK_BYTES_PER_S / IN_FLIGHT_BYTES)
    return max(1, min(most, max(for_cores, for_distance)))
