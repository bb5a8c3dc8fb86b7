//! Forwards guests' DNS queries to the host's resolvers.
//!
//! # Path
//! A worker hands a checked query ([`DnsQuery`]) to [`ResolverHandle::ask`]; [`Resolver::run`], a task
//! of the control plane's runtime, asks the servers one after the other and gives the answer to the
//! query's [`AnswerSink`], which queues it for that worker and wakes it. Every accepted query gets
//! exactly one answer: SERVFAIL if no server is known or none answered.
//!
//! # Servers
//! Those configured, else all `nameserver` lines of /etc/resolv.conf, read again when the file
//! changes: laptops change networks. The server that answered last is asked first. A server that is
//! silent for [`ATTEMPT_TIMEOUT`], unreachable, or answers SERVFAIL or REFUSED hands over to the next.
//!
//! # Against forged answers (RFC 5452; the DNSpooq series of CVEs)
//! Each attempt has a socket of its own, so a source port of the kernel's random choice, connected,
//! so that the kernel drops what is not from the server asked; a transaction id from a keyed
//! pseudo-random function; and the answer must repeat the question. The guest's own id comes back in
//! the answer it gets.
//!
//! # Limits
//! [`QUERIES_MAX`] attempts at once; a query takes [`TOTAL_TIMEOUT`] at most.

use std::collections::hash_map::RandomState;
use std::hash::BuildHasher;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use bytes::{Bytes, BytesMut};
use tokio::io::Interest;
use tokio::net::UdpSocket;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::timeout_at;

use crate::gateway::dns::message::{self, Rcode};
use crate::gateway::dns::{DNS_PORT, DnsAnswer, DnsQuery, QUERIES_MAX, QUERY_LIFETIME};

/// How long one server may take. Stub resolvers give up after 5 s (resolv.conf(5)): the second
/// server's answer has to come before that.
pub const ATTEMPT_TIMEOUT: Duration = Duration::from_secs(2);
/// How often the list of servers is gone through: a lost datagram must not fail a query.
const ROUNDS: usize = 2;
/// How long a query may take with all its attempts.
pub const TOTAL_TIMEOUT: Duration = Duration::from_secs(8);
// The worker must not forget a query that is still to be answered.
const _: () = assert!(TOTAL_TIMEOUT.as_secs() < QUERY_LIFETIME.secs());
/// Servers that are used; glibc uses three.
const SERVERS_MAX: usize = 8;
/// How often the file's modification time is looked at.
const RECHECK: Duration = Duration::from_secs(1);
/// Larger is no resolv.conf.
const RESOLV_CONF_LEN_MAX: usize = 64 * 1024;
/// The longest DNS message (its length is 16 bits over TCP, and UDP's is).
const ANSWER_LEN_MAX: usize = 65_535;
/// The host's resolver configuration.
pub const RESOLV_CONF: &str = "/etc/resolv.conf";

/// Where an answer goes: queues it for the worker that asked, and wakes it. Must not block.
pub type AnswerSink = Arc<dyn Fn(DnsAnswer) + Send + Sync>;

struct Ask {
    query: DnsQuery,
    sink: AnswerSink,
}

/// Which servers are used.
#[derive(Clone, Debug)]
pub struct ResolverConfig {
    /// The configured ones; if empty, those of `resolv_conf`.
    pub servers: Vec<IpAddr>,
    /// The host's resolver configuration, [`RESOLV_CONF`].
    pub resolv_conf: PathBuf,
    /// Port of all servers, 53.
    pub port: u16,
}

impl Default for ResolverConfig {
    fn default() -> Self {
        Self {
            servers: Vec::new(),
            resolv_conf: RESOLV_CONF.into(),
            port: DNS_PORT,
        }
    }
}

/// The workers' end of a [`Resolver`].
#[derive(Clone)]
pub struct ResolverHandle {
    asks: mpsc::Sender<Ask>,
    servers: Arc<Mutex<Servers>>,
}

