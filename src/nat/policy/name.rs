//! Domain names: as rules write them, as DNS messages carry them, and which rules they match.
//!
//! A [`Name`] has one spelling: lower case, no dot at the end, labels of letters, digits, `-` and `_`.
//! Names with other bytes in them exist in the DNS, but not as names of hosts; none comes of them here,
//! so a dot inside a label can't be mistaken for one between labels.

use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;

use crate::gateway::dns::message;

/// Longest name in text form (RFC 1035 2.3.4: 255 bytes on the wire).
pub const NAME_LEN_MAX: usize = 253;
/// Longest label (RFC 1035 2.3.4).
const LABEL_LEN_MAX: usize = 63;

/// A host's name.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Name(Arc<str>);

impl Name {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The name that a message carries; `None` if it is the root's, or not a host's.
    pub fn of(name: &message::Name) -> Option<Self> {
        let mut text = String::new();
        for label in name.labels() {
            if !label.iter().all(|&byte| is_name_byte(byte)) {
                return None;
            }
            if !text.is_empty() {
                text.push('.');
            }
            text.extend(label.iter().map(|&byte| char::from(byte)));
        }
        (!text.is_empty()).then(|| Self(text.into()))
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

fn is_name_byte(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_'
}

/// What a rule says about names.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Pattern {
    /// This name.
    Exact(Name),
    /// All names below this one, not itself: `*.example.test`.
    Below(Name),
    /// Every name: `*`.
    Every,
}

impl Pattern {
    /// Reads a pattern.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn parse(text: &str) -> Result<Self, String> {
        if text == "*" {
            return Ok(Self::Every);
        }
        if !text.is_ascii() {
            return Err("has letters beyond ASCII: write the xn-- form that the DNS uses".into());
        }
        let (below, rest) = match text.strip_prefix("*.") {
            Some(rest) => (true, rest),
            None => (false, text),
        };
        if rest.contains('*') {
            return Err("a * stands for whole labels at the front: *.example.org".into());
        }
        let name = rest.strip_suffix('.').unwrap_or(rest);
        if name.len() > NAME_LEN_MAX {
            return Err(format!("a name has at most {NAME_LEN_MAX} characters"));
        }
        for label in name.split('.') {
            check_label(label)?;
        }
        let top = name.rsplit('.').next().unwrap_or_default();
        if top.bytes().all(|byte| byte.is_ascii_digit()) || top.starts_with("0x") {
            return Err("is neither an address, a network like 198.51.100.0/24 nor a name".into());
        }
        if !below && !rest.contains('.') {
            return Err(
                "is neither any, internet, private or metadata nor an address nor a name with a dot \
                 (a name of one label is written with a dot behind it)"
                    .into(),
            );
        }
        let name = Name(name.to_ascii_lowercase().into());
        Ok(if below {
            Self::Below(name)
        } else {
            Self::Exact(name)
        })
    }
}

fn check_label(label: &str) -> Result<(), String> {
    if label.is_empty() {
        return Err("has an empty label: two dots in a row, or one in front".into());
    }
    if label.len() > LABEL_LEN_MAX {
        return Err(format!(
            "a label has at most {LABEL_LEN_MAX} characters (RFC 1035)"
        ));
    }
    if let Some(bad) = label.bytes().find(|&byte| !is_name_byte(byte)) {
        let bad = char::from(bad).escape_default();
        return Err(format!("has a {bad} in it, which no name of a host has"));
    }
    if label.starts_with('-') || label.ends_with('-') {
        return Err("has a label with a dash at its edge".into());
    }
    Ok(())
}

impl fmt::Display for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exact(name) => write!(f, "{name}"),
            Self::Below(name) => write!(f, "*.{name}"),
            Self::Every => f.write_str("*"),
        }
    }
}

/// Which rules a name matches, by one look-up for each of its last labels.
#[derive(Clone, Debug, Default)]
pub struct NameIndex {
    exact: HashMap<Name, Vec<u16>>,
    below: HashMap<Box<str>, Vec<u16>>,
    every: Vec<u16>,
    /// Labels of the longest name in `below`: longer ends of a name need not be looked up.
    depth: usize,
}

impl NameIndex {
    /// Adds a pattern of `rule`. Rules come in order.
    pub fn add(&mut self, pattern: &Pattern, rule: u16) {
        let rules = match pattern {
            Pattern::Exact(name) => self.exact.entry(name.clone()).or_default(),
            Pattern::Below(name) => {
                let labels = name.as_str().split('.').count();
                self.depth = self.depth.max(labels);
                self.below.entry(name.as_str().into()).or_default()
            }
            Pattern::Every => &mut self.every,
        };
        // A rule that says the same twice.
        if rules.last() != Some(&rule) {
            rules.push(rule);
        }
    }

