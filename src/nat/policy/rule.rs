//! Rules, and the walk through them that ends in a verdict. Immutable once made: workers share one
//! [`Policy`].

use std::fmt;
use std::ops::RangeInclusive;

use super::address::{Cidr, Judged};
use super::name::{Name, NameIndex, Pattern};
use super::{Peer, Protocol, Verdict};
use crate::names::{GroupName, GuestName};

/// Rules of a policy at most. Each new flow may walk them all: ten took 0.2 us, 1,024 took 16 us (at
/// opt-level 1, on the 2-core machine).
pub const RULES_MAX: usize = 1_024;
/// Ports of DNS (RFC 1035 4.2), and of DNS over TLS and over QUIC (RFC 7858 3.1, RFC 9250 4.1.1). A
/// guest with name rules has no business there: its resolver is the gateway.
pub const RESOLVER_PORTS: [u16; 2] = [53, 853];

/// What a rule does with what it matches.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Action {
    /// Lets it through.
    Allow,
    /// Refuses it.
    Deny {
        /// Without an answer.
        silent: bool,
    },
}

/// Whom a rule is about.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum GuestTerm {
    /// The guest behind the port of this name.
    Port(GuestName),
    /// All guests of this group.
    Group(GroupName),
}

/// Where a rule leads: the union of its parts.
#[derive(Clone, Default, PartialEq, Eq, Debug)]
pub struct Destinations {
    /// `any`, or nothing said.
    pub any: bool,
    /// `internet`.
    pub internet: bool,
    /// Addresses and networks, written as such or as `private` and `metadata`.
    pub networks: Vec<Cidr>,
    /// Names.
    pub names: Vec<Pattern>,
}

/// One rule.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Rule {
    /// Line of the policy's text it stands on, from 1.
    pub line: u32,
    /// Its words, one blank between them.
    pub text: Box<str>,
    /// What it does.
    pub action: Action,
    /// Whom it is about; empty: everyone.
    pub guests: Vec<GuestTerm>,
    /// Where to.
    pub to: Destinations,
    /// Protocols; empty: all.
    pub protocols: Vec<Protocol>,
    /// Ports; empty: all.
    pub ports: Vec<RangeInclusive<u16>>,
}

impl Rule {
    fn is_about(&self, name: &GuestName, group: Option<&GroupName>) -> bool {
        self.guests.is_empty()
            || self.guests.iter().any(|term| match term {
                GuestTerm::Port(port) => port == name,
                GuestTerm::Group(this) => group == Some(this),
            })
    }

    /// Whether it speaks of all protocols and ports.
    fn is_of_everything(&self) -> bool {
        self.protocols.is_empty() && self.ports.is_empty()
    }

    /// Whether protocol and port are among the rule's. A port that is not known counts as denied and
    /// not as allowed.
    fn covers(&self, peer: &Peer) -> bool {
        let protocol = self.protocols.is_empty() || self.protocols.contains(&peer.protocol);
        let port = match peer.port {
            _ if self.ports.is_empty() => true,
            Some(port) => self.lists_port(port),
            None => self.action != Action::Allow,
        };
        protocol && port
    }

    fn lists_port(&self, port: u16) -> bool {
        self.ports.iter().any(|range| range.contains(&port))
    }
}

/// A set of rules, by number.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct RuleSet([u64; RULES_MAX.div_ceil(64)]);

impl RuleSet {
    /// Adds rules.
    pub fn extend(&mut self, rules: impl IntoIterator<Item = u16>) {
        for rule in rules {
            self.0[usize::from(rule / 64)] |= 1 << (rule % 64);
        }
    }

    fn contains(&self, rule: u16) -> bool {
        self.0[usize::from(rule / 64)] >> (rule % 64) & 1 != 0
    }
}

/// What the names that lead to an address say of it.
#[derive(Clone, Copy, Default, Debug)]
pub struct Named {
    /// It has a name that counts: resolved by this guest, and no inside address.
    pub is_named: bool,
    /// Allowing rules with a pattern for such a name.
    pub allowing: RuleSet,
    /// Denying rules with a pattern for such a name, or for one of its aliases.
    pub denying: RuleSet,
}

/// Why a verdict came out as it did.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Cause {
    /// The rule with this number.
    Rule(u16),
    /// No rule matched.
    Default,
    /// It would be allowed, had its address a name: the guest has name rules.
    Nameless,
    /// It would be allowed, were it not another resolver: the guest has name rules.
    Resolver,
    /// The guest is not known.
    Stranger,
}

impl Action {
    /// As a policy's text says it.
    pub fn words(self) -> &'static str {
        match self {
            Self::Allow => "allow",
            Self::Deny { silent: false } => "deny",
            Self::Deny { silent: true } => "deny silent",
        }
    }
}

/// Its text, without comments.
impl fmt::Display for Policy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for rule in &self.rules {
            writeln!(f, "{}", rule.text)?;
        }
        writeln!(f, "default {}", self.default.words())
    }
}

