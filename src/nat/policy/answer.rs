//! What a DNS answer says about the name that was asked for: its addresses, with the aliases on the
//! way to them.
//!
//! Only the question's own chain counts. Records of other names, of other types than the one asked
//! for, and of other sections say nothing here: a server could put any address beside any name there.
//! What can be read in two ways is read in none.

use std::net::IpAddr;

use super::name::Name;
use crate::gateway::dns::message::{self, AnswerData};
use crate::wire::be16;

/// Aliases on the way to an address at most: what BIND (max-query-restarts) and unbound
/// (MAX_RESTART_COUNT) follow.
pub const ALIASES_MAX: usize = 11;
/// Records of an answer that is read at all. The largest sets of addresses in use have some dozens.
pub const RECORDS_MAX: usize = 256;

/// Record types (RFC 1035 3.2.2, RFC 3596 2.1).
const TYPE_A: u16 = 1;
const TYPE_AAAA: u16 = 28;
/// Class Internet (RFC 1035 3.2.4).
const CLASS_IN: u16 = 1;

/// The addresses of a name.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Answer {
    /// What was asked for.
    pub question: Name,
    /// What it is an alias of, in order.
    pub aliases: Vec<Name>,
    /// Addresses with their TTL, seconds: that of the whole way, so its shortest.
    pub addresses: Vec<(IpAddr, u32)>,
}

/// The name that a query or answer of one question asks for; `None` where there is no such host name.
pub fn question(message: &[u8]) -> Option<Name> {
    Name::of(&message::question_name(message)?)
}

impl Answer {
    /// Reads a whole and successful answer to a question for addresses; `None` if it is anything else.
    pub fn parse(message: &[u8]) -> Option<Self> {
        if !message::is_success(message) {
            return None;
        }
        let question = question(message)?;
        let end = message::question_end(message)?;
        let asked = (be16(message, end - 4), be16(message, end - 2));
        if !matches!(asked, (TYPE_A | TYPE_AAAA, CLASS_IN)) {
            return None;
        }
        let mut aliases: Vec<(Name, Name, u32)> = Vec::new();
        let mut found: Vec<(Name, IpAddr, u32)> = Vec::new();
        for (record, number) in message::answers(message)?.zip(0..) {
            let record = record.ok()?;
            if number == RECORDS_MAX {
                return None;
            }
            // Not a host's name: nobody's address here.
            let Some(owner) = Name::of(&record.name) else {
                continue;
            };
            let ttl = record.ttl_secs;
            match (record.data, asked.0) {
                (AnswerData::Alias(target), _) => aliases.push((owner, Name::of(&target)?, ttl)),
                (AnswerData::V4(address), TYPE_A) => found.push((owner, address.into(), ttl)),
                (AnswerData::V6(address), TYPE_AAAA) => found.push((owner, address.into(), ttl)),
                _ => {}
            }
        }
        Self::follow(question, &aliases, found)
    }

    /// Goes from alias to alias, in whatever order the records came.
    fn follow(
        question: Name,
        aliases: &[(Name, Name, u32)],
        found: Vec<(Name, IpAddr, u32)>,
    ) -> Option<Self> {
        let mut way: Vec<Name> = Vec::new();
        let mut way_ttl = u32::MAX;
        loop {
            let name = way.last().unwrap_or(&question);
            let mut next = aliases.iter().filter(|(owner, ..)| owner == name);
            let Some((_, target, ttl)) = next.next() else {
                break;
            };
            // Two aliases of one name, or an alias with an address (RFC 1034 3.6.2), or a circle.
            let forks = next.any(|(_, other, _)| other != target);
            let has_address = found.iter().any(|(owner, ..)| owner == name);
            let circle = *target == question || way.contains(target);
            if forks || has_address || circle || way.len() == ALIASES_MAX {
                return None;
            }
            way_ttl = way_ttl.min(*ttl);
            way.push(target.clone());
        }
        let end = way.last().unwrap_or(&question);
        let addresses = found
            .iter()
            .filter(|(owner, ..)| owner == end)
            .map(|&(_, address, ttl)| (address, way_ttl.min(ttl)))
            .collect();
        Some(Self {
            addresses,
            question,
            aliases: way,
        })
    }
}

/// Writes DNS answers for tests.
#[cfg(test)]
pub mod writer {
    use super::*;

    /// CNAME (RFC 1035 3.2.2).
    pub const TYPE_CNAME: u16 = 5;

    /// `name` in wire form.
    pub fn name(text: &str) -> Vec<u8> {
        let labels = text.split('.').filter(|label| !label.is_empty());
        let mut bytes = Vec::new();
        for label in labels {
            bytes.push(label.len() as u8);
            bytes.extend_from_slice(label.as_bytes());
        }
        bytes.push(0);
        bytes
    }

