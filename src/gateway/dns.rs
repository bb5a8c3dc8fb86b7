//! DNS to the gateway's addresses over UDP: checks queries, hands them out, frames the answers.
//!
//! # Path
//! [`DnsService`] validates a query (a message that is none never reaches the host's resolver), notes
//! who asked, and queues it. The worker takes it with [`DnsService::poll_query`], has the egress policy
//! decide ([`DnsService::refuse`]), sends it to the control plane (`control/resolver.rs`), and gives what
//! comes back to the policy and to [`DnsService::handle_answer`]. Nothing is cached: the host's resolver
//! does that, and a cache shared by guests is something to poison. DNS over TCP to the gateway is a flow of the NAT's that ends
//! in the control plane (`control/resolver/stream.rs`).
//!
//! Guests ask any of the gateway's addresses, IPv4, IPv6 or link-local; the answer comes from the one
//! that was asked.
//!
//! # Answers that don't fit
//! An answer larger than the guest's EDNS size (512 without EDNS), or than the LAN's MTU, is cut to
//! header, question and OPT with TC set, so that the guest asks again over TCP (RFC 2181 9).
//!
//! # Limits
//! Outstanding queries: [`QUERIES_MAX`] in total, [`QUERIES_PER_PORT_MAX`] of a port and no more than are
//! free, [`QUERIES_PER_MAC_MAX`] of a MAC. So many busy guests leave one more its share, and who has more
//! than that gets no new ones until it has not. A query unanswered for [`QUERY_LIFETIME`] is forgotten.
//!
//! # What a hostile guest can try
//! Guess answers for another guest: answers come from the resolver alone, by a number that guests
//! never see. Exhaust the host's sockets: the limits. Reach the resolver's parser with rubbish:
//! [`message`] accepts exactly one question and nothing else but OPT or a signature behind it, and
//! ambiguous messages are refused, not passed on. Reflect: the source has to be a guest's address.

pub mod message;

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::net::IpAddr;

use bytes::Bytes;

use super::{Handled, LanConfig, Outbox, Service, admit_unicast, datagrams, service_counters};
use crate::frame::{Duration, ETH_HEADER_LEN, Instant, Mac, PortId};
use crate::offload::Offload;
use crate::stats::DropReason;
use crate::wire::ipv6::{UDP6_PAYLOAD_AT, write_udp6};
use crate::wire::{Ip, Packet, Transport, UDP4_PAYLOAD_AT, Udp, write_udp4};
use message::{Query, QueryError, Rcode};

/// DNS (RFC 1035 4.2).
pub const DNS_PORT: u16 = 53;
/// Queries under way at most: each holds a host socket, and DESIGN's test machines allow 20,000 files.
pub const QUERIES_MAX: usize = 1_024;
/// Of one port, while as many are free.
pub const QUERIES_PER_PORT_MAX: usize = 224;
/// Of one MAC: more than any stub resolver has open, below a port's share so that one guest behind a
/// port leaves room for the next.
pub const QUERIES_PER_MAC_MAX: usize = 128;
const _: () = assert!(QUERIES_PER_PORT_MAX * 4 < QUERIES_MAX);
const _: () = assert!(QUERIES_PER_MAC_MAX < QUERIES_PER_PORT_MAX);
/// Longer than the resolver ever takes (`control/resolver.rs` asserts it): an answer later than this
/// will not come.
pub const QUERY_LIFETIME: Duration = Duration::from_secs(10);
/// IP and UDP header.
const HEADERS4_LEN: usize = UDP4_PAYLOAD_AT - ETH_HEADER_LEN;
const HEADERS6_LEN: usize = UDP6_PAYLOAD_AT - ETH_HEADER_LEN;

/// Number of a query, unique for its service's life.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct QueryId(pub u64);

/// A query for the host's resolver.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DnsQuery {
    /// To be given back in the answer.
    pub id: QueryId,
    /// Port the guest is behind.
    pub port: PortId,
    /// The guest's MAC, address and UDP port.
    pub reply_to: (Mac, IpAddr, u16),
    /// The whole DNS message as the guest sent it.
    pub message: Bytes,
}

/// The answer to a [`DnsQuery`].
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DnsAnswer {
    /// The query's number.
    pub id: QueryId,
    /// The whole DNS message, with the guest's transaction id.
    pub message: Bytes,
}

