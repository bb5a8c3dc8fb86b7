//! Guests' connections for DNS over TCP (RFC 7766).
//!
//! # Path
//! The NAT joins a guest's flow to the gateway's port 53 with one end of a socket pair; the other end
//! comes here with the guest's identity. Its task reads queries by their length prefix, checks each as
//! one over UDP is checked, and writes the answers as they come: a client may send several queries at
//! once and gets the answers in any order (RFC 7766 6.2.1.1, 7).
//!
//! # Ends
//! The guest's end of stream, after the answers that are under way; [`IDLE_TIMEOUT`] without a whole
//! query while none is under way; an answer that is not taken within [`WRITE_TIMEOUT`]; what can't be
//! a query: a message without a header, or a response.
//!
//! # Limits
//! Connections: [`STREAMS_MAX`] in total, [`STREAMS_PER_PORT_MAX`] of a port,
//! [`STREAMS_PER_ADDRESS_MAX`] of an address behind it; one more is closed and counted. Queries under
//! way: [`PIPELINE_MAX`] of a connection, [`STREAM_QUERIES_PER_PORT_MAX`] of a port,
//! [`STREAM_QUERIES_MAX`] in total; a query counts until its answer is written, so these bound the
//! memory of answers that nobody reads. What is above them waits: a connection's further queries stay
//! unread, and the guest's own TCP window fills.
//!
//! # What a hostile guest can try
//! Never finish a query, or trickle it: only whole queries put off the timeout. Never read: the
//! timeout for writes. A huge length: nothing is reserved for it, the query is answered FORMERR and
//! skipped as it comes. Ask and go away: the queries end when the first answer can't be written, and
//! until then count as the port's.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use bytes::Bytes;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until, timeout};

use super::upstream::{Asker, framed};
use super::{Counters, Service};
use crate::frame::PortId;
use crate::gateway::dns::message::{self, HEADER_LEN, QUERY_LEN_MAX, Query, QueryError, Rcode};

/// Connections at once: each holds two fds of the process, and 256 clients that keep one open are a
/// large LAN.
pub const STREAMS_MAX: usize = 256;
/// Of one port, while as many are free.
pub const STREAMS_PER_PORT_MAX: usize = 56;
/// Of one address: RFC 7766 6.2.2 asks clients for one; programs that each bring their own resolver
/// open some. Below a port's share, so that one guest behind a port leaves room for the next.
pub const STREAMS_PER_ADDRESS_MAX: usize = 32;
const _: () = assert!(STREAMS_PER_PORT_MAX * 4 < STREAMS_MAX);
const _: () = assert!(STREAMS_PER_ADDRESS_MAX < STREAMS_PER_PORT_MAX);
/// Queries of one connection under way: what a stub resolver pipelines (an A and an AAAA for each of
/// a few names), and more only wait.
pub const PIPELINE_MAX: usize = 16;
/// Queries of all connections under way. With the longest answers that is 16 MiB.
pub const STREAM_QUERIES_MAX: usize = 256;
/// Of one port's connections.
pub const STREAM_QUERIES_PER_PORT_MAX: usize = 56;
const _: () = assert!(PIPELINE_MAX < STREAM_QUERIES_PER_PORT_MAX);
const _: () = assert!(STREAM_QUERIES_PER_PORT_MAX * 4 < STREAM_QUERIES_MAX);
/// How long a connection may be quiet: RFC 7766 6.2.3 recommends a few seconds.
pub const IDLE_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a guest may take to make room for an answer. 64 KiB in that time are 50 kbit/s.
pub const WRITE_TIMEOUT: Duration = Duration::from_secs(10);
/// Length prefix (RFC 7766 8).
const PREFIX_LEN: usize = 2;

/// A guest's connection.
pub(super) struct Connection {
    pub(super) fd: OwnedFd,
    pub(super) port: PortId,
    pub(super) guest: SocketAddr,
}

/// All connections: who has how many, and the queries they may have under way.
pub(super) struct Streams {
    service: Arc<Service>,
    tasks: JoinSet<()>,
    open: Arc<Mutex<Vec<Guest>>>,
    queries: Arc<Semaphore>,
    /// Lives as long as the port has a connection.
    per_port: HashMap<PortId, Weak<Semaphore>>,
}

/// Whose connection it is.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Guest {
    port: PortId,
    address: IpAddr,
}

/// A connection's place among [`Streams::open`].
struct Place {
    guest: Guest,
    open: Arc<Mutex<Vec<Guest>>>,
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(at) = open.iter().position(|&guest| guest == self.guest) {
            open.swap_remove(at);
        }
    }
}