impl ResolverHandle {
    /// Hands over a query. Never blocks.
    ///
    /// # Errors
    /// The resolver has as much to do as it may, or has ended; gives the query back.
    pub fn ask(&self, query: DnsQuery, sink: &AnswerSink) -> Result<(), DnsQuery> {
        let ask = Ask {
            query,
            sink: Arc::clone(sink),
        };
        self.asks
            .try_send(ask)
            .map_err(|refused| refused.into_inner().query)
    }

    /// The server in use, for DNS over TCP: the one that answered last, else the first known.
    pub fn upstream(&self) -> Option<SocketAddr> {
        lock(&self.servers)
            .in_order(Instant::now())
            .first()
            .copied()
    }
}

/// The task that asks the host's resolvers.
pub struct Resolver {
    asks: mpsc::Receiver<Ask>,
    servers: Arc<Mutex<Servers>>,
}

impl Resolver {
    /// A resolver and the handle to give it work.
    pub fn new(config: ResolverConfig) -> (Self, ResolverHandle) {
        let (sender, asks) = mpsc::channel(QUERIES_MAX);
        let servers = Arc::new(Mutex::new(Servers::new(config)));
        let handle = ResolverHandle {
            asks: sender,
            servers: Arc::clone(&servers),
        };
        (Self { asks, servers }, handle)
    }

    /// Works until all handles are dropped. Dropping the future ends all queries.
    pub async fn run(mut self) {
        let ids = Arc::new(TransactionIds::default());
        let mut attempts = JoinSet::new();
        while let Some(Ask { query, sink }) = self.asks.recv().await {
            while attempts.try_join_next().is_some() {}
            if attempts.len() >= QUERIES_MAX {
                // As many as may be: the sender waits in the channel until one ends.
                attempts.join_next().await;
            }
            let servers = Arc::clone(&self.servers);
            let ids = Arc::clone(&ids);
            attempts.spawn(async move {
                let message = resolve(&query.message, &servers, &ids).await;
                sink(DnsAnswer {
                    id: query.id,
                    message,
                });
            });
        }
        while attempts.join_next().await.is_some() {}
    }
}

/// Asks servers until one answers; SERVFAIL if none does.
async fn resolve(query: &Bytes, servers: &Mutex<Servers>, ids: &TransactionIds) -> Bytes {
    let deadline = tokio::time::Instant::now() + TOTAL_TIMEOUT;
    let mut failed_answer = None;
    for round in 0..ROUNDS {
        let order = lock(servers).in_order(Instant::now());
        for server in order {
            let attempt = deadline.min(tokio::time::Instant::now() + ATTEMPT_TIMEOUT);
            let answer = timeout_at(attempt, attempt_once(query, server, ids.next())).await;
            match answer {
                Ok(Ok(answer)) if is_server_failure(&answer) => failed_answer = Some(answer),
                Ok(Ok(answer)) => {
                    lock(servers).last_good = Some(server);
                    return answer;
                }
                Ok(Err(error)) => log::debug!("DNS server {server}: {error}"),
                Err(_) => log::debug!("DNS server {server} is silent (round {round})"),
            }
            if tokio::time::Instant::now() >= deadline {
                break;
            }
        }
        // Every server has spoken: asking again would only repeat it.
        if failed_answer.is_some() {
            break;
        }
    }
    failed_answer.unwrap_or_else(|| message::failure(query, Rcode::ServFail).into())
}

/// A server that can't or won't serve; the next one may.
fn is_server_failure(answer: &[u8]) -> bool {
    let failures = [Rcode::ServFail, Rcode::Refused, Rcode::NotImp];
    failures
        .iter()
        .any(|&code| message::rcode(answer) == Some(code as u8))
}

