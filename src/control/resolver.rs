//! Answers guests' DNS queries with what the host's resolvers say, over UDP and TCP.
//!
//! # Path
//! Over UDP a worker hands a checked query ([`DnsQuery`]) to [`ResolverHandle::ask`]; its answer goes
//! to the query's [`AnswerSink`], which queues it for that worker and wakes it. Every accepted query
//! gets exactly one answer: SERVFAIL if no server is known or none answered. Over TCP a worker hands
//! the host's end of a guest's connection to [`ResolverHandle::serve`]; [`stream`] reads and answers
//! its queries. [`Resolver::run`], a task of the control plane's runtime, does the work of both: it asks
//! the servers (`resolver/upstream.rs`) one after the other. The egress policy lives in the worker, which
//! sees UDP's queries and answers on their way; about TCP's it is asked through [`NamePolicy`], and it
//! learns of their answers before the guests do.
//!
//! # Servers
//! Those configured, else all `nameserver` lines of /etc/resolv.conf, read again when the file
//! changes: laptops change networks. The server that answered last is asked first. A server that is
//! silent for [`ATTEMPT_TIMEOUT`], unreachable, or answers SERVFAIL or REFUSED hands over to the next.
//! They are asked over UDP; an answer that is cut is asked for again over TCP if the guest came over
//! TCP, else the guest does that. The second round for a guest's TCP query asks over TCP at once, and
//! so does every query where resolv.conf says `use-vc`.
//!
//! # Against forged answers (RFC 5452; the DNSpooq series of CVEs)
//! Each attempt has a socket of its own, so a source port of the kernel's random choice, connected,
//! so that the kernel drops what is not from the server asked; a transaction id from a keyed
//! pseudo-random function; and the answer must repeat the question. The guest's own id comes back in
//! the answer it gets.
//!
//! # Limits
//! [`QUERIES_MAX`] queries from UDP at once, [`stream::STREAM_QUERIES_MAX`] from TCP; a query takes
//! [`TOTAL_TIMEOUT`] at most.

mod servers;
pub mod stream;
mod upstream;

use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use bytes::Bytes;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;

use crate::frame::PortId;
use crate::gateway::dns::message::{self, Name, Rcode};
use crate::gateway::dns::{DNS_PORT, DnsAnswer, DnsQuery, QUERIES_MAX};
use stream::{Connection, STREAMS_MAX, Streams};
pub use upstream::{ATTEMPT_TIMEOUT, TOTAL_TIMEOUT};
use upstream::{Asker, Upstream};

/// The host's resolver configuration.
pub const RESOLV_CONF: &str = "/etc/resolv.conf";

/// Where an answer goes: queues it for the worker that asked, and wakes it. Must not block.
pub type AnswerSink = Arc<dyn Fn(DnsAnswer) + Send + Sync>;

/// What the egress policy has to say about names that are asked for over TCP. Neither call may block.
pub trait NamePolicy: Send + Sync {
    /// Asks whether the guest behind `port` may ask for `name`. If not, which a dropped sender means too,
    /// the answer is REFUSED and no server is asked. `None`: it may.
    fn allows(&self, port: PortId, name: &Name) -> Option<oneshot::Receiver<bool>>;

    /// Takes note of an answer to the guest behind `port`. The guest gets it when what is returned
    /// resolves, with a value or by being dropped: it must not use an address before the data path
    /// knows of it. `None`: there is nothing to wait for.
    fn on_answer(&self, port: PortId, answer: &[u8]) -> Option<oneshot::Receiver<()>>;
}

/// Every guest may ask for every name.
pub struct AllowAll;

impl NamePolicy for AllowAll {
    fn allows(&self, _: PortId, _: &Name) -> Option<oneshot::Receiver<bool>> {
        None
    }

