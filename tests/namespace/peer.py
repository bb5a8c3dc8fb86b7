"""The peers of the namespace tests: small servers and clients that do one thing and say what they saw.

Each prints `@@LANLET key=value` lines, which the tests read. A socket call that the tests expect to
fail is reported by its errno name, never as a traceback.
"""

import collections
import errno
import hashlib
import os
import resource
import select
import socket
import struct
import subprocess
import sys
import time

BLOCK = 256 * 1024
ETH_P_IP, ETH_P_ALL = 0x0800, 0x0003


def say(**words):
    # In one piece: others write there too.
    sys.stdout.write(" ".join(["@@LANLET", *(f"{key}={value}" for key, value in words.items())]) + "\n")
    sys.stdout.flush()


def name(error):
    return "timeout" if isinstance(error, TimeoutError) else errno.errorcode.get(error.errno, error.errno)


def family(host):
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def listen(port, backlog=4096):
    """For both families."""
    return socket.create_server(("::", port), family=socket.AF_INET6, backlog=backlog, dualstack_ipv6=True)


def connect(host, port, timeout=15.0, receive_buffer=0):
    client = socket.socket(family(host))
    client.settimeout(timeout)
    if receive_buffer:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    client.connect((host, port))
    return client


def read_to_end(connection, slow=False):
    """The bytes until the peer's FIN. Slowly: in small pieces with a pause after each."""
    pieces = []
    while piece := connection.recv(32 * 1024 if slow else BLOCK):
        pieces.append(piece)
        if slow:
            time.sleep(0.001)
    return b"".join(pieces)


def sha(data):
    return hashlib.sha256(data).hexdigest()[:32]


def try_connect(host, port, timeout="3"):
    """connect(): its errno by name and how long it took; `connected` if it succeeded."""
    start = time.monotonic()
    try:
        connect(host, int(port), float(timeout)).close()
        result = "connected"
    except OSError as error:
        result = name(error)
    say(result=result, ms=round((time.monotonic() - start) * 1000))


def watch(*command):
    """Runs a command, and says what eth0 saw meanwhile: TCP segments by their flags, and ICMP errors
    with the type, code and port of the packet they are about. (tcpdump wants to change its groups,
    which a user namespace of one user forbids.)"""
    sniffer = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, 0)
    sniffer.bind(("eth0", ETH_P_ALL))
    subprocess.run(command, check=False)
    time.sleep(0.2)
    sniffer.setblocking(False)
    flags, errors = collections.Counter(), []
    try:
        while True:
            packet, (_, ethertype, *_) = sniffer.recvfrom(65536)
            if ethertype != ETH_P_IP:
                continue
            body = packet[(packet[0] & 15) * 4 :]
            if packet[9] == socket.IPPROTO_TCP:
                flags[{2: "syn", 18: "syn_ack", 4: "rst", 20: "rst_ack"}.get(body[13], "other")] += 1
            elif packet[9] == socket.IPPROTO_ICMP and body[0] in (3, 11):
                about = body[8 + (body[8] & 15) * 4 :]
                sound = checksum(body) == 0 and checksum(packet[: (packet[0] & 15) * 4]) == 0
                port = struct.unpack(">H", about[2:4])[0]
                errors.append(f"{body[0]}/{body[1]}:{port}" + ("" if sound else ":bad_checksum"))
    except BlockingIOError:
        pass
    say(icmp=",".join(errors) or "none", **{key: flags[key] for key in ("syn", "syn_ack", "rst_ack", "other")})


def checksum(data):
    total = sum(struct.unpack(f">{(len(data) + 1) // 2}H", data + b"\0" * (len(data) % 2)))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


# Half-close. `slow` reads slowly through a small receive buffer.


def serve_answer_after_end(port, slow=""):
    """Reads to the client's FIN, then sends everything back: for any number of clients, in turn."""
    server = listen(int(port))
    if slow:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16 * 1024)
    while True:
        connection, _ = server.accept()
        with connection:
            connection.sendall(read_to_end(connection, bool(slow)))


def serve_count(port):
    """Reads one client to its end, slowly, and says how much came."""
    server = listen(int(port))
    server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16 * 1024)
    connection, _ = server.accept()
    try:
        say(count=len(read_to_end(connection, True)))
    except OSError as error:
        say(count=name(error))


def send_then_read(host, port, path, slow=""):
    """Sends a file and a FIN, then reads to the server's FIN."""
    data = open(path, "rb").read()
    with connect(host, int(port), receive_buffer=16 * 1024 if slow else 0) as client:
        client.sendall(data)
        client.shutdown(socket.SHUT_WR)
        say(sent=sha(data), received=sha(read_to_end(client, bool(slow))))