    /// A query for `text`.
    pub fn query(text: &str, kind: u16) -> Vec<u8> {
        let mut bytes = vec![0x12, 0x34, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
        bytes.extend(name(text));
        bytes.extend(kind.to_be_bytes());
        bytes.extend(CLASS_IN.to_be_bytes());
        bytes
    }

    /// An answer without records yet.
    pub fn answer(text: &str, kind: u16) -> Vec<u8> {
        let mut bytes = query(text, kind);
        bytes[2..4].copy_from_slice(&[0x81, 0x80]);
        bytes
    }

    /// Adds a record to the answer section.
    pub fn record(message: &mut Vec<u8>, owner: &[u8], kind: u16, ttl: u32, data: &[u8]) {
        message.extend_from_slice(owner);
        message.extend(kind.to_be_bytes());
        message.extend(CLASS_IN.to_be_bytes());
        message.extend(ttl.to_be_bytes());
        message.extend((data.len() as u16).to_be_bytes());
        message.extend_from_slice(data);
        let count = be16(message, 6) + 1;
        message[6..8].copy_from_slice(&count.to_be_bytes());
    }

    /// The answer that `text` has these addresses, reached through these aliases; all of one family.
    pub fn addresses(text: &str, aliases: &[&str], list: &[(&str, u32)]) -> Vec<u8> {
        let list: Vec<(IpAddr, u32)> = list
            .iter()
            .map(|&(address, ttl)| (address.parse().unwrap(), ttl))
            .collect();
        let kind = match list.first() {
            Some((IpAddr::V6(_), _)) => TYPE_AAAA,
            _ => TYPE_A,
        };
        let mut message = answer(text, kind);
        let mut owner = vec![0xc0, message::HEADER_LEN as u8];
        for alias in aliases {
            record(&mut message, &owner, TYPE_CNAME, 300, &name(alias));
            owner = name(alias);
        }
        for (address, ttl) in list {
            match address {
                IpAddr::V4(address) => record(&mut message, &owner, kind, ttl, &address.octets()),
                IpAddr::V6(address) => record(&mut message, &owner, kind, ttl, &address.octets()),
            }
        }
        message
    }
}

#[cfg(test)]
mod tests {
    use super::writer::TYPE_CNAME;
    use super::*;
    use proptest::prelude::*;

    fn shown(message: &[u8]) -> Option<String> {
        let answer = Answer::parse(message)?;
        let aliases: Vec<_> = answer.aliases.iter().map(Name::as_str).collect();
        Some(format!(
            "{} {aliases:?} {:?}",
            answer.question, answer.addresses
        ))
    }

    const OWN: &[u8] = &[0xc0, 12];

    #[test]
    fn plain_and_aliased() {
        let plain = writer::addresses(
            "Www.Example.Test",
            &[],
            &[("198.51.100.1", 60), ("198.51.100.2", 5)],
        );
        assert_eq!(
            shown(&plain).unwrap(),
            "www.example.test [] [(198.51.100.1, 60), (198.51.100.2, 5)]"
        );
        let aliased = writer::addresses(
            "a.test",
            &["b.test", "C.test"],
            &[("2001:db8::1", 4000), ("2001:db8::2", 20)],
        );
        assert_eq!(
            shown(&aliased).unwrap(),
            "a.test [\"b.test\", \"c.test\"] [(2001:db8::1, 300), (2001:db8::2, 20)]"
        );
        assert_eq!(
            shown(&writer::addresses("a.test", &[], &[])).unwrap(),
            "a.test [] []"
        );
    }

    #[test]
    fn order_of_records_does_not_matter() {
        let mut message = writer::answer("a.test", TYPE_A);
        let ip = [198, 51, 100, 1];
        writer::record(&mut message, &writer::name("c.test"), TYPE_A, 30, &ip);
        writer::record(
            &mut message,
            &writer::name("b.test"),
            TYPE_CNAME,
            20,
            &writer::name("c.test"),
        );
        writer::record(&mut message, OWN, TYPE_CNAME, 10, &writer::name("b.test"));
        assert_eq!(
            shown(&message).unwrap(),
            "a.test [\"b.test\", \"c.test\"] [(198.51.100.1, 10)]"
        );
    }

    #[test]
    fn strangers_are_not_of_the_chain() {
        let mut message = writer::addresses("a.test", &["b.test"], &[("198.51.100.1", 60)]);
        let other = writer::name("other.test");
        writer::record(&mut message, &other, TYPE_A, 60, &[6, 6, 6, 6]);
        // Another type than the one asked for, and a signature.
        writer::record(&mut message, OWN, TYPE_AAAA, 60, &[0x20; 16]);
        writer::record(&mut message, OWN, 46, 60, &[0; 30]);
        // An alias that nobody asked about, and an owner that no rule can name.
        writer::record(
            &mut message,
            &other,
            TYPE_CNAME,
            60,
            &writer::name("x.test"),
        );
        let odd = [&[3][..], b"b.t", &[0]].concat();
        writer::record(&mut message, &odd, TYPE_A, 60, &[6, 6, 6, 7]);
        let expected = "a.test [\"b.test\"] [(198.51.100.1, 60)]";
        assert_eq!(shown(&message).unwrap(), expected);
        // Class CHAOS.
        let mut chaos = writer::addresses("a.test", &[], &[("198.51.100.1", 60)]);
        let at = chaos.len() - 14 + 3;
        chaos[at] = 3;
        assert_eq!(shown(&chaos).unwrap(), "a.test [] []");
        // The additional section is not looked at.
        let mut additional = writer::answer("a.test", TYPE_A);
        writer::record(&mut additional, OWN, TYPE_A, 60, &[6, 6, 6, 6]);
        additional[7] = 0;
        additional[11] = 1;
        assert_eq!(shown(&additional).unwrap(), "a.test [] []");
    }

