//! Datagrams as fast as they can be sent, one by one in batches (sendmmsg) or as trains (UDP_SEGMENT).
//!
//! Where the server sends, it has to know to whom: the client says hello on each of its sockets, which
//! also opens the NAT's mappings, until data comes.

use std::io::ErrorKind;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::net::sockopt::set_socket_recv_buffer_size;

use super::{MARGIN, Meter, Server, TICK, Task, say};
use crate::cli::bench::case::{Load, Measured};
use crate::sys::mmsg::{self, RECV_BATCH, RecvBatch, SEND_SEGMENTS_MAX, SEND_TRAIN_MAX};
use crate::sys::socket;

const HELLO: &[u8] = b"hello";
/// Receive buffer asked for; the kernel gives what net.core.rmem_max allows.
const RECV_BUFFER_BYTES: usize = 4 * 1024 * 1024;
/// How long the server waits for more sockets to say hello after the first.
const HELLO_TIME: Duration = Duration::from_millis(50);
/// Hellos sent until data comes.
const HELLOS_MAX: usize = 10;
/// Datagrams that one of many flows sends before the next has its turn.
const TURN: usize = 8;

/// Datagrams of sockets that are held, between two pauses.
const HOLD_TURN: usize = 32;

/// How a load is sent.
#[derive(Clone, Copy)]
struct Shape {
    bytes: u16,
    flows: usize,
    trains: bool,
}

impl Shape {
    fn of(load: Load) -> Self {
        match load {
            Load::Udp {
                bytes,
                flows,
                trains,
            } => Self {
                bytes,
                flows,
                trains,
            },
            _ => unreachable!("the caller chose by the load"),
        }
    }

    /// Datagrams of one call.
    fn batch(self) -> usize {
        let trains = SEND_SEGMENTS_MAX.min(SEND_TRAIN_MAX / usize::from(self.bytes));
        match (self.trains, self.flows) {
            (true, _) => trains,
            (false, 1) => RECV_BATCH,
            (false, _) => TURN,
        }
    }
}

pub(super) fn serve(task: Task, at: SocketAddr) -> std::io::Result<Server> {
    let shape = Shape::of(task.load);
    let socket = open(at, shape.trains)?;
    let address = socket.local_addr()?;
    let stop = Arc::new(AtomicBool::new(false));
    let meter = Arc::new(Meter::new(task.time));
    let work = {
        let (stop, meter) = (Arc::clone(&stop), Arc::clone(&meter));
        move || match task.reverse {
            false => receive(&[socket], &meter, || stop.load(Ordering::Relaxed)),
            true => {
                let clients = hear(&socket, shape.flows, &stop);
                let ways: Vec<_> = clients.iter().map(|&to| (&socket, to)).collect();
                drop(send(&ways, shape, task.time));
            }
        }
    };
    Ok(Server {
        at: address,
        stop,
        meter,
        threads: vec![thread::spawn(work)],
    })
}

pub(super) fn run(task: Task, to: SocketAddr) -> Result<Measured, String> {
    let shape = Shape::of(task.load);
    let sockets: Vec<_> = (0..shape.flows)
        .map(|_| open(any(to), shape.trains))
        .collect::<Result<_, _>>()
        .map_err(say)?;
    let meter = Meter::new(task.time);
    if task.reverse {
        for _ in 0..HELLOS_MAX {
            for socket in &sockets {
                socket.send_to(HELLO, to).map_err(say)?;
            }
            let asked = Instant::now();
            receive(&sockets, &meter, || {
                let waits = meter.is_empty() && asked.elapsed() > 4 * HELLO_TIME;
                meter.is_over() || waits
            });
            if !meter.is_empty() {
                break;
            }
        }
    } else {
        let ways: Vec<_> = sockets.iter().map(|socket| (socket, to)).collect();
        send(&ways, shape, task.time).map_err(|error| match (shape.trains, error.kind()) {
            (true, ErrorKind::InvalidInput) => "the kernel cuts no trains here".to_owned(),
            _ => format!("cannot send: {error}"),
        })?;
    }
    Ok(meter.measured())
}