service_counters! {
    /// What the DNS service did.
    DnsCounters {
        /// Queries passed to the resolver.
        queries = "dns_queries",
        /// Answers sent to guests.
        answers = "dns_answers",
        /// Of these, cut because they did not fit.
        truncated = "dns_truncated",
        /// Queries refused with an error of our own (FORMERR, NOTIMP, REFUSED).
        refused = "dns_refused",
        /// Messages dropped that were no queries.
        malformed = "dns_malformed",
        /// Queries dropped because a limit was reached.
        limited = "dns_limited",
        /// Queries that the resolver never answered.
        expired = "dns_expired",
        /// Answers to queries that had expired, and unusable ones.
        stray = "dns_stray_answers",
    }
}

/// Where an answer goes, and from where. Both addresses are of one family.
#[derive(Clone, Copy)]
struct ReplyPath {
    /// The gateway's address that was asked.
    from: IpAddr,
    to: (Mac, IpAddr, u16),
}

struct Outstanding {
    deadline: Instant,
    port: PortId,
    path: ReplyPath,
    /// The largest UDP payload the guest takes.
    payload_max: usize,
}

/// The DNS service.
pub struct DnsService {
    lan: LanConfig,
    next: u64,
    /// In order of deadline too, since ids grow and every query lives equally long.
    outstanding: BTreeMap<QueryId, Outstanding>,
    per_mac: HashMap<Mac, usize>,
    per_port: HashMap<PortId, usize>,
    queue: VecDeque<DnsQuery>,
    counters: DnsCounters,
}

impl DnsService {
    /// A service for the gateway of `lan`.
    pub fn new(lan: LanConfig) -> Self {
        Self {
            lan,
            next: 0,
            outstanding: BTreeMap::new(),
            per_mac: HashMap::new(),
            per_port: HashMap::new(),
            queue: VecDeque::new(),
            counters: DnsCounters::default(),
        }
    }

    /// The next query for the resolver. The worker drains this after each batch.
    pub fn poll_query(&mut self) -> Option<DnsQuery> {
        self.queue.pop_front()
    }

    /// When [`DnsService::expire`] has something to do next.
    pub fn poll_at(&self) -> Option<Instant> {
        self.outstanding
            .first_key_value()
            .map(|(_, asked)| asked.deadline)
    }

    /// Queries under way.
    pub fn outstanding(&self) -> usize {
        self.outstanding.len()
    }

    /// Forgets queries that the resolver never answered.
    pub fn expire(&mut self, now: Instant) {
        while let Some((&id, asked)) = self.outstanding.first_key_value()
            && asked.deadline <= now
        {
            self.finish(id);
            self.counters.expired += 1;
        }
    }

    /// The port of the guest that waits for this answer, if one does.
    pub fn port_of(&self, id: QueryId) -> Option<PortId> {
        Some(self.outstanding.get(&id)?.port)
    }

    /// Answers a query that policy does not let out with REFUSED.
    pub fn refuse(&mut self, query: &DnsQuery, out: &mut dyn Outbox) {
        if let Some(asked) = self.finish(query.id) {
            self.counters.refused += 1;
            let refusal = message::failure(&query.message, Rcode::Refused);
            self.send(&refusal, asked.path, out);
        }
    }

    /// Forgets a query that could not be handed to the resolver.
    pub fn abandon(&mut self, id: QueryId) {
        if self.finish(id).is_some() {
            self.counters.limited += 1;
        }
    }

    /// Sends the resolver's answer to the guest that asked.
    ///
    /// # Errors
    /// [`DropReason::NoFlow`] if nobody waits for it, [`DropReason::Malformed`] if it is no DNS answer.
    pub fn handle_answer(&mut self, answer: &DnsAnswer, out: &mut dyn Outbox) -> Handled {
        let Some(asked) = self.finish(answer.id) else {
            self.counters.stray += 1;
            return Err(DropReason::NoFlow);
        };
        if !message::is_response(&answer.message) {
            self.counters.stray += 1;
            return Err(DropReason::Malformed);
        }
        let headers_len = match asked.path.from {
            IpAddr::V4(_) => HEADERS4_LEN,
            IpAddr::V6(_) => HEADERS6_LEN,
        };
        let room = asked
            .payload_max
            .min(usize::from(self.lan.mtu).saturating_sub(headers_len));
        let cut = (answer.message.len() > room).then(|| message::truncate(&answer.message, room));
        let bytes = match cut {
            None => &answer.message[..],
            Some(Some(ref cut)) => {
                self.counters.truncated += 1;
                cut
            }
            Some(None) => {
                self.counters.stray += 1;
                return Err(DropReason::Malformed);
            }
        };
        self.counters.answers += 1;
        self.send(bytes, asked.path, out);
        Ok(())
    }