    /// The rules that have a pattern for `name`, in no order, some perhaps twice.
    pub fn matches<'a>(&'a self, name: &'a Name) -> impl Iterator<Item = u16> + 'a {
        let text = name.as_str();
        let dots = text.rmatch_indices('.').take(self.depth);
        let below = dots.filter_map(|(at, _)| self.below.get(&text[at + 1..]));
        let lists = self.exact.get(name).into_iter().chain(below);
        lists.chain([&self.every]).flatten().copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The name with these labels as a query carries it.
    fn read(labels: &[&[u8]]) -> Option<Name> {
        let mut query = vec![0, 0, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
        for label in labels {
            query.push(label.len() as u8);
            query.extend_from_slice(label);
        }
        query.extend([0, 0, 1, 0, 1]);
        Name::of(&message::question_name(&query)?)
    }

    fn name(text: &str) -> Name {
        let labels: Vec<_> = text.split('.').map(str::as_bytes).collect();
        read(&labels).unwrap()
    }

    #[test]
    fn names_from_messages() {
        let www = read(&[b"WwW", b"Example", b"_x-1"]).unwrap();
        assert_eq!(www.as_str(), "www.example._x-1");
        for (why, labels) in [
            ("the root", &[][..]),
            ("a dot inside a label", &[&b"a.b"[..]]),
            ("a backslash", &[b"a\\b"]),
            ("a zero byte", &[b"\0"]),
            ("not ASCII", &[b"\xc3\xa4"]),
            ("a star", &[b"*", b"test"]),
            ("a blank", &[b"www", b" "]),
        ] {
            assert_eq!(read(labels), None, "{why}");
        }
    }

    #[test]
    fn longest_names() {
        let long = [b'x'; 63];
        let name = read(&[&long, &long, &long, &long[..61]]).unwrap();
        assert_eq!(name.as_str().len(), NAME_LEN_MAX);
        assert_eq!(read(&[&long, &long, &long, &long[..62]]), None);
        Pattern::parse(name.as_str()).unwrap();
        assert!(Pattern::parse(&format!("{name}x")).is_err());
    }

    #[test]
    fn patterns() {
        for (text, shown) in [
            ("Example.TEST", "example.test"),
            ("example.test.", "example.test"),
            ("*.Example.test.", "*.example.test"),
            ("*.test", "*.test"),
            ("printer.", "printer"),
            ("*", "*"),
            ("_sip._tcp.example.test", "_sip._tcp.example.test"),
            ("xn--bcher-kva.example", "xn--bcher-kva.example"),
            ("1.2.3.4.in-addr.arpa", "1.2.3.4.in-addr.arpa"),
        ] {
            assert_eq!(Pattern::parse(text).unwrap().to_string(), shown);
        }
        for bad in [
            "",
            ".",
            "*.",
            "**",
            "*.*.test",
            "a.*.test",
            "*a.test",
            "a..test",
            ".a.test",
            "a.test..",
            "privat",
            "localhost",
            "b\u{fc}cher.example",
            "a/b.test",
            "a b.test",
            "1.2.3",
            "1.2.3.4.5",
            "10.0.0.256",
            "0x7f.0x1",
            "-a.test",
            "a-.test",
            "fe80::1%eth0",
            &format!("{}.test", "x".repeat(64)),
        ] {
            assert!(Pattern::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn what_matches_what() {
        let mut index = NameIndex::default();
        let patterns = ["example.test", "*.example.test", "*.test", "*"];
        for (rule, text) in patterns.iter().enumerate() {
            index.add(&Pattern::parse(text).unwrap(), rule as u16);
        }
        let matching = |text: &str| {
            let mut rules: Vec<_> = index.matches(&name(text)).collect();
            rules.sort_unstable();
            rules
        };
        assert_eq!(matching("example.test"), [0, 2, 3]);
        assert_eq!(matching("www.example.test"), [1, 2, 3]);
        assert_eq!(matching("a.b.c.example.test"), [1, 2, 3]);
        assert_eq!(matching("badexample.test"), [2, 3]);
        assert_eq!(matching("example.test.evil"), [3]);
        assert_eq!(matching("test"), [3]);
    }

    /// The slow way to the same answer.
    fn fits(pattern: &Pattern, name: &Name) -> bool {
        match pattern {
            Pattern::Every => true,
            Pattern::Exact(this) => this == name,
            Pattern::Below(this) => name.as_str().ends_with(&format!(".{this}")),
        }
    }

    proptest! {
        #[test]
        fn index_agrees_with_the_slow_way(
            patterns in prop::collection::vec("(\\*\\.)?([ab]\\.){1,3}[ab]", 0..8),
            names in prop::collection::vec("([ab]\\.){0,4}[ab]", 1..8),
        ) {
            let patterns: Vec<_> = patterns.iter().map(|text| Pattern::parse(text).unwrap()).collect();
            let mut index = NameIndex::default();
            for (rule, pattern) in patterns.iter().enumerate() {
                index.add(pattern, rule as u16);
            }
            for text in names {
                let name = name(&text);
                let mut found: Vec<_> = index.matches(&name).map(usize::from).collect();
                found.sort_unstable();
                found.dedup();
                let expected: Vec<_> = (0..patterns.len()).filter(|&rule| fits(&patterns[rule], &name)).collect();
                prop_assert_eq!(found, expected, "{}", text);
            }
        }
    }
}
