//! Whom a guest wrote to from one mapping, and how much of that a behaviour looks at.

use std::net::{IpAddr, SocketAddr};
use std::str::FromStr;

/// Peers of one mapping at most. What a program talks to from one socket at a time: game servers and
/// BitTorrent's DHT keep some dozens of exchanges open. They are searched in order, 4 KiB at most.
pub const PEERS_MAX: usize = 128;

/// What of an outside endpoint a NAT's behaviour depends on (RFC 4787 4.1 and 5).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Dependence {
    /// Nothing.
    EndpointIndependent,
    /// Its address.
    AddressDependent,
    /// Its address and port.
    AddressAndPortDependent,
}

impl Dependence {
    /// The words for them, as RFC 4787 has them.
    const WORDS: [(&'static str, Dependence); 3] = [
        ("endpoint-independent", Dependence::EndpointIndependent),
        ("address-dependent", Dependence::AddressDependent),
        (
            "address-and-port-dependent",
            Dependence::AddressAndPortDependent,
        ),
    ];

    /// What of `to` tells mappings apart; port 0 stands for all ports.
    pub fn part(self, to: SocketAddr) -> Option<SocketAddr> {
        match self {
            Dependence::EndpointIndependent => None,
            Dependence::AddressDependent => Some(SocketAddr::new(to.ip(), 0)),
            Dependence::AddressAndPortDependent => Some(to),
        }
    }
}

impl FromStr for Dependence {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let found = Self::WORDS.iter().find(|(word, _)| *word == text);
        found.map(|&(_, kind)| kind).ok_or_else(|| {
            let [a, b, c] = Self::WORDS.map(|(word, _)| word);
            format!("{text:?} is none of {a}, {b}, {c}")
        })
    }
}

/// The outside endpoints that a guest wrote to from one mapping, the most recent first. Beyond
/// [`PEERS_MAX`] the one unused longest is forgotten.
#[derive(Debug, Default)]
pub struct Peers(Vec<SocketAddr>);

impl Peers {
    /// Whether the guest wrote to `peer`.
    pub fn contains(&self, peer: SocketAddr) -> bool {
        self.0.contains(&peer)
    }

    /// Whether the guest wrote to any port of `address`.
    pub fn contains_address(&self, address: IpAddr) -> bool {
        self.0.iter().any(|peer| peer.ip() == address)
    }

    /// Moves a known peer to the front. `false`: it is not known.
    pub fn touch(&mut self, peer: SocketAddr) -> bool {
        match self.0.iter().position(|&known| known == peer) {
            Some(0) => true,
            Some(at) => {
                self.0[..=at].rotate_right(1);
                true
            }
            None => false,
        }
    }

    /// Puts a peer at the front.
    pub fn add(&mut self, peer: SocketAddr) {
        if !self.touch(peer) {
            self.0.truncate(PEERS_MAX - 1);
            self.0.insert(0, peer);
        }
    }

    /// Forgets the peers that are not `wanted`; `true` if none is left.
    pub fn retain(&mut self, wanted: impl FnMut(&SocketAddr) -> bool) -> bool {
        self.0.retain(wanted);
        self.0.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peer(port: u16) -> SocketAddr {
        SocketAddr::from(([203, 0, 113, 9], port))
    }

    #[test]
    fn peers_forget_the_one_unused_longest() {
        let mut peers = Peers::default();
        for port in 1..=PEERS_MAX as u16 {
            assert!(!peers.touch(peer(port)));
            peers.add(peer(port));
        }
        assert!(peers.touch(peer(1)));
        peers.add(peer(1000));
        assert!(peers.contains(peer(1)) && peers.contains(peer(1000)));
        assert!(!peers.contains(peer(2)));
        assert!(peers.contains_address(peer(2).ip()));
        assert_eq!(peers.0.len(), PEERS_MAX);
        peers.add(peer(1000));
        assert_eq!(peers.0.len(), PEERS_MAX, "known already");
        assert!(!peers.retain(|peer| peer.port() == 1));
        assert!(peers.retain(|_| false));
    }

    #[test]
    fn what_tells_mappings_apart() {
        let to = peer(53);
        assert_eq!(Dependence::EndpointIndependent.part(to), None);
        assert_eq!(Dependence::AddressDependent.part(to), Some(peer(0)));
        assert_eq!(Dependence::AddressAndPortDependent.part(to), Some(to));
    }
}
