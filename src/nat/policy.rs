//! Egress policy: which guest may reach what outside, by address, protocol, port and domain name.
//!
//! # Text
//! One rule per line; what follows a `#` is comment. The first rule that matches decides; `default`,
//! which has to be said, decides where none does. A text with an error is refused whole, with line,
//! word and reason ([`PolicyError`]).
//!
//! ```text
//! line         = [ rule | default ] [ "#" comment ]
//! default      = "default" ( "allow" | deny )
//! rule         = ( "allow" | deny ) [ "guest" guests ] [ "to" destinations ] [ protocols [ ports ] ]
//! deny         = "deny" [ "silent" ]
//! guests       = "any" | ( "port=" NAME | "group=" NAME ) { "," ... }
//! destinations = ( "any" | "internet" | "private" | "metadata" | ADDRESS | CIDR | name ) { "," ... }
//! name         = NAME | "*." NAME | "*"
//! protocols    = "any" | ( "tcp" | "udp" | "icmp" ) { "," ... }
//! ports        = ( PORT | PORT "-" PORT ) { "," ... }
//! ```
//!
//! What is left out means all of its kind, but a rule says something. `*.example.test` is every name
//! below `example.test`, not itself; `*` is every name. `private` is [`address::PRIVATE`], `metadata`
//! [`address::METADATA`] with all link-local addresses, `internet` what is in neither nor otherwise
//! special. A refused flow is answered with ICMP (administratively prohibited), unless the rule says `silent`.
//!
//! # Addresses
//! An IPv6 address that carries an IPv4 address (NAT64, 6to4, Teredo, ISATAP, compatible) is denied
//! where either is, and a network allows it only if what it carries is of the Internet, allowed too,
//! or the network lies within that kind of address. A mapped address is its IPv4 address.
//!
//! # Names
//! Names are those of DNS answers that the gateway itself gave to the guest: [`PolicyState::pin`] takes
//! each answer and pins the addresses that its question's own chain of aliases leads to, for their TTL
//! ([`pins`]). An allowing rule matches by the name asked for, a denying one by its aliases too. A name
//! that leads inside (`private`, `metadata`, loopback, this LAN, the host itself, ...) allows nothing, so
//! that no outside name server can open an inside address; an address rule can.
//!
//! A guest that any rule with a name is about is held to names:
//! - `any`, `internet`, a missing `to` and `default allow` mean what has a name: a literal address is
//!   allowed only by a rule with addresses (`0.0.0.0/0` is one, `private` too);
//! - ports 53 and 853 are allowed only by a rule that has both the address and the port;
//! - a query for a name that no rule allows is refused ([`PolicyState::decide_query`]): asking tells
//!   the name's server something. Guests without name rules are refused queries only if nothing at all
//!   is allowed to them.
//!
//! A server that a name leads to can be a resolver or a proxy itself: a list of allowed names holds, a
//! list of denied ones under `default allow` is good against accidents.
//!
//! # Path
//! The NAT asks [`PolicyState::decide`] once for each new flow and each new peer of a mapping, never per
//! packet; datagrams are whole by then, so a fragment is never judged. When the policy changes,
//! [`PolicyState::review`] tells which live flows have to end: a walk for each peer of each flow, by the
//! figures at [`rule::RULES_MAX`] 4 ms for 16,384 connections and ten rules, 0.3 s for 1,024. Guests that
//! fill all UDP mappings with peers make a million of them: 0.2 s for ten rules, 16 s for 1,024.
//!
//! # State, limits
//! A compiled [`Policy`], shared by workers; per worker the guests' names and groups, [`pins::Pins`] and a
//! [`ledger::Ledger`], each with its limits. Times are the pins'.
//!
//! # Hostile guests
//! No guest can write a pin but by asking the gateway, and none sees another's. A flood of new flows
//! costs a walk through the rules each, without allocation.

pub mod address;
pub mod answer;
pub mod ledger;
pub mod name;
pub mod parse;
pub mod pins;
pub mod rule;

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;