/// Asks one server once; returns its answer with the guest's transaction id.
async fn attempt_once(query: &Bytes, server: SocketAddr, id: u16) -> io::Result<Bytes> {
    let any: IpAddr = match server {
        SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    let socket = UdpSocket::bind((any, 0)).await?;
    socket.connect(server).await?;
    let mut asked = query.to_vec();
    asked[..2].copy_from_slice(&id.to_be_bytes());
    socket.send(&asked).await?;
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
            Ok(_) if message::answers(&buffer, &asked) => {
                buffer[..2].copy_from_slice(&query[..2]);
                return Ok(Bytes::copy_from_slice(&buffer));
            }
            // Not the answer: it may still come.
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
}

/// Transaction ids nobody outside can foretell: SipHash of a counter under the process's random key
/// (std seeds it from the system's generator).
#[derive(Default)]
struct TransactionIds {
    key: RandomState,
    count: std::sync::atomic::AtomicU64,
}

impl TransactionIds {
    fn next(&self) -> u16 {
        let count = self
            .count
            .fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        // The low 16 bits of a hash are as good as any.
        self.key.hash_one(count) as u16
    }
}

/// The servers known.
struct Servers {
    config: ResolverConfig,
    known: Vec<SocketAddr>,
    last_good: Option<SocketAddr>,
    checked_at: Option<Instant>,
    modified: Option<SystemTime>,
}

impl Servers {
    fn new(config: ResolverConfig) -> Self {
        let known = config
            .servers
            .iter()
            .map(|&server| (server, config.port).into());
        Self {
            known: known.take(SERVERS_MAX).collect(),
            config,
            last_good: None,
            checked_at: None,
            modified: None,
        }
    }

    /// All servers, the one that answered last first.
    fn in_order(&mut self, now: Instant) -> Vec<SocketAddr> {
        if self.config.servers.is_empty() {
            self.refresh(now);
        }
        let mut order = self.known.clone();
        if let Some(good) = self.last_good
            && let Some(at) = order.iter().position(|&server| server == good)
        {
            order[..=at].rotate_right(1);
        }
        order
    }

    fn refresh(&mut self, now: Instant) {
        if self
            .checked_at
            .is_some_and(|at| now.duration_since(at) < RECHECK)
        {
            return;
        }
        self.checked_at = Some(now);
        let path = &self.config.resolv_conf;
        let modified = std::fs::metadata(path)
            .and_then(|metadata| metadata.modified())
            .ok();
        if modified == self.modified && modified.is_some() {
            return;
        }
        self.modified = modified;
        // A file that is just being replaced is missing for a moment: the servers stay.
        if let Ok(text) = read_resolv_conf(path) {
            self.known = parse_resolv_conf(&text, self.config.port);
            log::debug!("DNS servers: {:?}", self.known);
        }
    }
}

fn read_resolv_conf(path: &Path) -> io::Result<String> {
    let bytes = std::fs::read(path)?;
    let bytes = &bytes[..bytes.len().min(RESOLV_CONF_LEN_MAX)];
    Ok(String::from_utf8_lossy(bytes).into_owned())
}

/// The `nameserver` lines (resolv.conf(5)).
fn parse_resolv_conf(text: &str, port: u16) -> Vec<SocketAddr> {
    text.lines()
        .filter_map(nameserver)
        .filter_map(|word| parse_server(word, port))
        .take(SERVERS_MAX)
        .collect()
}

fn nameserver(line: &str) -> Option<&str> {
    let mut words = line.split_ascii_whitespace();
    words.next().filter(|&key| key == "nameserver")?;
    words.next()
}

/// An address; a link-local IPv6 one has its interface behind `%`, by number or name.
fn parse_server(word: &str, port: u16) -> Option<SocketAddr> {
    let Some((address, zone)) = word.split_once('%') else {
        return Some((word.parse::<IpAddr>().ok()?, port).into());
    };
    let address: Ipv6Addr = address.parse().ok()?;
    let scope = zone.parse().ok().or_else(|| interface_index(zone))?;
    Some(SocketAddrV6::new(address, port, 0, scope).into())
}

fn interface_index(name: &str) -> Option<u32> {
    if name.contains('/') {
        return None;
    }
    let text = std::fs::read_to_string(format!("/sys/class/net/{name}/ifindex")).ok()?;
    text.trim().parse().ok()
}

/// A panic while it was held leaves the list usable.
fn lock(servers: &Mutex<Servers>) -> std::sync::MutexGuard<'_, Servers> {
    servers.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
