//! The LAN's IPv6 prefix: given, or made from who runs which network where.
//!
//! A prefix that nobody chose is a unique local one (RFC 4193) of which 56 bits come from a hash of
//! the machine's id, the user's number and the network's name: the same at each start, so that
//! running guests keep their addresses, and another for each machine, user and network, so that LANs
//! can be joined later. RFC 4193 3.2.2 would draw it at random and keep it, which takes a place to keep it.

use std::fmt;
use std::fs;
use std::net::Ipv6Addr;
use std::str::FromStr;

/// Prefix length that SLAAC needs (RFC 4862 5.5.3 with RFC 2464 4).
pub const PREFIX6_LEN: u8 = 64;
/// Where a machine's id is (machine-id(5)); a host name is the next best.
const MACHINE_IDS: [&str; 3] = [
    "/etc/machine-id",
    "/var/lib/dbus/machine-id",
    "/proc/sys/kernel/hostname",
];

/// Prefixes that are tried where the first is in use: as deep as networks inside networks go.
const OTHERS_MAX: u32 = 8;

/// The LAN's IPv6 as a user says it.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub enum Subnet6 {
    /// A unique local prefix made from machine, user and name.
    #[default]
    Auto,
    /// No IPv6 by the gateway.
    Off,
    /// This /64.
    Prefix(Ipv6Addr),
}

impl Subnet6 {
    /// The prefix, for the network called `name`.
    pub fn prefix(self, name: &str) -> Option<Ipv6Addr> {
        match self {
            Subnet6::Auto => Some(automatic(name)),
            Subnet6::Off => None,
            Subnet6::Prefix(prefix) => Some(prefix),
        }
    }

    /// This, or for [`Subnet6::Auto`] another prefix where the one that follows from the name is not free:
    /// a network inside a guest of another one has its machine's id, user and name.
    pub fn avoiding(self, name: &str, is_free: impl Fn(Ipv6Addr) -> bool) -> Self {
        if self != Subnet6::Auto || is_free(automatic(name)) {
            return self;
        }
        let mut others = (1..=OTHERS_MAX).map(|nth| automatic(&format!("{name}/{nth}")));
        others
            .find(|&prefix| is_free(prefix))
            .map_or(self, Subnet6::Prefix)
    }

    /// Checks a given prefix.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn check(self) -> Result<(), String> {
        let Subnet6::Prefix(prefix) = self else {
            return Ok(());
        };
        let bits = prefix.to_bits();
        if bits << PREFIX6_LEN != 0 {
            let base = Ipv6Addr::from_bits(bits >> PREFIX6_LEN << PREFIX6_LEN);
            return Err(format!("has host bits set: write {base}/{PREFIX6_LEN}"));
        }
        let is_global = bits >> 125 == 0b001;
        let is_unique_local = bits >> 121 == 0b111_1110;
        if !is_global && !is_unique_local {
            return Err(format!(
                "{self} is neither unique local (fc00::/7) nor global (2000::/3): \
                 choose one like fd12:3456:789a:1::/64"
            ));
        }
        Ok(())
    }
}

impl fmt::Display for Subnet6 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Subnet6::Auto => f.write_str("auto"),
            Subnet6::Off => f.write_str("off"),
            Subnet6::Prefix(prefix) => write!(f, "{prefix}/{PREFIX6_LEN}"),
        }
    }
}

impl FromStr for Subnet6 {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let subnet = match text {
            "auto" => return Ok(Subnet6::Auto),
            "off" => return Ok(Subnet6::Off),
            _ => text.split_once('/').and_then(|(prefix, len)| {
                let len: u8 = len.parse().ok()?;
                Some((prefix.parse::<Ipv6Addr>().ok()?, len))
            }),
        };
        let (prefix, len) =
            subnet.ok_or("not a subnet like fd12:3456:789a:1::/64, 'auto' or 'off'")?;
        if len != PREFIX6_LEN {
            return Err(format!(
                "/{len} is not /{PREFIX6_LEN}, which guests need to make their addresses (SLAAC)"
            ));
        }
        let subnet = Subnet6::Prefix(prefix);
        subnet.check()?;
        Ok(subnet)
    }
}

fn automatic(name: &str) -> Ipv6Addr {
    let machine = MACHINE_IDS.iter().find_map(|path| {
        let id = fs::read_to_string(path).ok()?;
        Some(id.trim().to_owned()).filter(|id| !id.is_empty())
    });
    let user = rustix::process::geteuid().as_raw();
    unique_local(&machine.unwrap_or_default(), user, name)
}

/// fd, 40 bits of global id, 16 bits of subnet id (RFC 4193 3.1).
fn unique_local(machine: &str, user: u32, name: &str) -> Ipv6Addr {
    let text = format!("lanlet/{machine}/{user}/{name}");
    // FNV-1a, because std's hashers may change between releases; its upper bits depend too little on
    // the last bytes, hence the finish of MurmurHash3.
    let hash = text.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    });
    let hash = (hash ^ hash >> 33).wrapping_mul(0xff51_afd7_ed55_8ccd);
    let hash = (hash ^ hash >> 33).wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    let hash = hash ^ hash >> 33;
    let prefix = 0xfd << 56 | hash >> 8;
    Ipv6Addr::from_bits(u128::from(prefix) << 64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn texts() {
        for text in ["auto", "off", "fd12:3456:789a:1::/64", "2001:db8:1:2::/64"] {
            assert_eq!(text.parse::<Subnet6>().unwrap().to_string(), text);
        }
        for bad in [
            "",
            "on",
            "fd12::",
            "fd12::/48",
            "fd12::/65",
            "fd12::1/64",
            "fe80::/64",
            "ff02::/64",
            "::/64",
            "::ffff:10.0.0.0/64",
            "64:ff9b::/64",
            "10.0.0.0/24",
            "fd12::/64 ",
        ] {
            assert!(bad.parse::<Subnet6>().is_err(), "{bad}");
        }
        let error = "fd12::1/64".parse::<Subnet6>().unwrap_err();
        assert!(error.contains("write fd12::/64"), "{error}");
    }

    #[test]
    fn an_automatic_prefix_stays_and_differs() {
        // What running guests have: it may not change from release to release.
        let lab = unique_local("5f2c9d0be1a84be2a1f0b8a7d1e6c3f4", 1000, "lab");
        assert_eq!(lab.to_string(), "fdc7:2b3:47ac:3879::");
        let mut seen = HashSet::new();
        for machine in ["a", "b"] {
            for user in [0, 1, 1000] {
                for name in ["default", "lab", "lab1", "lab2"] {
                    let prefix = unique_local(machine, user, name);
                    Subnet6::Prefix(prefix).check().unwrap();
                    assert_eq!(prefix.octets()[0], 0xfd);
                    // The global id alone keeps machines apart.
                    assert!(seen.insert(prefix.to_bits() >> 80), "{prefix}");
                }
            }
        }
        assert_eq!(Subnet6::Auto.prefix("n"), Subnet6::Auto.prefix("n"));
        assert_ne!(Subnet6::Auto.prefix("n"), Subnet6::Auto.prefix("m"));
        assert_eq!(Subnet6::Off.prefix("n"), None);
        let own = automatic("n");
        assert_eq!(Subnet6::Auto.avoiding("n", |_| true), Subnet6::Auto);
        let other = Subnet6::Auto.avoiding("n", |prefix| prefix != own);
        assert_eq!(other, Subnet6::Prefix(automatic("n/1")));
        assert_eq!(Subnet6::Off.avoiding("n", |_| false), Subnet6::Off);
    }
}