    fn on_answer(&self, _: PortId, _: &[u8]) -> Option<oneshot::Receiver<()>> {
        None
    }
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

/// Declares the resolver's counters: atomics and their names for `lanlet status`.
macro_rules! counters {
    ($($(#[$doc:meta])* $field:ident = $label:literal,)*) => {
        /// What the resolver did.
        #[derive(Debug, Default)]
        pub(crate) struct Counters { $($(#[$doc])* $field: AtomicU64,)* }

        impl Counters {
            fn iter(&self) -> impl Iterator<Item = (&'static str, u64)> + use<> {
                [$(($label, self.$field.load(Relaxed)),)*].into_iter()
            }
        }
    };
}

counters! {
    /// Connections of guests accepted.
    tcp_connections = "dns_tcp_connections",
    /// Queries read from them and passed on.
    tcp_queries = "dns_tcp_queries",
    /// Answers to these that were written.
    tcp_answers = "dns_tcp_answers",
    /// Queries answered with an error of our own (FORMERR, NOTIMP, REFUSED).
    tcp_refused = "dns_tcp_refused",
    /// Connections ended because they brought no queries.
    tcp_malformed = "dns_tcp_malformed",
    /// Connections refused because a limit was reached.
    tcp_limited = "dns_tcp_limited",
    /// Connections ended because they were idle or took no answer.
    tcp_timeouts = "dns_tcp_timeouts",
    /// Of these, refused by the name policy.
    denied = "dns_names_denied",
    /// Attempts made over TCP.
    upstream_tcp = "dns_upstream_tcp",
    /// Queries that no server answered.
    failed = "dns_upstream_failed",
}

impl Counters {
    fn count(counter: &AtomicU64) {
        counter.fetch_add(1, Relaxed);
    }
}

/// What every query needs.
struct Service {
    upstream: Upstream,
    policy: Arc<dyn NamePolicy>,
    counters: Counters,
}

impl Service {
    /// The answer to a checked query of the guest behind `port`.
    async fn answer(&self, port: PortId, query: &Bytes, asker: Asker) -> Bytes {
        if asker == Asker::Udp {
            return self.upstream.resolve(query, asker, &self.counters).await;
        }
        // A name that can't be read is not in the query of a guest that was checked; refuse it.
        let allowed = match message::question_name(query) {
            None => false,
            Some(name) => match self.policy.allows(port, &name) {
                None => true,
                Some(decided) => decided.await.unwrap_or(false),
            },
        };
        if !allowed {
            Counters::count(&self.counters.denied);
            return message::failure(query, Rcode::Refused).into();
        }
        let answer = self.upstream.resolve(query, asker, &self.counters).await;
        if let Some(noted) = self.policy.on_answer(port, &answer) {
            // Dropped instead of sent: whoever should know is gone, and so is the guest's way out.
            let _ = noted.await;
        }
        answer
    }
}

enum Work {
    Ask(DnsQuery, AnswerSink),
    Serve(Connection),
}

/// The workers' end of a [`Resolver`].
#[derive(Clone)]
pub struct ResolverHandle {
    asks: mpsc::Sender<(DnsQuery, AnswerSink)>,
    connections: mpsc::Sender<Connection>,
    service: Arc<Service>,
}

impl ResolverHandle {
    /// Hands over a query. Never blocks.
    ///
    /// # Errors
    /// The resolver has as much to do as it may, or has ended; gives the query back.
    pub fn ask(&self, query: DnsQuery, sink: &AnswerSink) -> Result<(), DnsQuery> {
        self.asks
            .try_send((query, Arc::clone(sink)))
            .map_err(|refused| refused.into_inner().0)
    }

    /// Hands over a connection for DNS over TCP: the host's end of a Unix stream socket whose other
    /// end carries what `guest` behind `port` sends. If there are too many it is closed and counted.
    /// Never blocks.
    pub fn serve(&self, fd: OwnedFd, port: PortId, guest: SocketAddr) {
        let connection = Connection { fd, port, guest };
        if self.connections.try_send(connection).is_err() {
            Counters::count(&self.service.counters.tcp_limited);
        }
    }

    /// The server in use: the one that answered last, else the first known.
    pub fn upstream(&self) -> Option<SocketAddr> {
        self.service.upstream.first()
    }

    /// The resolver's counters by the names that `lanlet status` shows, in a fixed order.
    pub fn counters(&self) -> impl Iterator<Item = (&'static str, u64)> + use<> {
        self.service.counters.iter()
    }
}

/// The task that asks the host's resolvers.
pub struct Resolver {
    asks: mpsc::Receiver<(DnsQuery, AnswerSink)>,
    connections: mpsc::Receiver<Connection>,
    service: Arc<Service>,
}

impl Resolver {
    /// A resolver for all names, and the handle to give it work.
    pub fn new(config: ResolverConfig) -> (Self, ResolverHandle) {
        Self::with_policy(config, Arc::new(AllowAll))
    }

    /// A resolver that does as `policy` says, and the handle to give it work.
    pub fn with_policy(
        config: ResolverConfig,
        policy: Arc<dyn NamePolicy>,
    ) -> (Self, ResolverHandle) {
        let (ask, asks) = mpsc::channel(QUERIES_MAX);
        let (connect, connections) = mpsc::channel(STREAMS_MAX);
        let service = Arc::new(Service {
            upstream: Upstream::new(config),
            policy,
            counters: Counters::default(),
        });
        let handle = ResolverHandle {
            asks: ask,
            connections: connect,
            service: Arc::clone(&service),
        };
        let resolver = Self {
            asks,
            connections,
            service,
        };
        (resolver, handle)
    }

    /// Works until all handles are dropped. Dropping the future ends all queries and connections.
    pub async fn run(mut self) {
        let mut queries = JoinSet::new();
        let mut streams = Streams::new(Arc::clone(&self.service));
        while let Some(work) = self.next(&mut queries).await {
            match work {
                Work::Ask(query, sink) => {
                    let service = Arc::clone(&self.service);
                    queries.spawn(async move {
                        let answer = service.answer(query.port, &query.message, Asker::Udp);
                        let message = answer.await;
                        let id = query.id;
                        sink(DnsAnswer { id, message });
                    });
                }
                Work::Serve(connection) => streams.accept(connection),
            }
        }
        while queries.join_next().await.is_some() {}
        streams.finish().await;
    }

    /// What is to be done next; `None` if nothing ever will be.
    async fn next(&mut self, queries: &mut JoinSet<()>) -> Option<Work> {
        loop {
            while queries.try_join_next().is_some() {}
            // With as many queries as may be, further ones wait in the channel until one ends.
            let room = queries.len() < QUERIES_MAX;
            tokio::select! {
                Some((query, sink)) = self.asks.recv(), if room => return Some(Work::Ask(query, sink)),
                Some(connection) = self.connections.recv() => return Some(Work::Serve(connection)),
                Some(_) = queries.join_next(), if !room => {}
                else => return None,
            }
        }
    }
}

#[cfg(test)]
mod tests;