/// Sockets that have sent a datagram each.
pub(super) fn hold(count: usize, to: SocketAddr) -> std::io::Result<Vec<UdpSocket>> {
    let hold = |index: usize| {
        if index.is_multiple_of(HOLD_TURN) {
            // The queues on the way take bursts, but not of everything at once.
            thread::sleep(Duration::from_millis(1));
        }
        let socket = UdpSocket::bind(any(to))?;
        socket.send_to(HELLO, to)?;
        Ok(socket)
    };
    (0..count).map(hold).collect()
}

/// Any address of the same family, any port.
fn any(to: SocketAddr) -> SocketAddr {
    let any: IpAddr = match to {
        SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    (any, 0).into()
}

fn open(at: SocketAddr, trains: bool) -> std::io::Result<UdpSocket> {
    let socket = UdpSocket::bind(at)?;
    let _ = set_socket_recv_buffer_size(&socket, RECV_BUFFER_BYTES);
    if trains {
        // Without it trains arrive as single datagrams.
        let _ = socket::set_udp_gro(socket.as_fd());
    }
    Ok(socket)
}

/// The clients that say hello.
fn hear(socket: &UdpSocket, flows: usize, stop: &AtomicBool) -> Vec<SocketAddr> {
    let mut clients = Vec::new();
    let mut first = None;
    let mut buffer = [0; 64];
    let _ = socket.set_read_timeout(Some(HELLO_TIME));
    while clients.len() < flows
        && !stop.load(Ordering::Relaxed)
        && first.is_none_or(|first: Instant| first.elapsed() < HELLO_TIME)
    {
        if let Ok((_, from)) = socket.recv_from(&mut buffer)
            && !clients.contains(&from)
        {
            clients.push(from);
            first.get_or_insert_with(Instant::now);
        }
    }
    clients
}

/// Sends for the time and a margin, each way in turn.
fn send(ways: &[(&UdpSocket, SocketAddr)], shape: Shape, time: Duration) -> std::io::Result<()> {
    let payload = vec![0x5a; usize::from(shape.bytes) * shape.batch()];
    let end = Instant::now() + time + MARGIN;
    while Instant::now() < end {
        for &(socket, to) in ways {
            let fd = socket.as_fd();
            let sent = match shape.trains {
                true => mmsg::send(fd, (None, to), &payload, Some(shape.bytes)),
                false => mmsg::send_each(fd, (None, to), &payload, shape.bytes),
            };
            match sent {
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    wait(std::slice::from_ref(socket), PollFlags::OUT);
                }
                // A full queue, or an ICMP error about an earlier datagram.
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => thread::yield_now(),
                Err(error) if error.kind() == ErrorKind::ConnectionRefused => {}
                Err(error) => return Err(error),
            }
        }
    }
    Ok(())
}

/// Counts what comes until `is_enough`.
fn receive(sockets: &[UdpSocket], meter: &Meter, is_enough: impl Fn() -> bool) {
    let mut batch = RecvBatch::new();
    let mut ready: Vec<_> = sockets.iter().collect();
    while !is_enough() {
        let mut count = 0;
        for socket in &ready {
            let received = batch.recv(socket.as_fd(), false, |datagram| {
                let len = datagram.payload.len();
                let size = datagram.segment.map_or(len, usize::from).max(1);
                meter.add(len, len.div_ceil(size));
            });
            count += received.unwrap_or(0);
        }
        // One socket is asked until it is empty, many are not asked in vain.
        if count == 0 || sockets.len() > 1 {
            ready = wait(sockets, PollFlags::IN);
        }
    }
}

/// Waits for a tick at most; those that are ready.
fn wait(sockets: &[UdpSocket], flags: PollFlags) -> Vec<&UdpSocket> {
    let mut fds: Vec<_> = sockets
        .iter()
        .map(|socket| PollFd::new(socket, flags))
        .collect();
    let tick = Timespec {
        tv_sec: 0,
        tv_nsec: TICK.as_nanos() as _,
    };
    let _ = rustix::event::poll(&mut fds, Some(&tick));
    let is_ready: Vec<_> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
    let both = sockets.iter().zip(is_ready);
    both.filter_map(|(socket, is_ready)| is_ready.then_some(socket))
        .collect()
}