def serve_end_first(port, path, slow=""):
    """Sends a file and a FIN, then reads to the client's FIN: one client."""
    server = listen(int(port))
    if slow:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16 * 1024)
    connection, _ = server.accept()
    connection.settimeout(15)
    data = open(path, "rb").read()
    connection.sendall(data)
    connection.shutdown(socket.SHUT_WR)
    say(server_sent=sha(data), server_received=sha(read_to_end(connection, bool(slow))))


def read_then_send(host, port, path, slow=""):
    """Reads to the server's FIN, and only then sends a file."""
    data = open(path, "rb").read()
    with connect(host, int(port), receive_buffer=16 * 1024 if slow else 0) as client:
        received = read_to_end(client, bool(slow))
        client.sendall(data)
        client.shutdown(socket.SHUT_WR)
        say(client_sent=sha(data), client_received=sha(received))


# Ends that come early.


def serve_no_reading(port):
    """Accepts one client, says so, and never reads."""
    connection, _ = listen(int(port)).accept()
    say(accepted=1)
    time.sleep(60)
    connection.close()


def serve_flood(port):
    """Sends to one client without end; says how that ended."""
    connection, _ = listen(int(port)).accept()
    flood_to(connection)


def flood(host, port):
    """Sends to a server without end; says how that ended."""
    flood_to(connect(host, int(port)))


def flood_to(connection):
    say(flooding=1)
    connection.settimeout(15)
    try:
        while True:
            connection.sendall(bytes(BLOCK))
    except OSError as error:
        say(ended=name(error), at=round(time.monotonic() * 1000))


def hold(host, port):
    """Connects, waits for a first byte, reads no more and stays."""
    client = connect(host, int(port))
    client.recv(1)
    say(holding=1)
    time.sleep(60)


def serve_stalled(port, count):
    """Accepts clients and neither reads nor sends, until a line says so: then it reads all to their end."""
    raise_file_limit()
    server = listen(int(port))
    connections = [server.accept()[0] for _ in range(int(count))]
    say(accepted=len(connections))
    sys.stdin.readline()
    total = 0
    for connection in connections:
        connection.settimeout(30)
        while data := connection.recv(BLOCK):
            total += len(data)
    say(read=total)


def fill(host, port, count):
    """Opens connections and sends by each as much as is taken within a while; ends them when a line says so."""
    raise_file_limit()
    clients = [connect(host, int(port)) for _ in range(int(count))]
    sent, idle = 0, time.monotonic()
    for client in clients:
        client.setblocking(False)
    while time.monotonic() < idle + 2:
        for client in clients:
            try:
                sent += client.send(bytes(65536))
                idle = time.monotonic()
            except BlockingIOError:
                pass
        time.sleep(0.01)
    say(filled=sent)
    sys.stdin.readline()
    for client in clients:
        client.shutdown(socket.SHUT_WR)
    say(sent=sent)
    time.sleep(60)


# UDP.


def serve_udp_echo(*ports):
    poll = select.epoll()
    sockets = {}
    for port in ports:
        server = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
        server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
        server.bind(("::", int(port)))
        server.setblocking(False)
        sockets[server.fileno()] = server
        poll.register(server, select.EPOLLIN)
    while True:
        for fd, _ in poll.poll():
            server = sockets[fd]
            try:
                while True:
                    data, peer = server.recvmsg(65536)[::3]
                    server.sendto(data, peer)
            except BlockingIOError:
                pass


def udp_sizes(host, port, *sizes):
    """One datagram of each size from one socket; the sizes that came back unharmed."""
    client = socket.socket(family(host), socket.SOCK_DGRAM)
    client.settimeout(3)
    client.connect((host, int(port)))
    unharmed = []
    for size in map(int, sizes):
        data = os.urandom(size)
        client.send(data)
        try:
            if client.recv(65536) == data:
                unharmed.append(str(size))
        except OSError as error:
            unharmed.append(name(error))
    say(sizes=",".join(unharmed))


def udp_peers(host, first, count, sockets):
    """From each of some sockets one datagram to each of many servers; how many answers came, each
    from the server and to the socket that it belongs to."""
    first, count = int(first), int(count)
    right = wrong = 0
    clients = [socket.socket(family(host), socket.SOCK_DGRAM) for _ in range(int(sockets))]
    for index, client in enumerate(clients):
        client.settimeout(3)
        for port in range(first, first + count):
            client.sendto(struct.pack(">HH", index, port), (host, port))
        try:
            for _ in range(count):
                data, (address, port, *_) = client.recvfrom(64)
                belongs = address == host and struct.unpack(">HH", data) == (index, port)
                right, wrong = right + belongs, wrong + (not belongs)
        except TimeoutError:
            pass
    say(right=right, wrong=wrong)