use super::{Duration, Instant};
use crate::frame::PortId;
use crate::gateway::dns::message::{self, question_name};
use crate::names::{GroupName, GuestName};
use address::{Cidr, Judged};
use answer::Answer;
use ledger::{Ledger, PolicyView};
use name::Name;
use pins::{GuestPins, Pins};
use rule::{Cause, GuestRules};

pub use parse::PolicyError;
pub use rule::Policy;

/// What a flow is made of.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// ICMP or ICMPv6.
    Icmp,
    /// Anything else.
    Other,
}

/// The outside end of a flow.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Peer {
    /// Protocol.
    pub protocol: Protocol,
    /// Address.
    pub address: IpAddr,
    /// Port, where the protocol has them.
    pub port: Option<u16>,
    /// The address is the host's own: no name leads there.
    pub of_host: bool,
}

/// What is to be done with a flow.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Verdict {
    /// It may go out.
    Allow,
    /// It may not.
    Deny {
        /// No RST, no ICMP.
        silent: bool,
    },
}

#[derive(Debug)]
struct Guest {
    name: GuestName,
    group: Option<GroupName>,
    rules: GuestRules,
}

/// The policy of one worker's guests, with what it has learned and counted.
#[derive(Debug, Default)]
pub struct PolicyState {
    policy: Option<Arc<Policy>>,
    /// The LAN itself: no name leads there.
    local: Vec<Cidr>,
    guests: HashMap<PortId, Guest>,
    pins: Pins,
    ledger: Ledger,
    rebinds: u64,
}

impl PolicyState {
    /// No policy yet: all is allowed. `local`: the networks of the LAN.
    pub fn new(local: Vec<Cidr>) -> Self {
        Self {
            local,
            ..Self::default()
        }
    }

    /// Puts another policy in force, or none. Live flows have to be reviewed then.
    pub fn set_policy(&mut self, policy: Option<Arc<Policy>>) {
        for guest in self.guests.values_mut() {
            guest.rules = rules_for(policy.as_deref(), &guest.name, guest.group.as_ref());
        }
        self.pins.handle_policy(policy.as_deref());
        let ledger = std::mem::take(&mut self.ledger);
        self.ledger = ledger.after(self.policy.as_deref(), policy.as_deref());
        self.policy = policy;
    }

    /// The policy in force.
    pub fn policy(&self) -> Option<&Arc<Policy>> {
        self.policy.as_ref()
    }

    /// Makes the guest behind a port known. One that is not known is denied everything.
    pub fn add_guest(&mut self, port: PortId, name: GuestName, group: Option<GroupName>) {
        let guest = Guest {
            rules: rules_for(self.policy.as_deref(), &name, group.as_ref()),
            name,
            group,
        };
        self.guests.insert(port, guest);
        // Whatever was pinned here was another's.
        self.pins.forget(port);
    }

    /// Forgets a guest and what it resolved.
    pub fn forget_guest(&mut self, port: PortId) {
        self.guests.remove(&port);
        self.pins.forget(port);
    }

    /// Takes out what a guest resolved, for the worker that has its flows from here on.
    pub fn take_pins(&mut self, port: PortId) -> GuestPins {
        self.pins.take(port)
    }

    /// Takes over what a guest resolved from another worker.
    pub fn put_pins(&mut self, port: PortId, pins: GuestPins) {
        if self.guests.contains_key(&port) {
            self.pins.put(port, pins);
            // The other's policy may have been another.
            self.pins.handle_policy(self.policy.as_deref());
        }
    }

    /// Whether the guest is held to names. Its queries to the gateway then have to pass
    /// [`PolicyState::decide_query`], over TCP as well.
    pub fn has_names(&self, port: PortId) -> bool {
        let guest = self.guests.get(&port);
        self.policy.is_some() && guest.is_none_or(|guest| guest.rules.has_names)
    }

