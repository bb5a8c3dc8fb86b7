//! What a policy has done: matches of each rule, and what was denied last.

use std::collections::VecDeque;
use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use super::name::Name;
use super::rule::{Cause, Policy};
use super::{Instant, Peer, Protocol};
use crate::frame::PortId;
use crate::names::GuestName;

/// Denials that are remembered: a screenful. The same one again counts up, it takes no second place.
pub const DENIED_MAX: usize = 32;
/// Of one guest: one that scans does not push the others' off the screen.
pub const DENIED_PER_GUEST_MAX: usize = 8;

/// How often something matched.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
struct Hits {
    flows: u64,
    queries: u64,
}

/// What was denied.
#[derive(Clone, PartialEq, Eq, Debug)]
enum What {
    Flow(Peer),
    Query,
}

#[derive(Clone, Debug)]
struct Denied {
    guest: PortId,
    /// What it was called: it may be gone by the time that somebody looks.
    called: Option<GuestName>,
    what: What,
    /// A query's, or the one that the guest knows the address by.
    name: Option<Name>,
    cause: Cause,
    last: Instant,
    count: u64,
}

/// Counters under one policy.
#[derive(Debug, Default)]
pub struct Ledger {
    rules: Vec<Hits>,
    default: Hits,
    nameless: u64,
    resolver: u64,
    stranger: Hits,
    denied: VecDeque<Denied>,
}

impl Ledger {
    /// A ledger for `policy`. Rules that stood in the one before with the same words keep their
    /// counts.
    pub fn after(mut self, before: Option<&Policy>, policy: Option<&Policy>) -> Self {
        let old = before.map_or(&[][..], Policy::rules);
        let rules = policy.map_or(&[][..], Policy::rules);
        let mut counts: std::collections::HashMap<&str, Hits> = old
            .iter()
            .zip(&self.rules)
            .rev()
            .map(|(rule, &hits)| (&*rule.text, hits))
            .collect();
        let keep = |rule: &super::rule::Rule| counts.remove(&*rule.text).unwrap_or_default();
        let rules = rules.iter().map(keep).collect();
        // Their rules have other numbers from here on.
        self.denied.clear();
        Self { rules, ..self }
    }

    /// Counts a decision on a flow.
    pub fn count_flow(&mut self, cause: Cause) {
        match cause {
            Cause::Rule(number) => self.rules[usize::from(number)].flows += 1,
            Cause::Default => self.default.flows += 1,
            Cause::Nameless => self.nameless += 1,
            Cause::Resolver => self.resolver += 1,
            Cause::Stranger => self.stranger.flows += 1,
        }
    }

    /// Counts a decision on a query.
    pub fn count_query(&mut self, cause: Cause) {
        match cause {
            Cause::Rule(number) => self.rules[usize::from(number)].queries += 1,
            Cause::Stranger => self.stranger.queries += 1,
            Cause::Default | Cause::Nameless | Cause::Resolver => self.default.queries += 1,
        }
    }

    /// Notes a flow that was denied.
    pub fn deny_flow(
        &mut self,
        guest: (PortId, Option<GuestName>),
        peer: Peer,
        name: Option<Name>,
        cause: Cause,
        now: Instant,
    ) {
        self.note(guest, What::Flow(peer), name, cause, now);
    }

    /// Notes a query that was refused.
    pub fn deny_query(
        &mut self,
        guest: (PortId, Option<GuestName>),
        name: Option<Name>,
        cause: Cause,
        now: Instant,
    ) {
        self.note(guest, What::Query, name, cause, now);
    }

    fn note(
        &mut self,
        (guest, called): (PortId, Option<GuestName>),
        what: What,
        name: Option<Name>,
        cause: Cause,
        now: Instant,
    ) {
        if log::log_enabled!(log::Level::Trace) {
            let name = name.as_ref().map(|name| format!(" {name}"));
            let name = name.unwrap_or_default();
            log::trace!("port {guest}: denied by the policy ({cause:?}): {what:?}{name}");
        }
        let same = |old: &Denied| {
            (old.guest, &old.what, &old.name, old.cause) == (guest, &what, &name, cause)
        };
        if let Some(at) = self.denied.iter().position(same) {
            let mut again = self.denied.remove(at).expect("just found");
            again.count += 1;
            again.last = now;
            return self.denied.push_back(again);
        }
        let of_guest = |old: &Denied| old.guest == guest;
        if self.denied.iter().filter(|old| of_guest(old)).count() >= DENIED_PER_GUEST_MAX
            && let Some(oldest) = self.denied.iter().position(of_guest)
        {
            self.denied.remove(oldest);
        } else if self.denied.len() >= DENIED_MAX {
            self.denied.pop_front();
        }
        self.denied.push_back(Denied {
            guest,
            called,
            what,
            name,
            cause,
            last: now,
            count: 1,
        });
    }

    /// What `status` shows of `policy`, under which this was counted.
    pub fn view(&self, policy: &Policy, now: Instant) -> PolicyView {
        let rules = policy.rules().iter().zip(&self.rules);
        let rules = rules.map(|(rule, hits)| RuleView {
            line: rule.line,
            rule: rule.text.to_string(),
            flows: hits.flows,
            queries: hits.queries,
        });
        let denied = self
            .denied
            .iter()
            .rev()
            .map(|denied| denied.view(policy, now));
        PolicyView {
            rules: rules.collect(),
            default: policy.default_action().words().to_owned(),
            default_flows: self.default.flows,
            default_queries: self.default.queries,
            nameless: self.nameless,
            resolver: self.resolver,
            stranger: self.stranger.flows + self.stranger.queries,
            denied: denied.collect(),
            ..PolicyView::default()
        }
    }
}