/// What a query holds until its answer is written.
struct Permits {
    _of_port: OwnedSemaphorePermit,
    _of_all: OwnedSemaphorePermit,
}

impl Streams {
    pub(super) fn new(service: Arc<Service>) -> Self {
        Self {
            service,
            tasks: JoinSet::new(),
            open: Arc::default(),
            queries: Arc::new(Semaphore::new(STREAM_QUERIES_MAX)),
            per_port: HashMap::new(),
        }
    }

    /// Serves a connection, unless there are too many: then it is closed.
    pub(super) fn accept(&mut self, connection: Connection) {
        while self.tasks.try_join_next().is_some() {}
        let Connection { fd, port, guest } = connection;
        let counters = &self.service.counters;
        let address = guest.ip();
        let Some(place) = self.admit(Guest { port, address }) else {
            Counters::count(&counters.tcp_limited);
            log::debug!("port {port}: DNS connection of {guest} refused: too many");
            return;
        };
        let stream = match nonblocking(fd) {
            Ok(stream) => stream,
            Err(error) => {
                Counters::count(&counters.tcp_limited);
                log::debug!("port {port}: DNS connection of {guest}: {error}");
                return;
            }
        };
        Counters::count(&counters.tcp_connections);
        let service = Arc::clone(&self.service);
        let of_port = self.queries_of(port);
        let of_all = Arc::clone(&self.queries);
        self.tasks.spawn(async move {
            let session = Session::new(service, port, (of_port, of_all), stream);
            if let Err(error) = session.run().await {
                log::debug!("port {port}: DNS connection of {guest}: {error}");
            }
            drop(place);
        });
    }

    /// Ends with the last connection.
    pub(super) async fn finish(mut self) {
        while self.tasks.join_next().await.is_some() {}
    }

    fn admit(&self, guest: Guest) -> Option<Place> {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        let of_port = open.iter().filter(|other| other.port == guest.port).count();
        let of_address = open.iter().filter(|&&other| other == guest).count();
        // So many busy guests leave one more its share.
        let free = STREAMS_MAX.saturating_sub(open.len());
        if of_port >= STREAMS_PER_PORT_MAX.min(free) || of_address >= STREAMS_PER_ADDRESS_MAX {
            return None;
        }
        open.push(guest);
        let open = Arc::clone(&self.open);
        Some(Place { guest, open })
    }

    fn queries_of(&mut self, port: PortId) -> Arc<Semaphore> {
        if let Some(shared) = self.per_port.get(&port).and_then(Weak::upgrade) {
            return shared;
        }
        self.per_port.retain(|_, shared| shared.strong_count() > 0);
        let shared = Arc::new(Semaphore::new(STREAM_QUERIES_PER_PORT_MAX));
        self.per_port.insert(port, Arc::downgrade(&shared));
        shared
    }
}

fn nonblocking(fd: OwnedFd) -> io::Result<UnixStream> {
    let stream = std::os::unix::net::UnixStream::from(fd);
    stream.set_nonblocking(true)?;
    UnixStream::from_std(stream)
}

/// One connection.
struct Session {
    service: Arc<Service>,
    port: PortId,
    of_port: Arc<Semaphore>,
    of_all: Arc<Semaphore>,
    reader: Reader,
    write: OwnedWriteHalf,
    under_way: JoinSet<(Bytes, Permits)>,
}

impl Session {
    fn new(
        service: Arc<Service>,
        port: PortId,
        (of_port, of_all): (Arc<Semaphore>, Arc<Semaphore>),
        stream: UnixStream,
    ) -> Self {
        let (read, write) = stream.into_split();
        Self {
            service,
            port,
            of_port,
            of_all,
            reader: Reader::new(read),
            write,
            under_way: JoinSet::new(),
        }
    }

