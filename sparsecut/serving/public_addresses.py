"""Which addresses anybody could reach: those in none of IANA's registries of special purposes.

https://www.iana.org/assignments/iana-ipv4-special-registry and iana-ipv6-special-registry. Python's
`ipaddress` has other lists from version to version, so the ranges stand here. Some of them can be
reached from everywhere, but none has images.
"""

from __future__ import annotations

import ipaddress

SPECIAL_IPV4 = tuple(
    ipaddress.ip_network(network)
    for network in (
        "0.0.0.0/8",  # this network
        "10.0.0.0/8",  # private
        "100.64.0.0/10",  # shared by carriers
        "127.0.0.0/8",  # loopback
        "169.254.0.0/16",  # link-local, and the metadata of clouds
        "172.16.0.0/12",  # private
        "192.0.0.0/24",  # IETF protocols
        "192.0.2.0/24",  # documentation
        "192.31.196.0/24",  # AS112
        "192.52.193.0/24",  # AMT
        "192.88.99.0/24",  # relays of 6to4
        "192.168.0.0/16",  # private
        "192.175.48.0/24",  # AS112
        "198.18.0.0/15",  # benchmarks
        "198.51.100.0/24",  # documentation
        "203.0.113.0/24",  # documentation
        "224.0.0.0/4",  # multicast
        "240.0.0.0/4",  # reserved, and broadcast
    )
)
# The IPv6 addresses that anyone may have (RFC 4291, section 2.4). Loopback, private, link-local,
# multicast, discarded, translated and IPv4-compatible addresses, and NAT64, lie outside of them.
GLOBAL_UNICAST = ipaddress.ip_network("2000::/3")
SPECIAL_IPV6 = tuple(
    ipaddress.ip_network(network)
    for network in (
        "2001::/23",  # IETF protocols, Teredo and ORCHID among them
        "2001:db8::/32",  # documentation
        "2002::/16",  # 6to4, which leads to any IPv4 address
        "2620:4f:8000::/48",  # AS112
        "3fff::/20",  # documentation
    )
)
ISATAP = (0x00005EFE, 0x02005EFE)  # the middle of addresses that end in an IPv4 address


def is_public(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    """Whether anybody could reach an address; one that is mapped to IPv4 counts as that."""
    if address.version == 4:
        return not any(address in network for network in SPECIAL_IPV4)
    if address.ipv4_mapped is not None:
        return is_public(address.ipv4_mapped)
    is_special = any(address in network for network in SPECIAL_IPV6)
    is_isatap = (int(address) >> 32) & 0xFFFFFFFF in ISATAP
    return address in GLOBAL_UNICAST and not is_special and not is_isatap