impl Denied {
    fn view(&self, policy: &Policy, now: Instant) -> DeniedView {
        let peer = match &self.what {
            What::Flow(peer) => Some(peer),
            What::Query => None,
        };
        let protocol = match peer.map(|peer| peer.protocol) {
            Some(Protocol::Tcp) => "tcp",
            Some(Protocol::Udp) => "udp",
            Some(Protocol::Icmp) => "icmp",
            Some(Protocol::Other) => "other",
            None => "dns",
        };
        let line = match self.cause {
            Cause::Rule(number) => policy
                .rules()
                .get(usize::from(number))
                .map(|rule| rule.line),
            _ => None,
        };
        DeniedView {
            secs_ago: (now - self.last).secs(),
            count: self.count,
            port: self.guest.0,
            guest: self.called.as_ref().map(GuestName::to_string),
            protocol: protocol.to_owned(),
            to: peer.map(|peer| peer.address),
            to_port: peer.and_then(|peer| peer.port),
            name: self.name.as_ref().map(Name::to_string),
            line,
            cause: match self.cause {
                Cause::Rule(_) => "rule",
                Cause::Default => "default",
                Cause::Nameless => "address without a name",
                Cause::Resolver => "another resolver",
                Cause::Stranger => "unknown guest",
            }
            .to_owned(),
        }
    }
}

/// A policy at work, as `status` shows it.
#[derive(Clone, PartialEq, Eq, Default, Debug, Serialize, Deserialize)]
pub struct PolicyView {
    /// The rules in order.
    pub rules: Vec<RuleView>,
    /// `allow`, `deny` or `deny silent`.
    pub default: String,
    /// Flows that no rule matched.
    pub default_flows: u64,
    /// Queries that no rule matched.
    pub default_queries: u64,
    /// Flows of guests with name rules denied because the address had no name.
    pub nameless: u64,
    /// Flows of guests with name rules denied because they went to another resolver.
    pub resolver: u64,
    /// Flows and queries of guests that are not known.
    pub stranger: u64,
    /// Names pinned to addresses now.
    pub pins: usize,
    /// Pins dropped before their time, for want of room.
    pub pins_evicted: u64,
    /// Answers with addresses inside for names: no pin allows those.
    pub rebinds: u64,
    /// What was denied last, newest first.
    pub denied: Vec<DeniedView>,
}

impl PolicyView {
    /// Adds what another worker counted under the same policy.
    pub fn add(&mut self, other: Self) {
        for (rule, more) in self.rules.iter_mut().zip(other.rules) {
            rule.flows += more.flows;
            rule.queries += more.queries;
        }
        self.default_flows += other.default_flows;
        self.default_queries += other.default_queries;
        self.nameless += other.nameless;
        self.resolver += other.resolver;
        self.stranger += other.stranger;
        self.pins += other.pins;
        self.pins_evicted += other.pins_evicted;
        self.rebinds += other.rebinds;
        self.denied.extend(other.denied);
        self.denied.sort_by_key(|denied| denied.secs_ago);
        self.denied.truncate(DENIED_MAX);
    }
}

/// One rule.
#[derive(Clone, PartialEq, Eq, Default, Debug, Serialize, Deserialize)]
pub struct RuleView {
    /// Line of the policy's text.
    pub line: u32,
    /// The rule.
    pub rule: String,
    /// Flows that it decided.
    pub flows: u64,
    /// DNS queries that it decided.
    pub queries: u64,
}

/// Something that was denied.
#[derive(Clone, PartialEq, Eq, Default, Debug, Serialize, Deserialize)]
pub struct DeniedView {
    /// Seconds since the last time.
    pub secs_ago: u64,
    /// How often, in a row of its like.
    pub count: u64,
    /// Port of the guest.
    pub port: u16,
    /// Its name; `None`: the port is gone.
    pub guest: Option<String>,
    /// `tcp`, `udp`, `icmp`, `other`; `dns`: a query to the gateway.
    pub protocol: String,
    /// Destination; `None`: a query.
    pub to: Option<IpAddr>,
    /// Its port.
    pub to_port: Option<u16>,
    /// The name asked for, or by which the guest knows the address.
    pub name: Option<String>,
    /// Line of the rule that denied it.
    pub line: Option<u32>,
    /// What denied it.
    pub cause: String,
}

impl PolicyView {
    /// Adds what another worker counted under the same policy.
    pub fn merge(&mut self, other: Self) {
        if self.rules.is_empty() {
            self.rules = other.rules;
        } else {
            for (mine, theirs) in self.rules.iter_mut().zip(other.rules) {
                mine.flows += theirs.flows;
                mine.queries += theirs.queries;
            }
        }
        if self.default.is_empty() {
            self.default = other.default;
        }
        self.default_flows += other.default_flows;
        self.default_queries += other.default_queries;
        self.nameless += other.nameless;
        self.resolver += other.resolver;
        self.stranger += other.stranger;
        self.pins += other.pins;
        self.pins_evicted += other.pins_evicted;
        self.rebinds += other.rebinds;
        self.denied.extend(other.denied);
        self.denied.sort_by_key(|denied| denied.secs_ago);
        self.denied.truncate(DENIED_MAX);
    }
}