    /// Until either side ends it; dropping the future ends its queries.
    async fn run(mut self) -> io::Result<()> {
        let mut reading = true;
        let mut active_at = Instant::now();
        while reading || !self.under_way.is_empty() {
            let room = self.under_way.len() < PIPELINE_MAX;
            let idle = reading && self.under_way.is_empty();
            tokio::select! {
                // Answers first: they hold what others wait for.
                biased;
                Some(done) = self.under_way.join_next() => {
                    // A query that panicked was reported; its asker will ask again.
                    if let Ok((answer, permits)) = done {
                        self.send(&answer).await?;
                        drop(permits);
                        Counters::count(&self.service.counters.tcp_answers);
                    }
                    active_at = Instant::now();
                }
                incoming = self.reader.next(), if reading && room => {
                    reading = self.handle(incoming?).await?;
                    active_at = Instant::now();
                }
                () = sleep_until(active_at + IDLE_TIMEOUT), if idle => {
                    Counters::count(&self.service.counters.tcp_timeouts);
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    /// Starts on a query; `false` if nothing more is to be read.
    async fn handle(&mut self, incoming: Incoming) -> io::Result<bool> {
        let counters = &self.service.counters;
        let query = match incoming {
            Incoming::Message(query) => query,
            Incoming::Oversized(header) => {
                Counters::count(&counters.tcp_refused);
                let refusal = message::header_only(&header, Rcode::FormErr);
                return self.send(&refusal).await.map(|()| true);
            }
            Incoming::End => return Ok(false),
        };
        match Query::parse(&query) {
            Ok(_) => {}
            Err(QueryError::Answer(code)) => {
                Counters::count(&counters.tcp_refused);
                let refusal = message::header_only(&query, code);
                return self.send(&refusal).await.map(|()| true);
            }
            Err(QueryError::Drop(reason)) => {
                Counters::count(&counters.tcp_malformed);
                log::debug!("port {}: no DNS over TCP: {}", self.port, reason.name());
                return Ok(false);
            }
        }
        Counters::count(&counters.tcp_queries);
        let (of_port, of_all) = (Arc::clone(&self.of_port), Arc::clone(&self.of_all));
        let (service, port) = (Arc::clone(&self.service), self.port);
        self.under_way.spawn(async move {
            // The port's share first: who waits for that holds nothing of what is everybody's.
            let permits = Permits {
                _of_port: of_port.acquire_owned().await.expect("never closed"),
                _of_all: of_all.acquire_owned().await.expect("never closed"),
            };
            (service.answer(port, &query, Asker::Tcp).await, permits)
        });
        Ok(true)
    }

    async fn send(&mut self, message: &[u8]) -> io::Result<()> {
        let framed = framed(message);
        let written = timeout(WRITE_TIMEOUT, self.write.write_all(&framed)).await;
        written.unwrap_or_else(|_| {
            Counters::count(&self.service.counters.tcp_timeouts);
            Err(io::ErrorKind::TimedOut.into())
        })
    }
}

/// What a connection brings.
#[derive(Debug)]
enum Incoming {
    Message(Bytes),
    /// A message longer than [`QUERY_LEN_MAX`]: its header. The rest is skipped.
    Oversized([u8; HEADER_LEN]),
    End,
}

/// Cuts a stream into messages.
struct Reader {
    half: OwnedReadHalf,
    buffer: Box<[u8]>,
    filled: usize,
    /// Bytes of an oversized message that are still to come.
    skip: usize,
}

impl Reader {
    fn new(half: OwnedReadHalf) -> Self {
        Self {
            half,
            buffer: vec![0; PREFIX_LEN + QUERY_LEN_MAX].into(),
            filled: 0,
            skip: 0,
        }
    }

    /// The next message. All state is in `self`: the future may be dropped and made anew.
    async fn next(&mut self) -> io::Result<Incoming> {
        loop {
            if let Some(incoming) = self.cut() {
                return Ok(incoming);
            }
            match self.half.read(&mut self.buffer[self.filled..]).await? {
                0 => return Ok(Incoming::End),
                len => self.filled += len,
            }
        }
    }

    /// The next message in the buffer, if it is whole. The buffer has room afterwards if it is not.
    fn cut(&mut self) -> Option<Incoming> {
        let skipped = self.skip.min(self.filled);
        self.consume(skipped);
        self.skip -= skipped;
        let (prefix, rest) = self.buffer[..self.filled].split_first_chunk::<PREFIX_LEN>()?;
        let len = usize::from(u16::from_be_bytes(*prefix));
        if len > QUERY_LEN_MAX {
            let header = *rest.first_chunk::<HEADER_LEN>()?;
            self.skip = PREFIX_LEN + len;
            return Some(Incoming::Oversized(header));
        }
        let message = Bytes::copy_from_slice(rest.get(..len)?);
        self.consume(PREFIX_LEN + len);
        Some(Incoming::Message(message))
    }

    fn consume(&mut self, len: usize) {
        self.buffer.copy_within(len..self.filled, 0);
        self.filled -= len;
    }
}

#[cfg(test)]
mod tests;