    fn send(&self, bytes: &[u8], path: ReplyPath, out: &mut dyn Outbox) {
        let buffer = out.buffer();
        let mac = self.lan.mac;
        let (to_mac, to, port) = path.to;
        let len = match (path.from, to) {
            (IpAddr::V4(from), IpAddr::V4(to)) => {
                buffer[UDP4_PAYLOAD_AT..][..bytes.len()].copy_from_slice(bytes);
                let (from, to) = ((mac, from, DNS_PORT), (to_mac, to, port));
                write_udp4(buffer, from, to, bytes.len())
            }
            (IpAddr::V6(from), IpAddr::V6(to)) => {
                buffer[UDP6_PAYLOAD_AT..][..bytes.len()].copy_from_slice(bytes);
                let (from, to) = ((mac, from, DNS_PORT), (to_mac, to, port));
                write_udp6(buffer, from, to, bytes.len())
            }
            _ => unreachable!("a packet's addresses are of one family"),
        };
        out.send(len, Offload::default());
    }

    fn finish(&mut self, id: QueryId) -> Option<Outstanding> {
        let asked = self.outstanding.remove(&id)?;
        decrement(&mut self.per_mac, asked.path.to.0);
        decrement(&mut self.per_port, asked.port);
        Some(asked)
    }

    fn datagram<'a>(&self, packet: &Packet<'a>) -> Option<(Ip<'a>, Udp<'a>)> {
        let ip = packet.ip()?;
        match ip.transport {
            Transport::Udp(udp)
                if udp.destination_port == DNS_PORT && self.lan.is_gateway(ip.destination) =>
            {
                Some((ip, udp))
            }
            _ => None,
        }
    }

    fn ask(
        &mut self,
        port: PortId,
        path: ReplyPath,
        bytes: &[u8],
        now: Instant,
        out: &mut dyn Outbox,
    ) -> Handled {
        let query = match Query::parse(bytes) {
            Ok(query) => query,
            Err(QueryError::Drop(reason)) => {
                self.counters.malformed += 1;
                return Err(reason);
            }
            Err(QueryError::Answer(code)) => {
                self.counters.refused += 1;
                self.send(&message::header_only(bytes, code), path, out);
                return Ok(());
            }
        };
        let mac = path.to.0;
        let of_mac = self.per_mac.get(&mac).copied().unwrap_or(0);
        let of_port = self.per_port.get(&port).copied().unwrap_or(0);
        // The queue outgrows what is outstanding only if nobody drains it.
        let free = QUERIES_MAX.saturating_sub(self.outstanding.len().max(self.queue.len()));
        if of_mac >= QUERIES_PER_MAC_MAX || of_port >= QUERIES_PER_PORT_MAX.min(free) {
            self.counters.limited += 1;
            return Err(DropReason::Limit);
        }
        let id = QueryId(self.next);
        self.next += 1;
        self.counters.queries += 1;
        *self.per_mac.entry(mac).or_default() += 1;
        *self.per_port.entry(port).or_default() += 1;
        let asked = Outstanding {
            deadline: now + QUERY_LIFETIME,
            port,
            path,
            payload_max: usize::from(query.payload_max),
        };
        self.outstanding.insert(id, asked);
        let message = Bytes::copy_from_slice(bytes);
        self.queue.push_back(DnsQuery {
            id,
            port,
            reply_to: path.to,
            message,
        });
        Ok(())
    }
}

fn decrement<K: std::hash::Hash + Eq>(counts: &mut HashMap<K, usize>, key: K) {
    if let std::collections::hash_map::Entry::Occupied(mut count) = counts.entry(key) {
        *count.get_mut() -= 1;
        if *count.get() == 0 {
            count.remove();
        }
    }
}

impl Service for DnsService {
    fn name(&self) -> &'static str {
        "dns"
    }

    fn claims(&self, packet: &Packet<'_>) -> bool {
        self.datagram(packet).is_some()
    }

    fn handle(&mut self, packet: &Packet<'_>, now: Instant, out: &mut dyn Outbox) -> Handled {
        let (ip, udp) = self.datagram(packet).ok_or(DropReason::Unclaimed)?;
        admit_unicast(&self.lan, packet, ip.source)?;
        if udp.source_port == 0 {
            // RFC 768: no port to answer to.
            return Err(DropReason::Malformed);
        }
        self.expire(now);
        let path = ReplyPath {
            from: ip.destination,
            to: (packet.source, ip.source, udp.source_port),
        };
        let mut handled = Ok(());
        for bytes in datagrams(packet.offload, &udp) {
            handled = handled.and(self.ask(packet.ingress, path, bytes, now, out));
        }
        handled
    }

    fn counters(&self) -> impl Iterator<Item = (&'static str, u64)> {
        self.counters.iter()
    }
}

#[cfg(test)]
mod tests;
