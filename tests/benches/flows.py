"""Tracked connections for tests/benches/connections.bash, put into this network namespace by ctnetlink, and how long a call
takes beside them.

    flows.py others COUNT      masqueraded ones of a LAN host, by the other uplink
    flows.py stale COUNT       forwarded ones of the address 203.0.113.10, with the mark 10
    flows.py measure COMMAND…  prints the call's milliseconds

The messages are those of linux/netfilter/nfnetlink_conntrack.h.
"""

import os
import socket
import struct
import subprocess
import sys
import time

NEW = 1 << 8
REQUEST, CREATE = 0x1, 0x400
ORIGINAL, REPLY, STATUS, NAT_SRC, TIMEOUT, MARK, NAT_DST = 1, 2, 3, 6, 7, 8, 13
NESTED = 0x8000
UDP = 17


def attribute(kind, value):
    length = 4 + len(value)
    return struct.pack("HH", length, kind) + value + b"\0" * (-length % 4)


def nest(kind, *attributes):
    return attribute(kind | NESTED, b"".join(attributes))


def one_way(kind, source, destination, from_port, to_port):
    ports = [attribute(1, bytes([UDP])), attribute(2, struct.pack(">H", from_port)), attribute(3, struct.pack(">H", to_port))]
    return nest(kind, nest(1, attribute(1, source), attribute(2, destination)), nest(2, *ports))


def others(number):
    """The LAN host asks many servers, and has the other uplink's address there."""
    block, port = divmod(number, 60000)
    server = bytes([198, 18, block >> 8, block & 255])
    host, uplink, port = bytes([192, 168, 0, 3]), bytes([198, 51, 100, 20]), port + 1024
    nat = nest(NAT_SRC, attribute(1, uplink), attribute(2, uplink))
    return one_way(ORIGINAL, host, server, port, 443) + one_way(REPLY, server, host, 443, port) + nat


def stale(number):
    """The client asks the uplink's address, and the LAN's server answers."""
    client, address, server = bytes([192, 0, 2, 9]), bytes([203, 0, 113, 10]), bytes([192, 168, 0, 2])
    port = number + 1024
    nat = nest(NAT_DST, attribute(1, server), attribute(2, server))
    mark = attribute(MARK, struct.pack(">I", 10))
    return one_way(ORIGINAL, client, address, port, 80) + one_way(REPLY, address, client, 80, port) + nat + mark


def add(flow, count):
    netlink = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 12)
    lasting = attribute(TIMEOUT, struct.pack(">I", 36000))
    before = tracked()
    for first in range(0, count, 100):
        messages = []
        for number in range(first, min(first + 100, count)):
            body = struct.pack("BBH", socket.AF_INET, 0, 0) + flow(number) + lasting
            messages.append(struct.pack("IHHII", 16 + len(body), NEW, REQUEST | CREATE, 0, 0) + body)
        netlink.send(b"".join(messages))
    added = tracked() - before
    if added < count * 0.99:
        sys.exit(f"only {added} of {count} connections are tracked: {open('/proc/sys/net/netfilter/nf_conntrack_max').read()}")


def tracked():
    with open("/proc/sys/net/netfilter/nf_conntrack_count", encoding="ascii") as count:
        return int(count.read())


def measure(command):
    began = time.monotonic()
    status = subprocess.run(command, stdout=subprocess.DEVNULL, check=False).returncode
    took = (time.monotonic() - began) * 1000
    if status != 0:
        sys.exit(f"exit status {status}: {' '.join(command)}")
    print(f"{took:.3f}")


match sys.argv[1:]:
    case ["others", count]:
        add(others, int(count))
    case ["stale", count]:
        add(stale, int(count))
    case ["measure", *command]:
        os.environ.pop("RUST_BACKTRACE", None)
        measure(command)
    case _:
        sys.exit(__doc__)
