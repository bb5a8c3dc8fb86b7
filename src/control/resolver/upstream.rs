//! Asking the host's resolvers, over UDP or TCP.

use std::collections::hash_map::RandomState;
use std::hash::BuildHasher;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncReadExt, AsyncWriteExt, Interest};
use tokio::net::{TcpSocket, UdpSocket};
use tokio::time::{Instant, timeout_at};

use super::servers::Servers;
use super::{Counters, ResolverConfig};
use crate::gateway::dns::QUERY_LIFETIME;
use crate::gateway::dns::message::{self, Rcode};
use crate::sys::open_files;

/// How long one server may take. Stub resolvers give up after 5 s (resolv.conf(5)): the second
/// server's answer has to come before that.
pub const ATTEMPT_TIMEOUT: Duration = Duration::from_secs(2);
/// How often the list of servers is gone through: a lost datagram must not fail a query.
const ROUNDS: usize = 2;
/// How long a query may take with all its attempts.
pub const TOTAL_TIMEOUT: Duration = Duration::from_secs(8);
// The worker must not forget a query that is still to be answered.
const _: () = assert!(TOTAL_TIMEOUT.as_secs() < QUERY_LIFETIME.secs());
/// The longest DNS message (its length is 16 bits over TCP, and UDP's is).
const ANSWER_LEN_MAX: usize = 65_535;

/// How the guest asked. Who asked over UDP may be told to come again over TCP; who asked over TCP
/// gets the whole answer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Asker {
    Udp,
    Tcp,
}

/// How one attempt asks.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Transport {
    Udp,
    Tcp,
}

/// The host's resolvers.
pub(super) struct Upstream {
    servers: Mutex<Servers>,
    ids: TransactionIds,
}

impl Upstream {
    pub(super) fn new(config: ResolverConfig) -> Self {
        Self {
            servers: Mutex::new(Servers::new(config)),
            ids: TransactionIds::default(),
        }
    }

    /// A panic while it was held leaves the list usable.
    fn servers(&self) -> MutexGuard<'_, Servers> {
        self.servers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The servers in the order they are asked, and whether over TCP only.
    fn order(&self) -> (Vec<SocketAddr>, bool) {
        let mut servers = self.servers();
        (
            servers.in_order(std::time::Instant::now()),
            servers.tcp_only(),
        )
    }

    /// The server that is asked first.
    pub(super) fn first(&self) -> Option<SocketAddr> {
        self.order().0.first().copied()
    }

    /// Asks servers until one answers; SERVFAIL if none does. The answer has the guest's id.
    pub(super) async fn resolve(&self, query: &Bytes, asker: Asker, counters: &Counters) -> Bytes {
        let deadline = Instant::now() + TOTAL_TIMEOUT;
        let mut failed_answer = None;
        for round in 0..ROUNDS {
            let (order, tcp_only) = self.order();
            // A server whose UDP is blocked on the way may be reached over TCP; an answer to a guest
            // that asked over UDP would come too late that way more often than not.
            let transport = match asker {
                _ if tcp_only => Transport::Tcp,
                Asker::Tcp if round > 0 => Transport::Tcp,
                _ => Transport::Udp,
            };
            for server in order {
                match self
                    .ask(query, server, (transport, asker), deadline, counters)
                    .await
                {
                    Ok(answer) if is_server_failure(&answer) => failed_answer = Some(answer),
                    Ok(answer) => {
                        self.servers().last_good = Some(server);
                        return answer;
                    }
                    Err(error) => log::debug!("DNS server {server}: {error} (round {round})"),
                }
                if Instant::now() >= deadline {
                    break;
                }
            }
            // Every server has spoken: asking again would only repeat it.
            if failed_answer.is_some() {
                break;
            }
        }
        failed_answer.unwrap_or_else(|| {
            Counters::count(&counters.failed);
            message::failure(query, Rcode::ServFail).into()
        })
    }

    /// Asks one server; over TCP too if its answer was cut and the guest asked over TCP (RFC 7766 5).
    async fn ask(
        &self,
        query: &Bytes,
        server: SocketAddr,
        (transport, asker): (Transport, Asker),
        deadline: Instant,
        counters: &Counters,
    ) -> io::Result<Bytes> {
        if transport == Transport::Udp {
            let answer = self
                .attempt(query, server, Transport::Udp, deadline)
                .await?;
            if asker == Asker::Udp || !message::is_truncated(&answer) {
                return Ok(answer);
            }
        }
        Counters::count(&counters.upstream_tcp);
        self.attempt(query, server, Transport::Tcp, deadline).await
    }