    #[test]
    fn what_is_ambiguous_says_nothing() {
        type Change<'a> = &'a dyn Fn(&mut Vec<u8>);
        let good = writer::addresses("a.test", &["b.test"], &[("198.51.100.1", 60)]);
        assert!(shown(&good).is_some());
        let with = |change: Change<'_>| {
            let mut message = good.clone();
            change(&mut message);
            shown(&message)
        };
        let alias = |owner: &'static str, target: &'static str| {
            move |message: &mut Vec<u8>| {
                let (owner, target) = (writer::name(owner), writer::name(target));
                writer::record(message, &owner, TYPE_CNAME, 60, &target);
            }
        };
        let bad: [(&str, Change<'_>); 12] = [
            ("a query", &|m| m[2] &= 0x7f),
            ("another opcode", &|m| m[2] |= 0x28),
            ("truncated", &|m| m[2] |= 2),
            ("NXDOMAIN", &|m| m[3] |= 3),
            ("two questions", &|m| m[5] = 2),
            ("fewer records than it says", &|m| m[7] += 1),
            ("cut", &|m| m.truncate(m.len() - 1)),
            ("a fork", &alias("a.test", "c.test")),
            ("a circle", &alias("b.test", "a.test")),
            ("a circle of one", &alias("b.test", "b.test")),
            ("an alias beside an address", &alias("b.test", "c.test")),
            ("a long address", &|m| {
                writer::record(m, OWN, TYPE_A, 60, &[1; 5]);
            }),
        ];
        for (why, change) in bad {
            assert_eq!(with(change), None, "{why}");
        }
        // The same alias twice is no fork.
        assert!(with(&alias("a.test", "b.test")).is_some());
        for kind in [TYPE_CNAME, 16, 255, 65] {
            let mut message = writer::answer("a.test", kind);
            writer::record(&mut message, OWN, TYPE_A, 60, &[198, 51, 100, 1]);
            assert_eq!(shown(&message), None, "type {kind}");
        }
        let many = ["198.51.100.1"; RECORDS_MAX + 1].map(|address| (address, 60));
        assert_eq!(shown(&writer::addresses("a.test", &[], &many)), None);
        assert!(shown(&writer::addresses("a.test", &[], &many[1..])).is_some());
        let names: Vec<String> = (0..=ALIASES_MAX).map(|n| format!("n{n}.test")).collect();
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        let list = [("198.51.100.1", 60)];
        assert!(shown(&writer::addresses("a.test", &names[1..], &list)).is_some());
        assert_eq!(shown(&writer::addresses("a.test", &names, &list)), None);
        // RFC 2181 8: a TTL with its first bit set is 0.
        let forever = writer::addresses("a.test", &[], &[("198.51.100.1", 1 << 31)]);
        assert_eq!(shown(&forever).unwrap(), "a.test [] [(198.51.100.1, 0)]");
    }

    #[test]
    fn questions() {
        let asked = |message: &[u8]| question(message).map(|name| name.to_string());
        let query = writer::query("Www.Example.test", TYPE_A);
        assert_eq!(asked(&query).unwrap(), "www.example.test");
        assert_eq!(asked(&query[..query.len() - 1]), None);
        assert_eq!(asked(&writer::query("", TYPE_A)), None, "the root");
        assert_eq!(asked(&[]), None);
        let mut two = query.clone();
        two[5] = 2;
        assert_eq!(asked(&two), None);
        let mut compressed = query;
        compressed[message::HEADER_LEN] = 0xc0;
        assert_eq!(asked(&compressed), None);
    }

    proptest! {
        #[test]
        fn rubbish_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let _ = Answer::parse(&bytes);
            let _ = question(&bytes);
        }

        /// Answers with some bytes changed, so that the parser gets deep: what it makes of them stays
        /// within its limits, and asks for what the message asks for.
        #[test]
        fn damaged_answers(changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6)) {
            let mut message = writer::addresses(
                "www.example.test",
                &["b.test", "c.test"],
                &[("198.51.100.1", 60), ("198.51.100.2", 60)],
            );
            for (at, byte) in changes {
                let at = at.index(message.len());
                message[at] = byte;
            }
            if let Some(answer) = Answer::parse(&message) {
                prop_assert!(answer.aliases.len() <= ALIASES_MAX);
                prop_assert!(answer.addresses.len() <= RECORDS_MAX);
                prop_assert_eq!(Some(answer.question), question(&message));
            }
        }
    }
}