    /// Decides on a new flow, or on a new peer of a mapping.
    pub fn decide(&mut self, port: PortId, peer: Peer, now: Instant) -> Verdict {
        let (verdict, cause) = self.judge(port, &peer, Some(now));
        if self.policy.is_none() {
            return verdict;
        }
        let address = peer.address.to_canonical();
        let name = self.pins.touch(port, address, now);
        self.ledger.count_flow(cause);
        if let Verdict::Deny { .. } = verdict {
            let guest = (port, self.name_of(port));
            self.ledger.deny_flow(guest, peer, name, cause, now);
        }
        verdict
    }

    /// Decides on a live flow once more, without counting. A name that led there still does, even
    /// though its TTL is over.
    pub fn review(&self, port: PortId, peer: Peer) -> Verdict {
        self.judge(port, &peer, None).0
    }

    fn judge(&self, port: PortId, peer: &Peer, at: Option<Instant>) -> (Verdict, Cause) {
        let Some(policy) = &self.policy else {
            return (Verdict::Allow, Cause::Default);
        };
        let Some(guest) = self.guests.get(&port) else {
            return (Verdict::Deny { silent: false }, Cause::Stranger);
        };
        let to = Judged::new(peer.address);
        let named = if guest.rules.has_names {
            let counts = !peer.of_host && self.is_outside(&to);
            self.pins.named(port, to.address(), counts, at)
        } else {
            rule::Named::default()
        };
        policy.decide(&guest.rules, peer, &to, &named)
    }

    /// Whether a name may lead there.
    fn is_outside(&self, to: &Judged) -> bool {
        to.is_internet() && !self.local.iter().any(|&lan| to.is_touched_by(lan))
    }

    /// Decides whether a guest's query, a DNS message that holds one, may be asked. If not, the
    /// answer is REFUSED.
    pub fn decide_query(&mut self, port: PortId, query: &[u8], now: Instant) -> bool {
        self.policy.is_none() || self.decide_name(port, question_name(query).as_ref(), now)
    }

    /// Decides whether a guest may ask for a name; `None` where its query has none.
    pub fn decide_name(
        &mut self,
        port: PortId,
        name: Option<&message::Name>,
        now: Instant,
    ) -> bool {
        let Some(policy) = &self.policy else {
            return true;
        };
        let name = name.and_then(Name::of);
        let (may, cause) = match self.guests.get(&port) {
            Some(guest) => policy.decide_query(&guest.rules, name.as_ref()),
            None => (false, Cause::Stranger),
        };
        self.ledger.count_query(cause);
        if !may {
            let guest = (port, self.name_of(port));
            self.ledger.deny_query(guest, name, cause, now);
        }
        may
    }

    /// Takes an answer that the gateway gives to a guest: an address is the name's from here on. Done
    /// under any policy and under none, so that one set later knows the names of what is in use.
    pub fn pin(&mut self, port: PortId, message: &[u8], now: Instant) {
        if !self.guests.contains_key(&port) {
            return;
        }
        let Some(answer) = Answer::parse(message) else {
            return;
        };
        let addresses = answer.addresses.iter();
        let inside = addresses.filter(|(address, _)| !self.is_outside(&Judged::new(*address)));
        self.rebinds += inside.count() as u64;
        self.pins.pin(port, answer, self.policy.as_deref(), now);
    }

    /// What `status` shows; `None` without a policy.
    pub fn view(&self, now: Instant) -> Option<PolicyView> {
        let policy = self.policy.as_deref()?;
        Some(PolicyView {
            pins: self.pins.count(),
            pins_evicted: self.pins.evicted(),
            rebinds: self.rebinds,
            ..self.ledger.view(policy, now)
        })
    }

    fn name_of(&self, port: PortId) -> Option<GuestName> {
        Some(self.guests.get(&port)?.name.clone())
    }
}

fn rules_for(policy: Option<&Policy>, name: &GuestName, group: Option<&GroupName>) -> GuestRules {
    policy.map_or_else(GuestRules::default, |policy| policy.for_guest(name, group))
}

#[cfg(test)]
mod flow_tests;
#[cfg(test)]
mod tests;