/// The rules that are about one guest.
#[derive(Clone, Default, Debug)]
pub struct GuestRules {
    rules: Vec<u16>,
    /// Whether one of them has a name in it.
    pub has_names: bool,
}

/// All rules, and what happens where none matches.
#[derive(Clone, Debug)]
pub struct Policy {
    rules: Vec<Rule>,
    default: Action,
    names: NameIndex,
}

impl Policy {
    /// A policy of checked rules, [`RULES_MAX`] at most.
    pub(super) fn new(rules: Vec<Rule>, default: Action) -> Self {
        debug_assert!(rules.len() <= RULES_MAX);
        let mut names = NameIndex::default();
        for (rule, number) in rules.iter().zip(0..) {
            for pattern in &rule.to.names {
                names.add(pattern, number);
            }
        }
        Self {
            rules,
            default,
            names,
        }
    }

    /// The rules in order.
    pub fn rules(&self) -> &[Rule] {
        &self.rules
    }

    /// What happens where no rule matches.
    pub fn default_action(&self) -> Action {
        self.default
    }

    /// The rules about the guest behind the port called `name`.
    pub fn for_guest(&self, name: &GuestName, group: Option<&GroupName>) -> GuestRules {
        let mut guest = GuestRules::default();
        for (rule, number) in self.rules.iter().zip(0..) {
            if rule.is_about(name, group) {
                guest.rules.push(number);
                guest.has_names |= !rule.to.names.is_empty();
            }
        }
        guest
    }

    /// The rules with a pattern for `name`.
    pub fn rules_for<'a>(&'a self, name: &'a Name) -> impl Iterator<Item = u16> + 'a {
        self.names.matches(name)
    }

    /// Whether a guest may have this peer.
    pub fn decide(
        &self,
        guest: &GuestRules,
        peer: &Peer,
        to: &Judged,
        named: &Named,
    ) -> (Verdict, Cause) {
        let resolver = guest.has_names && peer.is_resolver();
        // Why the first rule that would have allowed it did not.
        let mut held_back = None;
        for &number in &guest.rules {
            let rule = &self.rules[usize::from(number)];
            if !rule.covers(peer) {
                continue;
            }
            let cause = Cause::Rule(number);
            if let Action::Deny { silent } = rule.action {
                if rule.to.touches(to) || named.denying.contains(number) {
                    return (Verdict::Deny { silent }, cause);
                }
                continue;
            }
            let by_address = to.is_covered_by(&rule.to.networks);
            let by_name = named.is_named && named.allowing.contains(number);
            let wide = rule.to.any || rule.to.internet && to.is_internet();
            let lists_port = peer.port.is_some_and(|port| rule.lists_port(port));
            match (by_address, by_name, wide) {
                (true, ..) if !resolver || lists_port => return (Verdict::Allow, cause),
                (false, false, false) => {}
                _ if resolver => held_back = held_back.or(Some(Cause::Resolver)),
                (_, true, _) => return (Verdict::Allow, cause),
                _ if !guest.has_names || named.is_named => return (Verdict::Allow, cause),
                _ => held_back = held_back.or(Some(Cause::Nameless)),
            }
        }
        match self.default {
            Action::Deny { silent } => (
                Verdict::Deny { silent },
                held_back.unwrap_or(Cause::Default),
            ),
            Action::Allow if resolver => (Verdict::Deny { silent: false }, Cause::Resolver),
            Action::Allow if guest.has_names && !named.is_named => {
                (Verdict::Deny { silent: false }, Cause::Nameless)
            }
            Action::Allow => (Verdict::Allow, Cause::Default),
        }
    }

    /// Whether a guest may ask for this name (`None`: no host's name): whether an answer could be of
    /// use to it. Asking itself tells an outside server something.
    pub fn decide_query(&self, guest: &GuestRules, name: Option<&Name>) -> (bool, Cause) {
        let mut matching = RuleSet::default();
        matching.extend(name.into_iter().flat_map(|name| self.rules_for(name)));
        for &number in &guest.rules {
            let rule = &self.rules[usize::from(number)];
            let by_name = matching.contains(number);
            let decided = match rule.action {
                // One that denies some ports only leaves a use for the name.
                Action::Deny { .. } => rule.is_of_everything() && (by_name || rule.to.any),
                // Addresses say nothing of names, unless nothing else does.
                Action::Allow => {
                    let by_address = !guest.has_names && !rule.to.networks.is_empty();
                    by_name || by_address || rule.to.any || rule.to.internet
                }
            };
            if decided {
                return (rule.action == Action::Allow, Cause::Rule(number));
            }
        }
        (self.default == Action::Allow, Cause::Default)
    }
}

impl Destinations {
    /// Whether a denying rule is about this address, whatever its names.
    fn touches(&self, to: &Judged) -> bool {
        let listed = || {
            self.networks
                .iter()
                .any(|&network| to.is_touched_by(network))
        };
        self.any || self.internet && to.is_internet() || listed()
    }
}

impl Peer {
    fn is_resolver(&self) -> bool {
        self.protocol != Protocol::Icmp
            && self.port.is_some_and(|port| RESOLVER_PORTS.contains(&port))
    }
}