def udp_refused(host, port):
    """A datagram to a closed port: what the socket hears of it."""
    client = socket.socket(family(host), socket.SOCK_DGRAM)
    client.settimeout(3)
    client.connect((host, int(port)))
    client.send(b"x")
    try:
        client.recv(64)
        say(udp="answered")
    except OSError as error:
        say(udp=name(error))


# Many flows.


def raise_file_limit():
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def serve_echo(port):
    """Echoes for any number of clients at once."""
    raise_file_limit()
    server = listen(int(port))
    server.setblocking(False)
    poll = select.epoll()
    poll.register(server, select.EPOLLIN)
    connections = {}
    while True:
        for fd, _ in poll.poll():
            if fd == server.fileno():
                accept_all(server, connections, poll)
                continue
            connection = connections[fd]
            try:
                data = connection.recv(BLOCK)
                connection.sendall(data)
            except ConnectionError:
                data = b""
            if not data:
                poll.unregister(fd)
                connections.pop(fd).close()


def accept_all(server, connections, poll):
    try:
        while True:
            connection, _ = server.accept()
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connections[connection.fileno()] = connection
            poll.register(connection, select.EPOLLIN)
    except BlockingIOError:
        pass


MESSAGE = 64


def many_flows(host, port, *commands):
    """Opens and uses many flows as the lines on standard input ask: `open N`, `trips N` (round trips
    over all flows in turn, ten under way at a time), `close`. Each is answered when it is done."""
    raise_file_limit()
    flows = []
    for line in sys.stdin:
        command, _, count = line.strip().partition(" ")
        start = time.monotonic()
        if command == "open":
            flows += open_flows(host, int(port), int(count))
            say(open=len(flows), secs=round(time.monotonic() - start, 2))
        elif command == "trips":
            say(trips=trips(flows, int(count)), secs=round(time.monotonic() - start, 2))
        elif command == "close":
            for flow in flows:
                flow.close()
            flows = []
            say(closed=1)


def open_flows(host, port, count, at_once=200):
    """Connects `count` sockets, some at a time; those that connected."""
    poll = select.epoll()
    pending, opened = {}, []
    for index in range(count):
        flow = socket.socket(family(host))
        flow.setblocking(False)
        flow.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        flow.connect_ex((host, port))
        pending[flow.fileno()] = flow
        poll.register(flow, select.EPOLLOUT)
        while len(pending) >= at_once or (pending and index == count - 1):
            ready = poll.poll(20)
            if not ready:
                return opened
            for fd, _ in ready:
                poll.unregister(fd)
                flow = pending.pop(fd)
                if flow.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0:
                    opened.append(flow)
    return opened


def trips(flows, count, at_once=10):
    """Requests and their right answers over all flows in turn; how many."""
    poll = select.epoll()
    idle = collections.deque(flows)
    under_way, done, started = {}, 0, 0
    while done < count:
        while started < count and idle and len(under_way) < at_once:
            flow = idle.popleft()
            request = struct.pack(">Q", started) * (MESSAGE // 8)
            flow.send(request)
            under_way[flow.fileno()] = (flow, request)
            poll.register(flow, select.EPOLLIN)
            started += 1
        ready = poll.poll(10)
        if not ready:
            return done
        for fd, _ in ready:
            flow, request = under_way.pop(fd)
            poll.unregister(fd)
            if flow.recv(4096) != request:
                return done
            idle.append(flow)
            done += 1
    return done


def tap_station():
    """A VMM's guest as small as can be: on the tap of LANLET_FD, 192.168.122.250 answers ARP and ping."""
    tap = int(os.environ["LANLET_FD"])
    mac = bytes.fromhex(os.environ["LANLET_MAC"].replace(":", ""))
    address = socket.inet_aton("192.168.122.250")
    print("ready", flush=True)
    while select.select([tap], [], []):
        frame = os.read(tap, 70_000)[12:]
        sender, kind, packet = frame[6:12], frame[12:14], frame[14:]
        if kind == b"\x08\x06" and packet[6:8] == b"\0\x01" and packet[24:28] == address:
            answer = packet[:6] + b"\0\x02" + mac + address + packet[8:18]
        elif kind == b"\x08\0" and packet[9] == 1 and packet[16:20] == address and packet[20] == 8:
            echo = bytearray(packet[20:])
            echo[0:4] = bytes(4)
            echo[2:4] = struct.pack(">H", checksum(echo))
            answer = packet[:12] + address + packet[12:16] + echo
        else:
            continue
        os.write(tap, bytes(12) + sender + mac + kind + answer)


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