    /// Asks one server once.
    async fn attempt(
        &self,
        query: &Bytes,
        server: SocketAddr,
        transport: Transport,
        deadline: Instant,
    ) -> io::Result<Bytes> {
        let mut asked = query.to_vec();
        asked[..2].copy_from_slice(&self.ids.next().to_be_bytes());
        message::limit_payload(&mut asked);
        let answer = async {
            match transport {
                Transport::Udp => over_udp(&asked, server).await,
                Transport::Tcp => over_tcp(&asked, server).await,
            }
        };
        let until = deadline.min(Instant::now() + ATTEMPT_TIMEOUT);
        let mut answer = timeout_at(until, answer)
            .await
            .map_err(|_| io::ErrorKind::TimedOut)??;
        answer[..2].copy_from_slice(&query[..2]);
        Ok(answer.freeze())
    }
}

/// A server that can't or won't serve; the next one may.
fn is_server_failure(answer: &[u8]) -> bool {
    let failures = [Rcode::ServFail, Rcode::Refused, Rcode::NotImp];
    failures
        .iter()
        .any(|&code| message::rcode(answer) == Some(code as u8))
}

async fn over_udp(asked: &[u8], server: SocketAddr) -> io::Result<BytesMut> {
    let any: IpAddr = match server {
        SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    let socket = UdpSocket::bind((any, 0)).await?;
    open_files::check_query(socket.as_fd())?;
    socket.connect(server).await?;
    socket.send(asked).await?;
    loop {
        // An ICMP error (port unreachable) makes the socket ready for that alone, not readable.
        if socket
            .ready(Interest::READABLE | Interest::ERROR)
            .await?
            .is_error()
        {
            let error = socket.take_error()?;
            return Err(error.unwrap_or_else(|| io::ErrorKind::ConnectionRefused.into()));
        }
        // Reserved, not touched: the pages that an answer doesn't reach cost nothing.
        let mut buffer = BytesMut::with_capacity(ANSWER_LEN_MAX);
        match socket.try_recv_buf(&mut buffer) {
            // A copy as long as the answer: this buffer's address space is not kept.
            Ok(_) if message::is_answer_to(&buffer, asked) => {
                return Ok(BytesMut::from(&buffer[..]));
            }
            // Not the answer: it may still come.
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
}

/// A connection for one query (RFC 7766 5). What comes back first has to be the answer: nobody but
/// the server can send here, and one that sends something else is not to be relied on.
async fn over_tcp(asked: &[u8], server: SocketAddr) -> io::Result<BytesMut> {
    let socket = match server {
        SocketAddr::V4(_) => TcpSocket::new_v4()?,
        SocketAddr::V6(_) => TcpSocket::new_v6()?,
    };
    open_files::check_query(socket.as_fd())?;
    let mut stream = socket.connect(server).await?;
    stream.write_all(&framed(asked)).await?;
    let len = usize::from(stream.read_u16().await?);
    // The kernel's zeros: pages that never arrive are never touched.
    let mut answer = BytesMut::zeroed(len);
    stream.read_exact(&mut answer).await?;
    if message::is_answer_to(&answer, asked) {
        Ok(answer)
    } else {
        Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "not the answer to the query",
        ))
    }
}

/// A message as it goes over TCP: with its length, in one write (RFC 7766 8).
pub(super) fn framed(message: &[u8]) -> Vec<u8> {
    let len = u16::try_from(message.len()).expect("a DNS message has 65,535 bytes at most");
    let mut framed = Vec::with_capacity(2 + message.len());
    framed.extend_from_slice(&len.to_be_bytes());
    framed.extend_from_slice(message);
    framed
}

/// Transaction ids nobody outside can foretell: SipHash of a counter under the process's random key
/// (std seeds it from the system's generator).
#[derive(Default)]
struct TransactionIds {
    key: RandomState,
    count: AtomicU64,
}

impl TransactionIds {
    fn next(&self) -> u16 {
        let count = self.count.fetch_add(1, Relaxed);
        // The low 16 bits of a hash are as good as any.
        self.key.hash_one(count) as u16
    }
}
