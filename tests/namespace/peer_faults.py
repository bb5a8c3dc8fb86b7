"""The peers that misbehave, or come in crowds: as peer.py, whose functions they use."""

import collections
import errno
import os
import select
import socket
import struct
import sys
import threading
import time

import peer
from peer import BLOCK, connect, family, listen, name, say, sha

UDP_SEGMENT, UDP_GRO = 103, 104


# A crowd.


def serve_crowd(port, count):
    """An HTTP server that answers nobody until `count` clients wait together, or no more of them come."""
    peer.raise_file_limit()
    server = listen(int(port))
    server.settimeout(40)
    waiting = []
    try:
        while len(waiting) < int(count):
            connection, _ = server.accept()
            connection.settimeout(10)
            waiting.append(connection)
    except TimeoutError:
        pass
    say(waiting=len(waiting))
    for number, connection in enumerate(waiting):
        request = b""
        while b"\r\n\r\n" not in request and (piece := connection.recv(4096)):
            request += piece
        body = f"{number}\n".encode() * 100
        connection.sendall(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
        connection.close()


# Servers that fail.


def serve_faulty(port, how, count="1"):
    """Fails `count` clients in turn: `reset` reads a little and resets, `stall` waits for the file `go`
    before it reads to the end and says what came, `half` ends its side at once and then does so."""
    server = listen(int(port))
    server.settimeout(40)
    threads = []
    for _ in range(int(count)):
        try:
            connection, _ = server.accept()
        except TimeoutError:
            say(arrived="nobody")
            break
        threads.append(threading.Thread(target=fail, args=(connection, how)))
        threads[-1].start()
    for thread in threads:
        thread.join()


def fail(connection, how):
    if how == "reset":
        connection.recv(BLOCK)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.close()
        return
    if how == "half":
        connection.shutdown(socket.SHUT_WR)
    if how == "stall":
        await_file("go")
    connection.settimeout(30)
    try:
        say(arrived=sha(peer.read_to_end(connection)))
    except OSError as error:
        say(arrived=name(error))
    connection.close()


def await_file(path):
    while not os.path.exists(path):
        time.sleep(0.02)


def send_file(host, port, path, count="1"):
    """Sends a file over `count` connections at once; each says how that ended."""
    data = open(path, "rb").read()

    def send():
        try:
            with connect(host, int(port), 40.0) as client:
                client.sendall(data)
                client.shutdown(socket.SHUT_WR)
                rest = peer.read_to_end(client)
            say(sent=sha(data), rest=len(rest))
        except OSError as error:
            say(sent=name(error))

    threads = [threading.Thread(target=send) for _ in range(int(count))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def serve_file(port, path):
    """Sends a file to any number of clients at once, and ends each connection when it has ended."""
    data = open(path, "rb").read()
    server = listen(int(port))

    def serve(connection):
        try:
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
            peer.read_to_end(connection)
        except OSError:
            pass
        connection.close()

    while True:
        connection, _ = server.accept()
        threading.Thread(target=serve, args=(connection,), daemon=True).start()


def read_file(host, port, count="1", first="", go=""):
    """Reads to the end over `count` connections at once, each after a first piece only when the file
    `go` is there; what each got."""

    def read():
        try:
            with connect(host, int(port), 40.0, 16 * 1024 if go else 0) as client:
                data = b""
                if go:
                    data = client.recv(1)
                    say(**{first: 1})
                    await_file(go)
                data += peer.read_to_end(client)
            say(got=sha(data))
        except OSError as error:
            say(got=name(error))

    threads = [threading.Thread(target=read) for _ in range(int(count))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def trickle(host, port, proto="tcp"):
    """A request and its answer every tenth of a second to an echo server, until it fails or the file
    `enough` is there; says how many came, and how it ended. A datagram that is lost is no end."""
    kind = socket.SOCK_STREAM if proto == "tcp" else socket.SOCK_DGRAM
    client = socket.socket(family(host), kind)
    client.settimeout(20.0 if proto == "tcp" else 0.5)
    client.connect((host, int(port)))
    answers, ended = 0, "enough"
    say(trickling=proto)
    while not os.path.exists("enough"):
        try:
            client.send(b"%08d" % answers)
            if not client.recv(64):
                ended = "closed"
                break
            answers += 1
        except TimeoutError:
            if proto == "tcp":
                ended = "timeout"
                break
        except OSError as error:
            # An ICMP error that a datagram met is told once, and is no end either.
            if proto == "tcp":
                ended = name(error)
                break
        with open(f"answers.{proto}", "w", encoding="utf-8") as file:
            file.write(str(answers))
        time.sleep(0.1)
    say(**{f"{proto}_ended": ended, f"{proto}_answers": answers})


def udp_error(host, port):
    """A datagram, and the ICMP error that comes of it: every one, not only those that end a connection
    (IP_RECVERR, IPV6_RECVERR)."""
    client = socket.socket(family(host), socket.SOCK_DGRAM)
    client.setsockopt(*((socket.IPPROTO_IPV6, 25, 1) if ":" in host else (socket.IPPROTO_IP, 11, 1)))
    client.settimeout(3)
    try:
        client.connect((host, int(port)))
        client.send(b"x")
        client.recv(64)
        say(udp="answered")
    except OSError as error:
        say(udp=name(error))


# Many files.


def crowd_of_flows(host, port, count):
    """Opens `count` flows at once, says how many are open and how many refused or unanswered when nothing has
    come for five seconds, and uses those that are open; closes them when the file `close` is there, and stays."""
    peer.raise_file_limit()
    flows, refused, waiting = [], collections.Counter(), select.poll()
    begun = {}
    for _ in range(int(count)):
        flow = socket.socket(family(host), socket.SOCK_STREAM)
        flow.setblocking(False)
        flow.connect_ex((host, int(port)))
        begun[flow.fileno()] = flow
        waiting.register(flow, select.POLLOUT)
    while events := waiting.poll(5000):
        for number, _ in events:
            waiting.unregister(number)
            flow = begun.pop(number)
            if error := flow.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                refused[errno.errorcode[error]] += 1
            else:
                flow.settimeout(5)
                flows.append(flow)
    refused["unanswered"] = len(begun)
    begun.clear()
    right = 0
    for number, flow in enumerate(flows):
        try:
            flow.sendall(b"%08d" % number)
            right += flow.recv(64) == b"%08d" % number
        except OSError:
            pass
    say(open=len(flows), right=right, refused=sum(refused.values()), how=",".join(sorted(refused)) or "none")
    await_file("close")
    for flow in flows:
        flow.close()
    say(closed=1)
    time.sleep(60)


# Datagrams in bulk.


def serve_bulk(port, segment):
    """Counts datagrams by whether they are of the size and number that they say; reports when asked
    by a datagram `report`. With UDP_GRO, as QUIC servers have it."""
    server = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
    server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8 << 20)
    server.setsockopt(socket.SOL_UDP, UDP_GRO, 1)
    server.bind(("::", int(port)))
    seen, wrong, merged, size = set(), 0, 0, int(segment)
    while True:
        data, extra, _, source = server.recvmsg(65536, 64)
        if data == b"report":
            server.sendto(f"{len(seen)} {wrong} {merged}".encode(), source)
            seen, wrong, merged = set(), 0, 0
            continue
        step = size
        for level, kind, value in extra:
            if (level, kind) == (socket.SOL_UDP, UDP_GRO):
                step = struct.unpack("i", value)[0]
                merged += len(data) > step
        for start in range(0, len(data), step):
            piece = data[start : start + step]
            number = struct.unpack(">I", piece[:4])[0]
            if piece != pattern(number, size):
                wrong += 1
            seen.add(number)


def pattern(number, size):
    return struct.pack(">I", number) * (size // 4)


def send_bulk(host, port, segment, count, at_once):
    """Sends numbered datagrams, `at_once` of them per call by UDP_SEGMENT (1: without it), slowly enough
    that nobody has to lose any; what the server saw of them."""
    size, at_once = int(segment), int(at_once)
    client = socket.socket(family(host), socket.SOCK_DGRAM)
    client.settimeout(5)
    client.connect((host, int(port)))
    if at_once > 1:
        client.setsockopt(socket.SOL_UDP, UDP_SEGMENT, size)
    for first in range(0, int(count), at_once):
        client.send(b"".join(pattern(number, size) for number in range(first, min(first + at_once, int(count)))))
        time.sleep(0.0005)
    time.sleep(0.5)
    client.setsockopt(socket.SOL_UDP, UDP_SEGMENT, 0)
    client.send(b"report")
    seen, wrong, merged = client.recv(64).decode().split()
    say(seen=seen, wrong=wrong, merged=merged)


# A flood.


def flood_syn(gateway_mac, source, target, secs, rate):
    """SYNs as fast as asked, to ever other ports and addresses (the last byte) of `target`, from ever
    other ports of `source`; how many went out, and at what rate."""
    interface = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    interface.bind(("eth0", 0))
    own_mac = bytes.fromhex(open("/sys/class/net/eth0/address", encoding="ascii").read().strip().replace(":", ""))
    ethernet = bytes.fromhex(gateway_mac.replace(":", "")) + own_mac + b"\x08\x00"
    source, target = socket.inet_aton(source), socket.inet_aton(target)
    frames = []
    for number in range(20_000):
        to = target[:3] + bytes([target[3] + number % 30])
        head = struct.pack(">BBHHHBBH4s4s", 0x45, 0, 40, 0, 0x4000, 64, 6, 0, source, to)
        head = head[:10] + struct.pack(">H", peer.checksum(head)) + head[12:]
        ports = (1024 + number * 7 % 64_000, 1 + number % 1000)
        tcp = struct.pack(">HHIIBBHHH", *ports, number, 0, 0x50, 2, 64240, 0, 0)
        pseudo = source + to + struct.pack(">HH", 6, len(tcp))
        tcp = tcp[:16] + struct.pack(">H", peer.checksum(pseudo + tcp)) + tcp[18:]
        frames.append(ethernet + head + tcp)
    start, sent, send = time.monotonic(), 0, interface.send
    say(flooding=1)
    while (elapsed := time.monotonic() - start) < float(secs):
        ahead = sent - elapsed * int(rate)
        if ahead > 0:
            time.sleep(ahead / int(rate))
        for frame in frames[sent % len(frames) :][:500]:
            try:
                send(frame)
            except OSError:
                select.select([], [], [], 0.0001)  # the queue is full
        sent += 500
    say(syns=sent, rate=round(sent / (time.monotonic() - start)))


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
