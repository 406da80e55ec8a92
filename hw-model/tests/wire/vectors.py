#!/usr/bin/env python3
"""RoCEv2 packets made by scapy (contrib/roce), one a line: a name and the whole IP packet. See vectors.txt and vectors.rs.

scapy makes the IP, UDP and base transport headers and the invariant CRC; the extended headers it does not have are packed
here, from the tables of the specification (IBTA volume 1, 9.3; A14.3; A19.3).

usage: vectors.py > vectors.txt, or vectors.py --compare vectors.txt
"""
import struct
import sys
import warnings

warnings.filterwarnings("ignore")
import logging

logging.getLogger("scapy").setLevel(logging.ERROR)
from scapy.contrib.roce import AETH, BTH, cnp
from scapy.layers.inet import IP, UDP
from scapy.layers.inet6 import IPv6
from scapy.packet import Raw

V4 = IP(src="10.0.0.1", dst="10.0.0.2", id=0x1234, flags="DF", ttl=64)
V6 = IPv6(src="fd00::1", dst="fd00::2", fl=0x12345, tc=2, hlim=64)
RETH = struct.pack(">QII", 0x7F0000001234, 0x89ABCDEF, 100000)
ATOMIC = struct.pack(">QIQQ", 0x7F0000001238, 0x89ABCDEF, 0x0102030405060708, 0x1112131415161718)
IMMEDIATE = struct.pack(">I", 0xCAFEF00D)
KEY = struct.pack(">I", 0x89ABCDEF)
DETH = struct.pack(">IBBH", 0x11111111, 0, 0x22, 0x3333)
XRCETH = struct.pack(">BBH", 0, 0x44, 0x5555)


def feth(placement, level):
    return struct.pack(">I", level << 4 | placement)


def aeth(syndrome):
    return bytes(AETH(syndrome=syndrome, msn=0x010203))


def data(length):
    return bytes((at * 31 + at // 251) % 255 + 1 for at in range(length))


def packet(name, opcode, extended=b"", payload=b"", ip=V4, **bth):
    pad = -len(payload) % 4
    fields = dict(opcode=opcode, padcount=pad, migreq=1, dqpn=0x0A0B0C, psn=0xFEDCBA)
    fields.update(bth)
    whole = ip / UDP(sport=0xC123, dport=4791, chksum=0 if ip is V4 else None) / BTH(**fields)
    whole = whole / Raw(extended + payload + bytes(pad))
    return name, bytes(whole)


def vectors():
    yield packet("send-first", 0x00, payload=data(256))
    yield packet("send-middle", 0x01, payload=data(4096))
    yield packet("send-last", 0x02, payload=data(3))
    yield packet("send-last-immediate", 0x03, IMMEDIATE, data(8), solicited=1)
    yield packet("send-only", 0x04, payload=data(5), ackreq=1)
    yield packet("send-only-empty", 0x04)
    yield packet("send-only-immediate", 0x05, IMMEDIATE, data(1))
    yield packet("write-first", 0x06, RETH, data(1024))
    yield packet("write-middle", 0x07, payload=data(1024))
    yield packet("write-last", 0x08, payload=data(2), ackreq=1)
    yield packet("write-last-immediate", 0x09, IMMEDIATE, data(4))
    yield packet("write-only", 0x0A, RETH, data(64), ackreq=1)
    yield packet("write-only-immediate", 0x0B, RETH + IMMEDIATE, data(7))
    yield packet("read-request", 0x0C, RETH, ackreq=1)
    yield packet("read-response-first", 0x0D, aeth(0x1F), data(512))
    yield packet("read-response-middle", 0x0E, payload=data(512))
    yield packet("read-response-last", 0x0F, aeth(0x1F), data(9))
    yield packet("read-response-only", 0x10, aeth(0x1F), data(10))
    yield packet("acknowledge", 0x11, aeth(0x1F))
    yield packet("receiver-not-ready", 0x11, aeth(0x20 | 14))
    yield packet("sequence-error", 0x11, aeth(0x60))
    yield packet("invalid-request", 0x11, aeth(0x61))
    yield packet("remote-access", 0x11, aeth(0x62))
    yield packet("remote-operational", 0x11, aeth(0x63))
    yield packet("atomic-acknowledge", 0x12, aeth(0x1F) + struct.pack(">Q", 0x2122232425262728))
    yield packet("compare-swap", 0x13, ATOMIC, ackreq=1)
    yield packet("fetch-add", 0x14, ATOMIC, ackreq=1)
    yield packet("send-last-invalidate", 0x16, KEY, data(11))
    yield packet("send-only-invalidate", 0x17, KEY, data(12))
    yield packet("flush-range", 0x1C, feth(1, 0) + RETH)
    yield packet("flush-region", 0x1C, feth(3, 1) + RETH)
    yield packet("atomic-write", 0x1D, RETH, data(8))
    yield packet("uc-send-only", 0x24, payload=data(13))
    yield packet("uc-write-first", 0x26, RETH, data(256))
    yield packet("ud-send-only", 0x64, DETH, data(14))
    yield packet("ud-send-only-immediate", 0x65, DETH + IMMEDIATE, data(15))
    yield packet("xrc-write-only", 0xAA, XRCETH + RETH, data(16))
    yield packet("xrc-acknowledge", 0xB1, aeth(0x1F))
    yield packet("v6-write-only", 0x0A, RETH, data(17), ip=V6)
    yield packet("v6-acknowledge", 0x11, aeth(0x1F), ip=V6)
    yield packet("not-migrated-in-another-partition", 0x04, payload=data(4), migreq=0, pkey=0x8001)
    whole = V4 / UDP(sport=0xC123, dport=4791, chksum=0) / cnp(0x0A0B0C)
    yield "congestion", bytes(whole)


def main():
    text = "".join(f"{name} {whole.hex()}\n" for name, whole in vectors())
    if sys.argv[1:2] != ["--compare"]:
        sys.stdout.write(text)
        return 0
    with open(sys.argv[2], encoding="ascii") as file:
        same = file.read() == text
    print("the vectors are what scapy makes" if same else "scapy makes other vectors")
    return 0 if same else 1


sys.exit(main())
